"""Utterances of a batch one behind the other, without padding, and what is to be predicted of them.

Shape suffixes as in `ctal.modeling_ctal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctal.attention import Lengths
from ctal.masking import IGNORED


@dataclass(frozen=True)
class Packed:
    """Utterances one behind the other."""

    values: Tensor
    """(N, …)."""
    lengths: Lengths
    index: Tensor
    """(N,) place of each position in the flattened padded batch."""
    shape: torch.Size
    """(B, longest) of the padded batch."""

    @property
    def owner(self) -> Tensor:
        """(N,) number of the utterance that each position belongs to."""
        return self.index // self.shape[1]

    def with_values(self, values: Tensor) -> Packed:
        return replace(self, values=values)

    def padded(self) -> Tensor:
        """(B, longest, …), zero at padding."""
        flat = self.values.new_zeros(self.shape.numel(), *self.values.shape[1:])
        return flat.index_copy(0, self.index, self.values).view(*self.shape, *self.values.shape[1:])


def places_of(sizes: Sequence[int], shape: torch.Size, device: torch.device) -> Packed:
    """Where the first `sizes` positions of each row of a (B, longest) batch are; they are the values, (N,)."""
    # A copy from the host, so that no further synchronisation with the device is needed to learn the positions.
    positions = [row * shape[1] + np.arange(size) for row, size in enumerate(sizes)]
    index = torch.from_numpy(np.concatenate(positions)).to(device)
    return Packed(index, Lengths(sizes, device), index, shape)


def pack(values: Tensor, sizes: Sequence[int]) -> Packed:
    """The first `sizes` positions of each row of (B, longest, …) `values`."""
    places = places_of(sizes, values.shape[:2], values.device)
    return places.with_values(values.flatten(0, 1).index_select(0, places.index))


def stack_frames(frames: Packed, stack: int) -> Packed:
    """Joins `stack` frames of an utterance at a time, with zeros behind its last: (N, F) → (positions, stack·F)."""
    if stack == 1:
        return frames
    batch, longest = frames.shape
    sizes, shape = [-(-size // stack) for size in frames.lengths.sizes], torch.Size((batch, -(-longest // stack)))
    stacked = places_of(sizes, shape, frames.index.device)
    slots_N = stacked.lengths.offsets[frames.owner] * stack + frames.index % longest
    size = frames.values.shape[1]
    flat = frames.values.new_zeros(sum(sizes) * stack, size)
    return stacked.with_values(flat.index_copy_(0, slots_N, frames.values).view(-1, stack * size))


def stack_mask(mask_BT: Tensor, stack: int) -> Tensor:
    """(B, T) → (B, ceil(T/stack), stack): the frames that a position stands for."""
    return F.pad(mask_BT, (0, -mask_BT.shape[1] % stack)).reshape(len(mask_BT), -(-mask_BT.shape[1] // stack), stack)


def unstack_frames(stacked: Tensor, stack: int, frames: int) -> Tensor:
    """(B, ceil(T/stack), stack·F) → (B, T, F) with T = `frames`: the inverse of `stack_frames`, with padding."""
    return stacked.reshape(len(stacked), -1, stacked.shape[2] // stack)[:, :frames]


@dataclass(frozen=True)
class Selection:
    """Positions of a packed tensor that are wanted."""

    index: Tensor
    """(S,)."""
    lengths: Lengths
    """How many of them belong to each utterance."""


@dataclass(frozen=True)
class TokensToPredict:
    """Masked tokens of a packed batch, S in all."""

    index: Tensor
    """(S,) their positions."""
    ids: Tensor
    """(S,) what they were."""


@dataclass(frozen=True)
class FramesToPredict:
    """Masked frames of a packed batch, M in all."""

    positions: Selection
    """Of the audio encoder, that stand for at least one of them."""
    index: Tensor
    """(M,) their places among all frames that those positions stand for."""
    targets: Tensor
    """(M, F) what they were."""
    counted_M: Tensor | None = None
    """1 for frames that count, 0 for those that only fill; None: all count."""


@dataclass(frozen=True)
class PretrainingBatch:
    """What the losses of pre-training are computed of."""

    text: Packed
    """(N,) ids."""
    frames: Packed
    """(N, F·frame_stack)."""
    tokens: TokensToPredict
    to_predict: FramesToPredict


def fill(batch: PretrainingBatch, max_tokens: int, max_positions: int, stack: int) -> PretrainingBatch:
    """The same with positions behind it that no loss counts, so that few different sizes are met.

    Sizes follow from the batch alone. What fills are utterances of their own, the first of which has all the positions,
    one at least, and the others none. `max_tokens` and `max_positions` are the longest that an utterance of the model
    may be, in the text and in the audio encoder; a position of the latter stands for `stack` frames.
    """
    utterances = max(8, 1 << len(batch.text.lengths.sizes).bit_length())
    step = max(64, 1 << max(0, len(batch.frames.index).bit_length() - 5))  # 3 to 6 %
    frames = _fill_packed(batch.frames, step, utterances, max_positions)
    text = _fill_packed(batch.text, max(16, step // 4), utterances, max_tokens)

    selected = batch.to_predict.positions
    count = _beyond(len(selected.index), 2 * step)
    positions = Selection(
        _fill_rows(selected.index, count, len(frames.index) - 1),
        _fill_lengths(selected.lengths, count, utterances, max(max_positions, 2 * step)),
    )
    slots, count = count * stack, _beyond(len(batch.to_predict.index), 2 * step * stack)
    to_predict = FramesToPredict(
        positions,
        _fill_rows(batch.to_predict.index, count, slots - 1),
        _fill_rows(batch.to_predict.targets, count, 0),
        _fill_rows(torch.ones_like(batch.to_predict.targets[:, 0]), count, 0),
    )
    count = _beyond(len(batch.tokens.index), max(16, step // 8))
    tokens = TokensToPredict(
        _fill_rows(batch.tokens.index, count, len(text.index) - 1), _fill_rows(batch.tokens.ids, count, IGNORED)
    )
    return PretrainingBatch(text, frames, tokens, to_predict)


def _fill_packed(packed: Packed, step: int, utterances: int, longest: int) -> Packed:
    count = _beyond(len(packed.index), step)
    index = packed.index // packed.shape[1] * longest + packed.index % packed.shape[1]
    return Packed(
        _fill_rows(packed.values, count, 0),
        _fill_lengths(packed.lengths, count, utterances, max(longest, step)),
        _fill_rows(index, count, 0),
        torch.Size((utterances, longest)),
    )


def _fill_lengths(lengths: Lengths, count: int, utterances: int, bound: int) -> Lengths:
    sizes = [*lengths.sizes, count - sum(lengths.sizes)]
    return Lengths(sizes + [0] * (utterances - len(sizes)), lengths.device, bound)


def _fill_rows(values: Tensor, count: int, value: int) -> Tensor:
    """(N, …) → (count, …)."""
    return torch.cat([values, values.new_full((count - len(values), *values.shape[1:]), value)])


def _beyond(count: int, step: int) -> int:
    """The next multiple of `step` above `count`."""
    return (count // step + 1) * step
