"""What a step of training costs: operations, memory, bytes; and how long a machine takes for it (docs/scaling.md).

Operations are counted exactly, as torch counts them (`tests/test_costs.py`). Seconds follow from them by a model of few
constants, which `python -m benchmarks scaling` fits on measured steps of one CPU; those of a GPU come from steps on one
H200.

Letters in formulas: L tokens and T frames (joined ones) of an utterance, D hidden size, I width of the feed-forward
layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from ctal.audio import HOP_LENGTH, SAMPLING_RATE
from ctal.configuration_ctal import CtalConfig
from ctal.features import NUM_MEL
from ctal.fusion import FUSIONS
from ctal.masking import MaskingConfig
from ctal.modeling_ctal import CtalForPreTraining

Precision = Literal["fp32", "bf16"]

FP32 = 4
"""Bytes of a number."""

FRAMES_A_SECOND = SAMPLING_RATE / HOP_LENGTH["mel"]

TOKENS_A_SECOND = 3.2
"""LibriSpeech has 2.7 words a second, of 1.2 tokens each."""

STORED_BYTES = {
    "FLAC": 17_100,
    "16-bit features": FRAMES_A_SECOND * 2 * 2 * NUM_MEL,
    "16-bit log-mel": FRAMES_A_SECOND * 2 * NUM_MEL,
}
"""Bytes of a second of audio: FLAC as LibriSpeech has it (openslr.org/12: 59.3 GB of training data, 960.9 h), features
with their deltas, or without them, when they are made where the model is."""


class Positions(NamedTuple):
    """What one utterance takes of the encoders; expected numbers need not be whole."""

    tokens: float
    frames: float
    """Positions of the audio encoder, which stand for `frame_stack` frames each."""
    predicted_tokens: float
    predicted_frames: float
    """Positions with a masked frame: all that the last audio layer and the head are computed for."""


def expected_positions(config: CtalConfig, seconds: float, masking: MaskingConfig) -> Positions:
    """Of one utterance, masked for pre-training; what is longer than the model takes is cut."""
    stack = config.audio.frame_stack
    frames = min(seconds * FRAMES_A_SECOND, config.audio.max_frames) / stack
    tokens = min(seconds * TOKENS_A_SECOND + 2, config.text.max_tokens)  # <s> and </s>
    # A span touches one more of the joined frames than it would fill.
    span = (masking.min_span + masking.max_span) / 2
    predicted = min(1.0, masking.audio_mask_ratio * (1 + (stack - 1) / span))
    return Positions(tokens, frames, masking.text_mask_ratio * tokens, predicted * frames)


# Operations -------------------------------------------------------------------------------------------------------


def pretraining_operations(config: CtalConfig, utterances: Iterable[Positions]) -> float:
    """Floating-point operations (a multiplication and an addition are two) of the matrix products of a step.

    Padding is never computed. The backward pass counts twice, also for the first layer, where it is once.
    """
    width, frame_size = config.hidden_size, config.audio.feature_size * config.audio.frame_stack
    products = 0.0
    for each in utterances:
        products += _text_encoder(config, each.tokens)
        products += _audio_encoder(config, each.tokens, each.frames, each.predicted_frames)
        products += each.predicted_tokens * (width**2 + width * config.text.vocab_size)
        products += each.predicted_frames * (width**2 + width * frame_size)
    return 3 * 2 * products


def finetuning_operations(config: CtalConfig, utterances: Iterable[Positions], outputs: int) -> float:
    """Likewise, with a task's head of `outputs` logits; what a fusion multiplies once an utterance is left out."""
    width, kind = config.hidden_size, FUSIONS[config.fusion]
    products = 0.0
    for each in utterances:
        products += _text_encoder(config, each.tokens)
        if kind.uses_text:
            products += each.tokens * width**2
        if kind.uses_audio:
            products += _audio_encoder(config, each.tokens, each.frames, each.frames)
            products += each.frames * (width**2 + width)
        products += (2 * width) ** 2 + 2 * width * outputs
    return 3 * 2 * products


def _text_encoder(config: CtalConfig, tokens: float) -> float:
    """Products of the forward pass: 4 D² of a position's projections, 2 D I of its feed-forward, 2 L D of attention."""
    width, inner = config.hidden_size, config.text.intermediate_size
    return config.text.num_hidden_layers * tokens * (4 * width**2 + 2 * width * inner + 2 * tokens * width)


