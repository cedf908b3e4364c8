"""Fusion: the states of two modalities, packed, to one vector an utterance.

Source: paper, section 3.5, and the authors' code. Every state goes through a linear layer and tanh; then text is pooled
as its first token and as the maximum of the others, audio by attention and as its maximum. A fusion combines these four
pools. A module of its own each, found by name in `FUSIONS`: one entry there adds a fusion. With `audio_pooling`
"statistics" the deviation of the audio about what is attended stands in the place of its maximum, with "prosody" what
an utterance's functionals say (`ctal.prosody`).

An utterance without a recording has no audio positions: its audio pools are 0, and it has no part in orthogonality.

Before they are combined, pools can be standardised by constants (`PoolStandardisation`), which the paper does not.

Shape suffixes: B utterances, N packed positions of all of them, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OrthogonalNorm = Literal["cosine", "reference"]

LEAST_VARIANCE = 1e-6
"""Of what lies between -1 and 1: a dimension of a pool over utterances that differ in it, or of the audio's states over
time."""


class Pools(NamedTuple):
    """What each modality says of an utterance, (B, D) each; 0 for a modality that is missing or that is not used."""

    text_first: Tensor
    text_max: Tensor
    audio_attended: Tensor
    audio_max: Tensor
    """Or, in its place, the deviation or what the prosody says."""
    has_audio: Tensor
    """(B,) bool."""


class Fused(NamedTuple):
    vector: Tensor
    """(B, 2·D)."""
    orthogonality_B: Tensor
    """Sum of |cos| between pools of like kind of the two modalities; 0 where the fusion has no such term."""


def segment_max(values_ND: Tensor, owner_N: Tensor, segments: int) -> Tensor:
    """(segments, D) maximum over the positions of each segment; 0 for an empty one."""
    index_ND = owner_N[:, None].expand_as(values_ND)
    start = values_ND.new_zeros(segments, values_ND.shape[1])
    return start.scatter_reduce(0, index_ND, values_ND, "amax", include_self=False)


def segment_attend(values_ND: Tensor, scores_N: Tensor, owner_N: Tensor, segments: int) -> Tensor:
    """(segments, D) mean of each segment's positions, weighted by the softmax of their scores; 0 for an empty one."""
    return _segment_mean(values_ND.float(), _shares(scores_N, owner_N, segments), owner_N, segments).to(values_ND.dtype)


