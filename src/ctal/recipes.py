"""What a run is told: one documented, checked configuration, and the recipes that fill it in.

Architecture is not here: it lives in `CtalConfig` and travels with the weights. Fields of both can be set from the
command line with `--set field=value`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ctal.errors import InputError, did_you_mean
from ctal.masking import MaskingConfig


class RunConfig(BaseModel):
    """How the loop runs; saved beside every result."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(1_000_000, ge=1)
    """Updates of the weights."""
    batch_frames: int = Field(6_000, ge=1)
    """Frames (80 a second) of a step, over all processes and accumulated microbatches together."""
    accumulation: int = Field(1, ge=1)
    """Microbatches of a step in each process: more need less memory; the maths stays the same."""
    learning_rate: float = Field(5e-5, gt=0, allow_inf_nan=False)
    """Its peak."""
    warmup_ratio: float = Field(0.07, ge=0, le=1)
    """Share of the steps in which the rate rises from 0, linearly."""
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    """Of AdamW; biases and LayerNorms are spared."""
    adam_epsilon: float = Field(1e-6, gt=0, allow_inf_nan=False)
    """Of AdamW, as in the authors' code."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Gradients are clipped to this norm, all tensors together."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes matrix products in half precision (autocast); weights and losses stay fp32."""
    gradient_checkpointing: bool = False
    """Layers compute their activations again in the backward pass rather than keep them: less memory, slower."""
    compile: bool = False
    """torch compiles the layers in the first minute: 7 to 20 % off a step on a GPU in bf16 (docs/performance.md). Draws
    of dropout are others then, and a resumed run may differ in rounding."""
    sharded: bool = False
    """Several processes split weights, gradients and moments among them (FSDP2) rather than each hold all (DDP)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the weights, the order of the data, the masks and dropout."""
    max_frames: int = Field(3_000, ge=1)
    """Of a longer recording a random window of so many frames is used in every epoch."""
    validation_share: float = Field(0.1, gt=0, lt=1)
    """Share of the frames that is held out, whole speakers at a time, where the corpus prescribes no split."""
    checkpoint_every: int = Field(1_000, ge=1)
    """Steps between checkpoints; the model is validated before each."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the last checkpoints stay, beside the best one."""
    log_every: int = Field(10, ge=1)
    """Steps between entries of the log."""
    workers: int = Field(1, ge=0)
    """Processes that decode recordings ahead of the model, in each process; the data does not depend on it."""
    cache_megabytes: int = Field(512, ge=0)
    """Memory in which each worker keeps features, so that it decodes a small training part once; 512 hold 6 h. What
    `ctal features` has stored needs none."""


class PretrainConfig(RunConfig, MaskingConfig):
    """A run of `ctal pretrain`."""

    cuda_graphs: bool = False
    """One GPU records the passes of a step as CUDA graphs, which the host need not issue anew: a step of 75 s of audio
    takes two fifths of the time, one of 600 s 4 % less (docs/performance.md). Draws of dropout are others then."""
    train_share: float = Field(1.0, gt=0, le=1)
    """Share of the training utterances that is used, chosen by a hash of their ids: how much do more data help?"""


class FinetuneConfig(RunConfig):
    """A run of `ctal finetune`; the defaults are the paper's recipe (section 4.2) but for what a field says."""

    epochs: int = Field(20, ge=1)
    """Times that every training utterance is seen; `steps` follows from it."""
    learning_rate: float = Field(1e-5, gt=0, allow_inf_nan=False)
    """Its peak."""
    head_rate: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The head's learning rate, as a multiple of the encoders'."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each encoder layer's learning rate is that of the layer above it times this."""
    frozen: Literal["none", "text", "audio", "both"] = "none"
    """Encoders whose weights stay as they are."""
    validation_share: float = Field(0.1, ge=0, lt=1)
    """Share of the training utterances, whole speakers of them, that chooses the epoch where the corpus has no part for
    it; 0 trains on all of them and takes the last epoch (then a model of speakers has no threshold)."""
    schedule: Literal["cosine", "linear", "reference"] = "cosine"
    """How the rate falls to 0; `reference` goes up and down every other `epochs` updates, as in the authors' code."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` starts from scratch, with the architecture and tokenizer of the model."""
    inputs: Literal["both", "audio", "text"] = "both"
    """`audio` withholds every transcript, `text` every recording, in training and in evaluation."""
    modality_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of training utterances that lose their transcript or their recording, either as often."""
    time_masks: int = Field(0, ge=0)
    """Stretches of at most 0.25 s that are blanked in a training utterance (SpecAugment)."""
    frequency_masks: int = Field(0, ge=0)
    """Bands of at most 12 of 80 mel channels that are blanked in a training utterance."""
    random_speaker_mean: bool = False
    """With `cmvn=speaker`: a training utterance is less the mean over a random number of the speaker's other recordings
    (few more often than many), or over itself, so that few are enough in use (docs/results.md)."""
    speaker_swap: float = Field(0.0, ge=0, le=1)
    """Share of training utterances in which their speaker's mean gives way to that of any training speaker, so that
    more voices are met than there are: for emotions of few speakers, with `cmvn=fixed` or `level` (docs/results.md)."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` gives every emotion the same weight in the loss, however rare."""
    protocol: str = "auto"
    """What is trained on and what is reported: see `ctal finetune --help`."""