def _audio_encoder(config: CtalConfig, tokens: float, frames: float, last_frames: float) -> float:
    """Likewise; the last layer has `last_frames` queries, and is computed no further than for them."""
    width, inner = config.hidden_size, config.audio.intermediate_size
    products = frames * config.audio.feature_size * config.audio.frame_stack * width
    for layer in range(config.audio.num_hidden_layers):
        wanted = last_frames if layer == config.audio.num_hidden_layers - 1 else frames
        queries = frames if config.audio_is_causal else wanted
        products += frames * 2 * width**2 + queries * (width**2 + 2 * frames * width)
        products += wanted * (width**2 + 2 * width * inner)
        if config.audio_sees_text:
            products += tokens * 2 * width**2 + wanted * (2 * width**2 + 2 * tokens * width)
    return products


# Memory and bytes -------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """How many numbers a model has to learn."""

    total: int
    layers: int
    """Those in layers of the encoders; the others are embeddings and heads."""
    tensors: int


def count_weights(config: CtalConfig) -> Weights:
    """Of a model for pre-training, which is built without memory for it."""
    with torch.device("meta"):
        model = CtalForPreTraining(config)
    layers = (each for each in model.modules() if isinstance(each, GradientCheckpointingLayer))
    in_layers = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    sizes = [parameter.numel() for parameter in model.parameters()]
    return Weights(sum(sizes), in_layers, len(sizes))


def state_bytes(weights: Weights, devices: int = 1) -> float:
    """Weights, gradients and both moments of AdamW, in fp32, that a device holds; `devices` share them under FSDP2."""
    return 4 * FP32 * weights.total / devices


def activation_bytes(config: CtalConfig, utterances: Iterable[Positions], precision: Precision) -> float:
    """What the forward pass keeps for the backward pass on a GPU, without `gradient_checkpointing`.

    Of a position and layer: query, key, value, inputs and results of attention, what goes into the feed-forward and
    into its GELU, what goes into each LayerNorm (fp32) and a byte a dimension for each dropout. In bf16 autocast keeps
    a copy of the weights besides. A CPU keeps a quarter more in fp32.
    """
    number, width = FP32 if precision == "fp32" else FP32 // 2, config.hidden_size
    residual = FP32 + 1
    attention, cross_attention = 5 * number + residual, 3 * number + residual
    text, audio = (
        width * (attention + number + residual) + number * part.intermediate_size
        for part in (config.text, config.audio)
    )
    if config.audio_sees_text:
        audio += width * cross_attention
    kept = 0.0
    for each in utterances:
        whole_layers = config.audio.num_hidden_layers - 1
        kept += config.text.num_hidden_layers * text * each.tokens
        kept += audio * (whole_layers * each.frames + each.predicted_frames)
        kept += each.frames * 3 * number * width  # input, keys and values of the last layer
        if config.audio_sees_text:
            kept += config.audio.num_hidden_layers * 2 * number * width * each.tokens
    return kept


def update_bytes(weights: Weights) -> float:
    """What clipping moves in memory (gradients read twice, written once) and AdamW (four tensors read, three written).

    Weights are read by the passes too; that is left to their share of the peak.
    """
    return (3 + 7) * FP32 * weights.total


def communicated_bytes(weights: Weights, devices: int, *, sharded: bool) -> float:
    """What a device sends in a step, and receives.

    DDP adds gradients up in a ring. FSDP2 gathers the layers' weights for both passes and all others once, and leaves
    each device its part of the summed gradients. All of it is fp32.
    """
    shares = weights.layers + 2 * weights.total if sharded else 2 * weights.total
    return FP32 * shares * (devices - 1) / devices


# Machines and seconds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What decides how long a step takes."""

    name: str
    peaks: Mapping[Precision, float]
    """Operations a second of matrix products, at best."""
    shares: Mapping[Precision, float]
    """Of the peak, what the passes of a step reach, with everything that lies between the products."""
    bandwidth: float
    """Bytes a second at which clipping and AdamW read and write."""
    launch: float
    """Seconds in which the host issues one of a step's `launches`."""
    is_asynchronous: bool
    """The device computes while the host issues, so that only the slower one counts; else both add up."""
    link: float = math.inf
    """Bytes a second that a device sends to others of its node, and receives."""
    network: float = math.inf
    """Likewise to other nodes."""
    devices_a_node: int = 8

    def ring(self, devices: int) -> float:
        """Bytes a second of each device in a ring: between nodes the cards of all devices of a node carry it."""
        return self.link if devices <= self.devices_a_node else min(self.link, self.network * self.devices_a_node)