def segment_statistics(values_ND: Tensor, scores_N: Tensor, owner_N: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """(segments, D) mean as `segment_attend` gives it, and standard deviation about it with the same weights; 0 for an
    empty segment (attentive statistics pooling: Okabe et al., 2018, formulas 5 and 6)."""
    values, shares_N = values_ND.float(), _shares(scores_N, owner_N, segments)
    mean_SD = _segment_mean(values, shares_N, owner_N, segments)
    # Without the slope by way of the mean, about which the variance is least: it is 0, and expensive.
    variance_SD = _segment_mean((values - mean_SD.detach()[owner_N]).square(), shares_N, owner_N, segments)
    # The slope of a root is infinite at 0, which a single position has.
    deviation_SD = torch.where(variance_SD > LEAST_VARIANCE, variance_SD, LEAST_VARIANCE).sqrt()
    is_empty_S1 = torch.ones(segments, 1, dtype=torch.bool, device=owner_N.device).index_fill(0, owner_N, False)
    return mean_SD.to(values_ND.dtype), deviation_SD.masked_fill(is_empty_S1, 0).to(values_ND.dtype)


def _shares(scores_N: Tensor, owner_N: Tensor, segments: int) -> Tensor:
    """(N,) softmax over the positions of each segment, in single precision."""
    scores_N = scores_N.float()
    highest = segment_max(scores_N.detach()[:, None], owner_N, segments)[:, 0]
    weights_N = (scores_N - highest[owner_N]).exp()
    totals = weights_N.new_zeros(segments).index_add(0, owner_N, weights_N)
    return weights_N / totals[owner_N]


def _segment_mean(values_ND: Tensor, shares_N: Tensor, owner_N: Tensor, segments: int) -> Tensor:
    # In half precision each of a thousand additions would be rounded.
    start = shares_N.new_zeros(segments, values_ND.shape[1])
    return start.index_add(0, owner_N, values_ND * shares_N[:, None])


def absolute_cosine(audio_BD: Tensor, text_BD: Tensor, norm: OrthogonalNorm) -> Tensor:
    """(B,) |cos|, 0 where a vector is 0; `reference` divides by the norm of the audio twice, as the authors' code."""
    audio, text = audio_BD.float(), text_BD.float()
    if norm == "reference":
        return ((audio * text).sum(1) / audio.square().sum(1).clamp_min(1e-12)).abs()
    return F.cosine_similarity(audio, text, dim=1).abs()


class PoolStandardisation(nn.Module):
    """Brings each dimension of each pool to mean 0 and variance 1 over the utterances that were measured, as they were
    then.

    Pools differ far less from one utterance to the next than from 0, more so the mean of many frames, and a head that
    sees few utterances learns slowly from small differences. Constants, where x-vectors (Snyder et al., 2018) have a
    BatchNorm behind their pools: so what an utterance gives does not depend on the others of its batch, nor a step on
    how it is spread over microbatches and processes.
    """

    mean_4D: Tensor
    deviation_4D: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_4D", torch.zeros(4, width))
        self.register_buffer("deviation_4D", torch.ones(4, width))

    def forward(self, pools: Pools) -> Pools:
        """Pools of audio stay 0 where there is none."""
        standardised_B4D = (torch.stack(pools[:4], 1) - self.mean_4D) / self.deviation_4D
        text_first, text_max, audio_attended, audio_max = standardised_B4D.unbind(1)
        is_missing = ~pools.has_audio[:, None]
        audio_attended, audio_max = (audio.masked_fill(is_missing, 0) for audio in (audio_attended, audio_max))
        return Pools(text_first, text_max, audio_attended, audio_max, pools.has_audio)

    @torch.no_grad()
    def measure(self, parts: Sequence[Pools]) -> None:
        """Takes mean and deviation from `parts` of the training utterances, those of audio from the ones that have it.

        What does not vary, such as the text where there are no transcripts, keeps its deviation of 1: else the least
        change of the weights would throw it far off.
        """
        measured = Pools(*(torch.cat(values) for values in zip(*parts, strict=True)))
        for place, pool in enumerate(measured[:4]):
            values = (pool[measured.has_audio] if place >= 2 else pool).float()
            if len(values) > 1:
                variance, mean = torch.var_mean(values, 0)
                self.mean_4D[place] = mean
                self.deviation_4D[place] = variance.sqrt().where(variance > LEAST_VARIANCE, 1.0)


class Fusion(nn.Module):
    """Four pools to one vector; `norm` is that of the orthogonality term, where there is one."""

    uses_text: bool = True
    uses_audio: bool = True
    uses_both_kinds: bool = True
    """Of a modality's pools, not the first alone."""

    def __init__(self, hidden_size: int, norm: OrthogonalNorm) -> None:
        super().__init__()
        self.norm: OrthogonalNorm = norm

    def forward(self, pools: Pools) -> Fused:
        raise NotImplementedError


class OrthogonalFusion(Fusion):
    """The paper's: pools of like kind are summed, and kept orthogonal by a term of the loss."""

    def forward(self, pools: Pools) -> Fused:
        vector = torch.cat([pools.text_first + pools.audio_attended, pools.text_max + pools.audio_max], 1)
        first = absolute_cosine(pools.audio_attended, pools.text_first, self.norm)
        return Fused(vector, first + absolute_cosine(pools.audio_max, pools.text_max, self.norm))


class OrthogonalAttendedFusion(Fusion):
    """The paper's without its second kind of pool, the maxima, in whose place there are zeros."""

    uses_both_kinds = False

    def forward(self, pools: Pools) -> Fused:
        summed = pools.text_first + pools.audio_attended
        vector = torch.cat([summed, torch.zeros_like(summed)], 1)
        return Fused(vector, absolute_cosine(pools.audio_attended, pools.text_first, self.norm))


class ConcatFusion(Fusion):
    """The authors' plain fusion: the first token beside the attended audio."""

    uses_both_kinds = False

    def forward(self, pools: Pools) -> Fused:
        return _side_by_side(pools.text_first, pools.audio_attended)


class TextFusion(Fusion):
    """The two pools of the text; the audio has no part."""

    uses_audio = False

    def forward(self, pools: Pools) -> Fused:
        return _side_by_side(pools.text_first, pools.text_max)


class AudioFusion(Fusion):
    """The two pools of the audio, whose encoder has seen the text."""

    uses_text = False

    def forward(self, pools: Pools) -> Fused:
        return _side_by_side(pools.audio_attended, pools.audio_max)


class GatedFusion(Fusion):
    """Ours, beyond the paper: each dimension chooses between the modalities.

    z = σ(W [text; audio] + b), then z·text + (1 − z)·audio, for each kind of pool (gated multimodal units: Arevalo et
    al., 2017, widespread in emotion recognition since). Without a recording the gate is 1.
    """

    def __init__(self, hidden_size: int, norm: OrthogonalNorm) -> None:
        super().__init__(hidden_size, norm)
        self.gate_first = nn.Linear(2 * hidden_size, hidden_size)
        self.gate_max = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, pools: Pools) -> Fused:
        def mixed(gate: nn.Module, text: Tensor, audio: Tensor) -> Tensor:
            share = gate(torch.cat([text, audio], 1)).sigmoid()
            share = share.masked_fill(~pools.has_audio[:, None], 1.0)
            return share * text + (1 - share) * audio

        first = mixed(self.gate_first, pools.text_first, pools.audio_attended)
        return _side_by_side(first, mixed(self.gate_max, pools.text_max, pools.audio_max))


