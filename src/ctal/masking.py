"""The two masks of pre-training: tokens for masked language modelling, spans of frames for masked acoustic modelling.
And the blocks that are blanked in fine-tuning to make more of few recordings.

Pure functions of their input and a random generator, for one utterance without padding. Source: paper, sections 3.2
and 3.3, and the authors' code for what the paper leaves open (docs/parity.md). Numbers are drawn by torch; what is done
with them is left to NumPy, whose calls cost a fraction of torch's on so little data.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Generator, Tensor

IGNORED = -100
"""Label of a token that is not predicted, as everywhere in PyTorch."""

MIN_MASKABLE_FRAMES = 10
"""Shorter utterances (0.125 s) keep all their frames: half of them would not be worth predicting."""


class MaskingConfig(BaseModel):
    """How much is masked, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    text_mask_ratio: float = Field(0.15, ge=0, le=1)
    """Share of tokens that are predicted."""
    audio_mask_ratio: float = Field(0.15, ge=0, le=1)
    """Share of frames that are predicted, before overlaps."""
    min_span: int = Field(20, ge=1)
    """Shortest masked span, in frames of 12.5 ms."""
    max_span: int = Field(50, ge=1)
    """Longest masked span, in frames."""
    short_masking: Literal["fit", "reference"] = "fit"
    """`fit` masks every utterance of at least 10 frames; `reference` spares short ones, as the authors' code."""

    @model_validator(mode="after")
    def _check_spans(self) -> MaskingConfig:
        if self.min_span > self.max_span:
            raise ValueError(f"min_span {self.min_span} is above max_span {self.max_span}")
        return self


class MaskedTokens(NamedTuple):
    input_ids: Tensor
    """(L,) with masked tokens replaced."""
    labels: Tensor
    """(L,) original ids where a token is predicted, `IGNORED` elsewhere."""


class MaskedFrames(NamedTuple):
    features: Tensor
    """(T, D) with masked frames zeroed or replaced."""
    is_masked: Tensor
    """(T,) bool: frames that are predicted."""


def mask_tokens(
    input_ids: Tensor, *, vocab_size: int, mask_id: int, special_ids: int, ratio: float, generator: Generator
) -> MaskedTokens:
    """Chooses each token with probability `ratio`; of those 80 % become `<mask>`, 10 % a random token, 10 % stay.

    Args:
        input_ids: (L,) token ids.
        special_ids: Ids below this number are special: never chosen, never drawn.
    """
    dice = torch.rand(2, len(input_ids), generator=generator).numpy()
    random_ids = torch.randint(special_ids, vocab_size, input_ids.shape, generator=generator).numpy()
    ids = input_ids.numpy()
    chosen = (dice[0] < ratio) & (ids >= special_ids)
    masked = np.where(chosen & (dice[1] < 0.8), mask_id, ids)
    masked = np.where(chosen & (dice[1] >= 0.9), random_ids, masked)
    return MaskedTokens(torch.from_numpy(masked), torch.from_numpy(np.where(chosen, ids, IGNORED)))


def mask_frames(
    features: Tensor,
    *,
    ratio: float,
    min_span: int,
    max_span: int,
    generator: Generator,
    short_masking: Literal["fit", "reference"] = "fit",
) -> MaskedFrames:
    """Masks spans of one common length; of their frames 80 % are zeroed, 10 % replaced, 10 % kept.

    One span length S is drawn from `min_span` … `max_span`, then round(ratio·T/S) starts without replacement. Spans may
    overlap; every frame of every span throws its own die, and where spans overlap replacement (by a random frame of the
    utterance) wins over zeroing, and zeroing over keeping.

    Args:
        features: (T, D), normalised, so that zero is the mean.
        ratio: 0 masks nothing.
        short_masking: `fit` masks at least one span in every utterance of ≥ 10 frames, of at most half its length.
            `reference` leaves short utterances as they are (all of ≤ 66 frames, some up to 166) and never masks the
            last frame, as the authors' code does.
    """
    frames = len(features)
    span = int(torch.randint(min_span, max_span + 1, (), generator=generator))
    if short_masking == "fit":
        span = min(span, frames // 2)
        positions = frames - span + 1
        count = max(1, round(ratio * frames / span)) if ratio and frames >= MIN_MASKABLE_FRAMES else 0
    else:
        positions = max(frames - span, 0)
        count = round(ratio * frames / span)
    starts = torch.randperm(positions, generator=generator)[:count].numpy()
    spans = starts[:, None] + np.arange(span)

    dice = torch.rand(spans.shape, generator=generator).numpy()
    is_masked, is_zeroed, is_replaced = np.zeros((3, frames), dtype=bool)
    is_masked[spans] = True
    is_zeroed[spans[dice < 0.8]] = True
    is_replaced[spans[dice >= 0.9]] = True
    random_frames = torch.randint(frames, (frames,), generator=generator).numpy()
    masked, whole = features.clone(), features.numpy()
    values, replaced = masked.numpy(), np.flatnonzero(is_replaced)
    values[is_zeroed & ~is_replaced] = 0
    values[replaced] = whole[random_frames[replaced]]
    return MaskedFrames(masked, torch.from_numpy(is_masked))


MAX_TIME_BLOCK = 20
"""Longest stretch that `mask_blocks` blanks: 0.25 s."""

MAX_FREQUENCY_BLOCK = 12
"""Widest band that `mask_blocks` blanks, in mel channels of 80."""

_CHANNELS = 80


def mask_blocks(features: Tensor, time_masks: int, frequency_masks: int, generator: Generator) -> Tensor:
    """Blanks stretches of time and bands of frequency (SpecAugment: Park et al., 2019), each of a random size.

    Args:
        features: (T, D) in groups of 80 channels: static ones and, behind them, deltas, which lose the same bands. What
            is behind the last whole group (pitch) has no bands.
    """
    if not len(features) or not (time_masks or frequency_masks):
        return features
    features = features.clone()
    groups = features.shape[1] // _CHANNELS
    bands = features[:, : groups * _CHANNELS].unflatten(1, (groups, _CHANNELS))
    for axis, count, largest in ((0, time_masks, MAX_TIME_BLOCK), (2, frequency_masks, MAX_FREQUENCY_BLOCK)):
        masked = features if axis == 0 else bands
        size = masked.shape[axis]
        for _ in range(count):
            width = int(torch.randint(min(largest, size // 2) + 1, (), generator=generator))
            first = int(torch.randint(size - width + 1, (), generator=generator))
            masked.narrow(axis, first, width).zero_()
    return features