_H200 = Machine(
    "H200",
    # Of 67 and 989 by the vendor: fp32 outside the tensor cores, as torch computes it by default.
    peaks={"fp32": 51.3e12, "bf16": 786e12},
    shares={"fp32": 0.575, "bf16": 0.277},
    bandwidth=2.3e12,
    launch=30e-6,
    is_asynchronous=True,
    link=450e9,
    network=50e9,
)
GPUS = {"h200": _H200, "h100": replace(_H200, name="H100", bandwidth=2.3e12 * 3.35 / 4.8)}
"""The SXM kinds. Link and network are the vendor's; the rest is what an H200 reached, fitted by hand on the steps in
docs/performance.md, "On a GPU". The H100, the same chip with slower memory, was not measured."""

CPU = Machine(
    "a CPU core",
    peaks={"fp32": 99.5e9, "bf16": 218e9},
    shares={"fp32": 0.74, "bf16": 0.68},
    bandwidth=25.3e9,
    launch=99e-6,
    is_asynchronous=False,
)
"""One core with AVX512-BF16: half of what `python -m benchmarks scaling` fits on two (docs/scaling.md). A launch takes
so long since small products and copies, which also grow with the number of tensors, are part of it."""

LOADED = {"FLAC": 1540.0, "16-bit features": 27_800.0, "16-bit log-mel": 32_000.0}
"""Seconds of audio that one core of that CPU makes ready for the model in a second, by what is stored (likewise),
without handing them over to the trainer."""


def machine_at_hand(precision: Precision) -> Machine:
    """A GPU that is known, or else one with its products measured, in less than a second, and the rest an H200's."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        like = next((gpu for gpu in GPUS.values() if gpu.name in name), None)
        return like or replace(_H200, name=name, peaks={precision: _products_a_second(precision, "cuda")})
    threads = torch.get_num_threads()
    name = f"CPU with {threads} thread{'s' * (threads > 1)}"
    return replace(CPU, name=name, peaks={precision: _products_a_second(precision, "cpu")})


def _products_a_second(precision: Precision, device: str) -> float:
    """Operations a second, the best of the matrix products that half a second holds."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # On a CPU so small that other processes do not come between.
    shape = (256, 768) if device == "cpu" else (8192, 3072)
    states, weight = (torch.ones(size, 768, dtype=dtype, device=device) for size in shape)
    best, end = math.inf, time.perf_counter() + 0.5
    while (began := time.perf_counter()) < end:
        float(F.linear(states, weight)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * states.numel() * len(weight) / best


def launches(weights: Weights, precision: Precision) -> float:
    """Operations on tensors that a step issues, about: so many for each tensor of weights (`tests/test_costs.py`)."""
    return weights.tensors * (4.0 if precision == "fp32" else 6.5)


class StepSeconds(NamedTuple):
    """Where the seconds of a step go."""

    passes: float
    """Forward and backward pass."""
    update: float
    """Clipping and AdamW."""
    communication: float
    """What the backward pass does not hide."""
    host: float
    """What the host needs to issue it all."""
    total: float


def step_seconds(
    machine: Machine,
    weights: Weights,
    operations: float,
    precision: Precision,
    *,
    devices: int = 1,
    sharded: bool = False,
) -> StepSeconds:
    """A step in which each of `devices` does `operations`; the loader is taken to keep up.

    Two thirds of the passes, the backward ones, hide communication. Left out: validation, checkpoints, latencies of the
    network, devices that wait for the one with most work, gathering anew for every accumulated microbatch.
    """
    passes = operations / (machine.peaks[precision] * machine.shares[precision])
    update = update_bytes(weights) / (devices if sharded else 1) / machine.bandwidth
    sent = communicated_bytes(weights, devices, sharded=sharded) / machine.ring(devices)
    communication = max(0.0, sent - 2 / 3 * passes)
    host = launches(weights, precision) * machine.launch
    busy = max(passes + update, host) if machine.is_asynchronous else passes + update + host
    return StepSeconds(passes, update, communication, host, busy + communication)
