"""How an utterance is spoken, in a few numbers: how its pitch and voicing are spread, and how fast its words come.

Functionals of a whole utterance, as sets of acoustic parameters for emotions have them (eGeMAPS: Eyben et al., 2016): a
handful of numbers, from which a style is learned that hundreds of dimensions of an encoder's states hold as well, but
among many that tell utterances apart by chance.

Shape suffixes: B utterances, N frames of all of them one behind the other, L tokens likewise, V entries of the
vocabulary, P functionals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctal.attention import Lengths

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
NUM_FUNCTIONALS = len(QUANTILES) + 5
"""The quantiles and the standard deviation of log-frequency, mean and standard deviation of voicing, and the logarithms
of letters and of words a frame."""
_LEAST_DEVIATION = 1e-3
"""Of a functional over utterances: what varies less, such as rates where there are no transcripts, is not blown up."""


class Prosody(nn.Module):
    """Functionals of utterances to vectors of the head's width."""

    letters_V: Tensor
    begins_word_V: Tensor
    mean_P: Tensor
    deviation_P: Tensor

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.register_buffer("letters_V", torch.zeros(vocab_size))
        self.register_buffer("begins_word_V", torch.zeros(vocab_size))
        self.register_buffer("mean_P", torch.zeros(NUM_FUNCTIONALS))
        self.register_buffer("deviation_P", torch.ones(NUM_FUNCTIONALS))
        self.dense = nn.Linear(NUM_FUNCTIONALS, width)

    @torch.no_grad()
    def initialize(self) -> None:
        """Weights of which a functional moves a tanh as far as it goes, and constants that change nothing."""
        nn.init.normal_(self.dense.weight, std=NUM_FUNCTIONALS**-0.5)
        nn.init.zeros_(self.dense.bias)
        for zeros in (self.letters_V, self.begins_word_V, self.mean_P):
            zeros.zero_()
        self.deviation_P.fill_(1.0)

    @torch.no_grad()
    def count_letters(self, letters: Sequence[int], begins_word: Sequence[bool]) -> None:
        """Takes of each token of the vocabulary how many letters it has, and whether a word begins with it; without,
        there are no rates."""
        self.letters_V[: len(letters)] = torch.tensor(letters, dtype=torch.float32)
        self.begins_word_V[: len(begins_word)] = torch.tensor(begins_word, dtype=torch.float32)

    @torch.no_grad()
    def functionals(
        self,
        log_hertz_N: Tensor,
        voicing_N: Tensor,
        frames: Lengths,
        ids_L: Tensor,
        owner_L: Tensor,
        whole_B: Tensor | None = None,
    ) -> Tensor:
        """(B, P) float32; NaN is what is not known: all of an utterance without a recording, the rates of one without a
        word.

        Args:
            log_hertz_N: of `ctal.pitch`, however normalised.
            voicing_N: likewise.
            frames: how many of them each utterance has.
            ids_L: token ids.
            owner_L: number of the utterance that each token belongs to.
            whole_B: how many frames the words take, where `frames` are of windows.
        """
        sizes_B = frames.offsets.diff()
        pitch_B8 = _spread(log_hertz_N.float(), frames)
        letters_B, words_B = (
            torch.zeros(len(sizes_B), device=ids_L.device).index_add(0, owner_L, counts_V[ids_L].float())
            for counts_V in (self.letters_V, self.begins_word_V)
        )
        spoken_B = sizes_B if whole_B is None else whole_B
        rates_B2 = torch.stack([letters_B, words_B], 1).clamp_min(1).log() - spoken_B.clamp_min(1).log()[:, None]
        has_audio_B1, has_words_B1 = (sizes_B > 0)[:, None], (letters_B > 0)[:, None]
        rates_B2 = rates_B2.where(has_words_B1, torch.nan)
        found_BP = torch.cat([pitch_B8, _moments(voicing_N.float(), frames), rates_B2], 1)
        return found_BP.where(has_audio_B1, torch.nan)

    @torch.no_grad()
    def measure(self, parts: Sequence[Tensor]) -> None:
        """Takes mean and deviation of `functionals` (B, P) of the training utterances."""
        found_NP = torch.cat(list(parts))
        self.mean_P[:] = found_NP.nanmean(0).nan_to_num(0.0)
        deviation_P = (found_NP - self.mean_P).square().nanmean(0).sqrt()
        self.deviation_P[:] = deviation_P.where(deviation_P > _LEAST_DEVIATION, 1.0)

    def forward(self, functionals_BP: Tensor) -> Tensor:
        """(B, width), between -1 and 1; the mean of training stands for what is not known."""
        standardised_BP = ((functionals_BP - self.mean_P) / self.deviation_P).nan_to_num(0.0)
        return self.dense(standardised_BP.to(self.mean_P.dtype)).tanh()


def _spread(values_N: Tensor, lengths: Lengths) -> Tensor:
    """(B, quantiles + 1): `QUANTILES`, on the line between the two nearest values, and the standard deviation; 0 of
    nothing."""
    sizes_B = lengths.offsets.diff()
    owner_N = torch.repeat_interleave(sizes_B, output_size=len(values_N))
    by_value_N = values_N.argsort()
    # One more, for an utterance of no frames behind the last.
    ordered_N = F.pad(values_N[by_value_N[owner_N[by_value_N].argsort(stable=True)]], (0, 1))
    places_BQ = (sizes_B - 1).clamp_min(0)[:, None] * values_N.new_tensor(QUANTILES)
    below_BQ = lengths.offsets[:-1, None] + places_BQ.long()
    above_BQ = torch.minimum(below_BQ + 1, lengths.offsets[1:, None] - 1).clamp_min(0)
    quantiles_BQ = torch.lerp(ordered_N[below_BQ], ordered_N[above_BQ], places_BQ.frac())
    return torch.cat([quantiles_BQ, _moments(values_N, lengths)[:, 1:]], 1)


def _moments(values_N: Tensor, lengths: Lengths) -> Tensor:
    """(B, 2): mean and standard deviation; 0 of nothing."""
    sizes_B = lengths.offsets.diff()
    owner_N = torch.repeat_interleave(sizes_B, output_size=len(values_N))

    def mean(each_N: Tensor) -> Tensor:
        return each_N.new_zeros(len(sizes_B)).index_add(0, owner_N, each_N) / sizes_B.clamp_min(1)

    mean_B = mean(values_N)
    return torch.stack([mean_B, mean((values_N - mean_B[owner_N]).square()).sqrt()], 1)
