"""Forward and backward pass of pre-training as CUDA graphs.

A step of few seconds of audio has as many operations as one of many, and a GPU that computes each in microseconds waits
for the host to issue them. A CUDA graph is issued as one (docs/performance.md, "On a GPU"). It has fixed sizes and
addresses: batches are filled up to few sizes (`ctal.packing.fill`) and copied to where the graph reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ctal.packing import FramesToPredict, PretrainingBatch, Selection, TokensToPredict

KEPT = 128
"""Recordings at a time. They share the memory of what they compute; each has its own inputs."""

Losses = Callable[[PretrainingBatch, Tensor], Tensor]
"""A filled batch and (2,) counts → (2,) losses."""


class _Graph(Protocol):
    def replay(self) -> None: ...


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


@dataclass(frozen=True)
class _Recording:
    """Of one set of sizes."""

    inputs: Sequence[Tensor]
    forward: _Graph
    backward: _Graph
    losses: Tensor
    gradient: Tensor
    """Of the losses, (2,), which the backward pass begins with."""


class RecordedPasses:
    """`losses` of filled batches, as recorded when their sizes are first met."""

    def __init__(self, losses: Losses, parameters: Callable[[], Iterable[nn.Parameter]]) -> None:
        """`parameters` is asked once, when something is recorded first."""
        self._losses, self._all_parameters = losses, parameters
        self._parameters: list[nn.Parameter] = []
        self._gradients: list[Tensor] = []
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._memory = None
        self.turn = 0
        """Which forward pass the activations in the memory that all share are of."""

    def __call__(self, batch: PretrainingBatch, counts_2: Tensor) -> Tensor:
        """(2,) losses; their `backward` adds to the parameters' `grad`, once, before the next call."""
        inputs = [*_tensors_of(batch), counts_2]
        device = counts_2.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # Longest lengths follow from these.
        key = (dtype, *((each.dtype, each.shape) for each in inputs))
        recording = self._recordings.pop(key, None) or self._record(batch, inputs, dtype)
        self._recordings[key] = recording  # as the last of the dictionary
        if len(self._recordings) > KEPT:
            del self._recordings[next(iter(self._recordings))]
        for held, given in zip(recording.inputs, inputs, strict=True):
            held.copy_(given)
        losses = _Replay.apply(recording.losses.detach().requires_grad_(), recording, self)
        assert isinstance(losses, Tensor)
        return losses

    def hold_gradients(self) -> None:
        """Has the parameters' gradients lie where the recordings add to them; those that there are not become 0."""
        if not self._gradients:
            self._parameters = [each for each in self._all_parameters() if each.requires_grad]
            self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        missing = []
        for parameter, held in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is None:
                missing.append(held)
            elif parameter.grad is not held:
                held.copy_(parameter.grad)
            parameter.grad = held
        if missing:
            torch._foreach_zero_(missing)  # pyright: ignore[reportPrivateImportUsage]

    def _record(self, batch: PretrainingBatch, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> _Recording:
        inputs = [each.clone() for each in inputs]
        *tensors, counts_2 = inputs
        batch = _with_tensors(batch, tensors)

        def losses() -> Tensor:
            # Copies of weights that autocast keeps for later would be those of this moment.
            with torch.autocast(counts_2.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
                return self._losses(batch, counts_2)

        self.hold_gradients()
        return _Recording(inputs, *self._capture(losses))

    def _capture(self, losses: Callable[[], Tensor]) -> tuple[_Graph, _Graph, Tensor, Tensor]:
        """Graphs of both passes, and where the one leaves the losses, and the other finds their gradient."""
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Draws of dropout must not depend on when something is recorded.
        with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
            self._make_ready(losses)
            # In a thread of its own a loader may ask for pinned memory meanwhile.
            with torch.cuda.graph(forward, self._memory, capture_error_mode="thread_local"):
                recorded = losses()
            gradient = torch.ones_like(recorded)
            with torch.cuda.graph(backward, self._memory, capture_error_mode="thread_local"):
                torch.autograd.backward(recorded, gradient)
        return forward, backward, recorded.detach(), gradient

    def _make_ready(self, losses: Callable[[], Tensor]) -> None:
        """Does once what is done at the first use of anything, such as to compile it, which cannot be recorded."""
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(2):
                torch.autograd.grad(losses().sum(), self._parameters, allow_unused=True)
        here.wait_stream(aside)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _needs_gradient: Tensor, recording: _Recording, passes: RecordedPasses) -> Tensor:
        passes.turn += 1
        ctx.recording, ctx.passes, ctx.turn = recording, passes, passes.turn
        recording.forward.replay()
        return recording.losses.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        if ctx.turn != ctx.passes.turn:
            raise RuntimeError(
                "record_passes: no backward pass is left of this call, since it has run, or the model was called again"
            )
        ctx.recording.gradient.copy_(gradients[0])
        ctx.passes.hold_gradients()
        ctx.recording.backward.replay()
        ctx.passes.turn += 1  # its activations are used up
        return None, None, None


def _tensors_of(batch: PretrainingBatch) -> list[Tensor]:
    text, frames, tokens, to_predict = batch.text, batch.frames, batch.tokens, batch.to_predict
    assert to_predict.counted_M is not None
    return [
        *(text.values, text.index, text.lengths.offsets),
        *(frames.values, frames.index, frames.lengths.offsets),
        *(tokens.index, tokens.ids),
        *(to_predict.positions.index, to_predict.positions.lengths.offsets),
        *(to_predict.index, to_predict.targets, to_predict.counted_M),
    ]


def _with_tensors(batch: PretrainingBatch, tensors: Sequence[Tensor]) -> PretrainingBatch:
    """The inverse; of `batch` itself only bounds of lengths and the padded shapes are taken."""
    *packed, token_index, token_ids, positions, offsets, index, targets_MF, counted_M = tensors
    text, frames = (
        replace(of, values=values, index=index, lengths=of.lengths.at(offsets))
        for of, (values, index, offsets) in zip((batch.text, batch.frames), (packed[:3], packed[3:]), strict=True)
    )
    selection = Selection(positions, batch.to_predict.positions.lengths.at(offsets))
    to_predict = FramesToPredict(selection, index, targets_MF, counted_M)
    return PretrainingBatch(text, frames, TokensToPredict(token_index, token_ids), to_predict)