PRETRAINING: dict[str, dict[str, Any]] = {
    "nano": {"learning_rate": 2e-3, "batch_frames": 6_000, "steps": 1_000, "checkpoint_every": 200},
    "mini": {
        "learning_rate": 6e-4,
        "batch_frames": 6_000,
        "steps": 2_000,
        "checkpoint_every": 200,
        "text_mask_ratio": 0.3,
        "audio_mask_ratio": 0.3,
    },
    "tiny": {},
    "base": {},
    "large": {},
}
"""Size → fields in which its recipe differs from the defaults, which are the paper's (section 4.1).

`mini` is for hours of speech, not for hundreds of them: twice the paper's share of tokens and frames is masked, so that
every pass teaches more. Its learning rate is the highest that leaves a text encoder that fine-tuning can still move:
after 1e-3 a task is learned worse than from scratch (docs/results.md).
"""

MODEL_DEFAULTS: dict[str, dict[str, Any]] = {"nano": {"frame_stack": 2}, "mini": {"frame_stack": 4}}
"""Size → architecture fields in which its recipe differs from the paper."""

FINETUNING: dict[str, dict[str, Any]] = {
    "nano": {"learning_rate": 1e-3, "epochs": 6, "batch_frames": 3_000},
    "mini": {"learning_rate": 2e-4, "head_rate": 4, "epochs": 6, "batch_frames": 2_000, "weight_decay": 0.1},
    "tiny": {},
    "base": {},
    "large": {},
}
"""Size → fields in which the recipe of fine-tuning differs from the defaults."""

HEAD_DEFAULTS: dict[str, dict[str, Any]] = {"nano": {"speaker_loss": "aam"}, "mini": {"speaker_loss": "aam"}}
"""Size → fields of the head in which its recipe differs from the paper. Plain cross-entropy over the speakers does not
begin to learn in as many steps (docs/results.md)."""


HARMLESS = frozenset(
    {"workers", "cache_megabytes", "log_every", "keep_checkpoints", "gradient_checkpointing", "sharded"}
)
"""Fields that may change when a run is resumed: they do not touch the result."""

Config = TypeVar("Config", bound=RunConfig)


def make_config(kind: type[Config], *layers: Mapping[str, Any]) -> Config:
    """A configuration from layers of fields, later ones winning.

    Raises `InputError` naming the nearest field for an unknown one, and the allowed values for a wrong one.
    """
    fields: dict[str, Any] = {}
    for layer in layers:
        fields.update(layer)
    try:
        return kind(**fields)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"])) or "configuration"
        if problem["type"] == "extra_forbidden":
            raise InputError(f"unknown field '{name}'{did_you_mean(name, kind.model_fields)}") from None
        raise InputError(f"{name}={problem['input']!r}: {problem['msg']}") from None


def parse_settings(
    settings: Sequence[str], known: Collection[str], *, of_pretraining: Collection[str] = ()
) -> dict[str, Any]:
    """`["learning_rate=1e-3", …]` → fields; values are JSON where they parse, else text.

    Raises `InputError` for an entry without `=` and for a name that is not in `known`; those `of_pretraining` have been
    decided there.
    """
    fields = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: write it as field=value")
        if name not in known and name in of_pretraining:
            raise InputError(f"--set {name}: is decided in pre-training; pre-train with it and start from it")
        if name not in known:
            raise InputError(f"--set {name}: unknown field{did_you_mean(name, known)}")
        try:
            fields[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            fields[name] = value
    return fields


def check_same(saved: Mapping[str, Any], config: RunConfig, identity: Mapping[str, Any]) -> None:
    """Raises `InputError` naming the first field in which a resumed run would differ from the one it continues.

    A field that is newer than the run is at its default there, which does what was done before there was the field.
    """
    asked = {**config.model_dump(), **identity}
    saved = {**{name: field.default for name, field in type(config).model_fields.items()}, **saved}
    for name in [*asked, *(saved.keys() - asked.keys())]:
        if saved.get(name) == asked.get(name) or name in HARMLESS:
            continue
        if name == "data_hash":
            raise InputError("--resume: the stores are not those of the run, or have changed since; use another --out")
        raise InputError(
            f"--resume: {name} is {asked.get(name)}, but the run was started with {saved.get(name)}; "
            "use the same, or another --out"
        )


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate of update number `step` (from 0): linear warm-up, then decay to 0 after the last, linear or cosine.

    The authors' fine-tuning (`schedule="reference"`) steps a cosine of half-period `epochs` after every batch.
    """
    schedule = config.schedule if isinstance(config, FinetuneConfig) else "linear"
    if isinstance(config, FinetuneConfig) and schedule == "reference":
        return config.learning_rate * (1 + math.cos(math.pi * step / config.epochs)) / 2
    warmup = config.warmup_ratio * config.steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    left = (config.steps - step) / max(config.steps - warmup, 1)
    return config.learning_rate * (left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