class TensorFusion(Fusion):
    """Ours, beyond the paper: every product of a few numbers of one modality and a few of the other, and each by itself
    (tensor fusion network: Zadeh et al., 2017, formula 3), as many as the vector has room for; zeros behind them.

    Where the tone turns the words into something else, that is a product, which sums have to be taught; and through so
    few numbers little goes of what a transcript can be told by, so that less is learned by heart.
    """

    def __init__(self, hidden_size: int, norm: OrthogonalNorm) -> None:
        super().__init__(hidden_size, norm)
        rank = math.isqrt(2 * hidden_size) - 1
        self.text, self.audio = (
            nn.Sequential(nn.Linear(2 * hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, rank), nn.Tanh())
            for _ in range(2)
        )

    def forward(self, pools: Pools) -> Fused:
        text_BR = self.text(torch.cat([pools.text_first, pools.text_max], 1))
        audio_BR = self.audio(torch.cat([pools.audio_attended, pools.audio_max], 1))
        audio_BR = audio_BR.masked_fill(~pools.has_audio[:, None], 0)
        # The 1 beside the numbers of one is what those of the other are multiplied with to stand by themselves.
        text, audio = (F.pad(each, (0, 1), value=1.0) for each in (text_BR, audio_BR))
        products = (text[:, :, None] * audio[:, None, :]).flatten(1)
        vector = F.pad(products, (0, 2 * pools.text_first.shape[1] - products.shape[1]))
        return Fused(vector, torch.zeros(len(vector), device=vector.device))


FUSIONS: dict[str, type[Fusion]] = {
    "orthogonal": OrthogonalFusion,
    "orthogonal_attended": OrthogonalAttendedFusion,
    "concat": ConcatFusion,
    "text": TextFusion,
    "audio": AudioFusion,
    "gated": GatedFusion,
    "tensor": TensorFusion,
}
"""Name, as in `CtalConfig.fusion` → module."""


def _side_by_side(first: Tensor, second: Tensor) -> Fused:
    return Fused(torch.cat([first, second], 1), torch.zeros(len(first), device=first.device))
