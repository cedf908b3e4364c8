"""The authors' checkpoints (`states-*.ckpt`, 2021) as `from_pretrained` folders, and their task heads.

Their checkpoints are pickles, which can run any code when they are read. Here torch's restricted unpickler reads them,
two classes of theirs that it meets on the way are replaced by an empty one, and every other class is refused.

Every weight is accounted for: each goes to one place of ours, or is known to be without effect. What has none in their
model: the second row of both token-type embeddings, which no input selects; `position_ids`, which only count; and
second names of tied weights. All of them are checked before they are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctal.configuration_ctal import CtalAudioConfig, CtalConfig, CtalTextConfig
from ctal.errors import InputError, did_you_mean
from ctal.feature_extraction_ctal import CtalFeatureExtractor
from ctal.files import folder_aside, sha256_of
from ctal.modeling_ctal import CtalForPreTraining, CtalForSequenceClassification, CtalForXVector
from ctal.processing_ctal import CtalProcessor
from ctal.text import load_original_tokenizer


@dataclass(frozen=True, slots=True)
class OriginalCheckpoint:
    """What is of use in a checkpoint of the authors' pre-training, under their names."""

    config: dict[str, Any]
    """Their YAML file: sections `semantic`, `acoustic` and others."""
    text: dict[str, Tensor]
    """State of their `semantic_model`: text encoder and MLM head."""
    audio: dict[str, Tensor]
    """State of their `acoustic_model`: audio encoder and MCAM head."""
    step: int
    """Updates done."""


class _Inert:
    """Stands in for a class of the pickle; takes what the unpickler hands it, and keeps and does nothing."""

    def __setstate__(self, state: object) -> None:
        pass


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Inert, "argparse.Namespace"),
    (_Inert, "m2p_optimization.WarmupLinearSchedule"),
]

_PARTS = ("semantic_model", "acoustic_model", "Optimizer", "Global_step", "Settings")

_IMPLIED = {"hidden_act": "gelu", "downsample_rate": 1, "is_decoder": True, "add_cross_attention": True}
"""Fields of their sections that have no counterpart in `CtalConfig`, and the only value of each that it covers."""

_FEATURE_SIZE = 160
"""Log-mel and deltas, what they pre-trained with; the size does not tell other features apart."""

_FETCH = "fetch it again or give a checkpoint of the authors' pre-training"


def read_original_checkpoint(path: Path) -> OriginalCheckpoint:
    """Reads a checkpoint of the authors' pre-training without running any code from it.

    Both of torch's file formats are read, the zip file and the older bare pickle.

    Raises:
        InputError: Not such a file, damaged, or it refers to a class that has no place in it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a checkpoint of the authors' pre-training (states-*.ckpt)")
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle is a random programme for the unpickler's stack machine: it can end in any exception.
    except Exception as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(f"{path}: refers to '{refused[1]}', which could run code: refused; {_FETCH}") from None
        raise InputError(f"{path}: truncated, damaged or not a PyTorch checkpoint; {_FETCH}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dictionary; {_FETCH}")
    for name in content:
        if name not in _PARTS:
            raise InputError(f"{path}: holds '{name}', which pre-training does not save; {_FETCH}")
    settings, step = content.get("Settings"), content.get("Global_step")
    config = settings.get("Config") if isinstance(settings, dict) else None
    if not isinstance(config, dict):
        raise InputError(f"{path}: lacks Settings.Config, the sizes of the model; {_FETCH}")
    if not isinstance(step, int):
        raise InputError(f"{path}: lacks the number Global_step; {_FETCH}")
    text, audio = (_state(path, content, name) for name in ("semantic_model", "acoustic_model"))
    return OriginalCheckpoint(config, text, audio, step)


def model_from_original(checkpoint: OriginalCheckpoint) -> CtalForPreTraining:
    """The authors' model as one of ours, in evaluation mode, giving the same outputs.

    `audio_is_causal` is set, since their audio encoder was so, and attention dropout is 0 rather than their 0.1, which
    makes a difference in further training only (it is slower).

    Raises:
        InputError: A weight is missing, left over, or has the wrong shape or a value that is not finite, or the
            configuration asks for something that CTAL does not have.
    """
    config = _configuration(checkpoint.config)
    model = CtalForPreTraining(config)
    ours = model.state_dict()
    text = _Source("semantic_model", checkpoint.text)
    audio = _Source("acoustic_model", checkpoint.audio)

    embeddings = "roberta.embeddings"
    words = f"{embeddings}.word_embeddings.weight"
    state = {
        **_embeddings(text, embeddings, "ctal.text_encoder", ours),
        **text.take(ours, "ctal.text_encoder.word_embeddings.weight", words),
        **_head(text, "lm_head", "text_head", ours),
        **_embeddings(audio, "acoustic.embeddings", "ctal.audio_encoder", ours),
        **audio.linear(ours, "ctal.audio_encoder.dense", "acoustic.embeddings.dense"),
        **_head(audio, "am_head", "audio_head", ours),
    }
    text.check_equal("lm_head.decoder.weight", words)
    for i in range(config.text.num_hidden_layers):
        layer, place = f"roberta.encoder.layer.{i}", f"ctal.text_encoder.layers.{i}"
        state |= _self_attention(text, layer, place, ours) | _feed_forward(text, layer, place, ours)
    for i in range(config.audio.num_hidden_layers):
        layer, place = f"acoustic.encoder.layer.{i}", f"ctal.audio_encoder.layers.{i}"
        state |= _self_attention(audio, layer, place, ours) | _feed_forward(audio, layer, place, ours)
        state |= _cross_attention(audio, layer, place, ours)
    text.check_all_taken()
    audio.check_all_taken()
    model.load_state_dict(state)
    return model.eval()


def convert_checkpoint(path: Path, out: Path, tokenizer: Path | None = None) -> None:
    """Writes a checkpoint of the authors' pre-training as a `from_pretrained` folder.

    Args:
        path: Their `states-*.ckpt`.
        out: Folder to make; `CtalForPreTraining`, `CtalModel` and `CtalFeatureExtractor` load from it, and
            `CtalProcessor` when a tokenizer is given.
        tokenizer: Folder with their `vocab.json` and `merges.txt`.

    Raises:
        InputError: `out` is not empty, or something that cannot be read or converted; nothing is written then.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; give another output folder")
    checkpoint = read_original_checkpoint(path)
    try:
        model = model_from_original(checkpoint)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    extractor = CtalFeatureExtractor(max_frames=model.config.audio.max_frames)
    preprocessor = extractor
    if tokenizer is not None:
        bpe = load_original_tokenizer(tokenizer)
        if len(bpe) != model.config.text.vocab_size:
            raise InputError(
                f"{tokenizer}: has {len(bpe)} entries, the checkpoint {model.config.text.vocab_size}; "
                "give the tokenizer that the checkpoint was trained with"
            )
        bpe.model_max_length = model.config.text.max_tokens
        preprocessor = CtalProcessor(extractor, bpe)
    with folder_aside(out) as folder:
        model.save_pretrained(folder)
        preprocessor.save_pretrained(folder)
        card = _model_card(path, checkpoint.step, model, tokenizer is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")


def load_original_head(model: CtalForSequenceClassification | CtalForXVector, state: Mapping[str, Tensor]) -> None:
    """Puts the weights of an authors' task head into `model`, whose fusion and number of labels must be theirs.

    Args:
        state: Tensors by their names: `semantic_linear`, `acoustic_linear`, `acoustic_attention`, `fuse_linear` (each
            `.weight` and `.bias`) and `classifier.weight`, without those of a modality that the fusion does not use.

    Raises:
        InputError: A weight is missing, left over, or has the wrong shape.
    """
    names = {
        "head.text_dense": "semantic_linear",
        "head.audio_dense": "acoustic_linear",
        "head.audio_attention": "acoustic_attention",
        "head.dense": "fuse_linear",
        "classifier": "classifier",
    }
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("ctal.")}
    source = _Source("head", state)
    taken: dict[str, Tensor] = {}
    for name in ours:
        module, _, field = name.rpartition(".")
        if module not in names:
            raise InputError(f"fusion='{model.config.fusion}' has the weight '{name}', which no head of theirs has")
        taken |= source.take(ours, name, f"{names[module]}.{field}")
    source.check_all_taken()
    model.load_state_dict(taken, strict=False)


def _state(path: Path, content: Mapping[str, Any], part: str) -> dict[str, Tensor]:
    """The state dict called `part`, its tensors dense, finite and float32 (counters stay integers)."""
    state = content.get(part)
    if not isinstance(state, dict):
        raise InputError(f"{path}: lacks '{part}'; {_FETCH}")
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise InputError(f"{path}: {part} '{name}' is not a dense tensor; {_FETCH}")
        if not value.isfinite().all():
            raise InputError(f"{path}: {part} '{name}' has NaN or infinite values; give an earlier checkpoint")
        tensors[name] = value.float() if value.is_floating_point() else value
    return tensors


class _Source:
    """A state dict of theirs, from which every tensor is taken by name."""

    def __init__(self, part: str, state: Mapping[str, Tensor]) -> None:
        self.part = part
        self.state = state
        self.taken: set[str] = set()

    def get(self, name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """The tensor called `name`, which must have `shape`."""
        if name not in self.state:
            near = did_you_mean(name, self.state.keys() - self.taken).replace("did you mean", "there is")
            raise InputError(f"{self.part} lacks '{name}'{near}; {_FETCH}")
        tensor = self.state[name]
        if tensor.shape != shape:
            raise InputError(
                f"{self.part} '{name}' has shape {tuple(tensor.shape)}, not {tuple(shape)} as Settings.Config has it; "
                f"{_FETCH}"
            )
        self.taken.add(name)
        return tensor

    def take(self, ours: Mapping[str, Tensor], target: str, *names: str) -> dict[str, Tensor]:
        """`{target: the tensors called names, one below the other}`, in the shape that `ours` has there."""
        rows, *rest = ours[target].shape
        return {target: torch.cat([self.get(name, (rows // len(names), *rest)) for name in names])}

    def linear(self, ours: Mapping[str, Tensor], target: str, *names: str) -> dict[str, Tensor]:
        """`take` for the weights and the biases of linear layers, or of a LayerNorm."""
        return {
            key: tensor
            for field in ("weight", "bias")
            for key, tensor in self.take(ours, f"{target}.{field}", *(f"{name}.{field}" for name in names)).items()
        }

    def check_equal(self, name: str, other: str) -> None:
        """Takes `name`, which must hold the same values as `other`, already taken: they are tied in training."""
        if not torch.equal(self.get(name, self.state[other].shape), self.state[other]):
            raise InputError(f"{self.part} '{name}' differs from '{other}', to which it is tied; {_FETCH}")

    def check_all_taken(self) -> None:
        for name in self.state:
            if name not in self.taken:
                raise InputError(f"{self.part} '{name}' has no place in the model that Settings.Config makes; {_FETCH}")


def _embeddings(source: _Source, theirs: str, target: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    positions = source.take(ours, f"{target}.position_embeddings.weight", f"{theirs}.position_embeddings.weight")
    counter = f"{theirs}.position_ids"
    # Newer transformers do not save it.
    if counter in source.state:
        rows = len(ours[f"{target}.position_embeddings.weight"])
        if not torch.equal(source.get(counter, (1, rows)), torch.arange(rows)[None]):
            raise InputError(f"{source.part} '{counter}' does not count from 0; {_FETCH}")
    (width,) = ours[f"{target}.token_type_embedding"].shape
    token_types = source.get(f"{theirs}.token_type_embeddings.weight", (2, width))
    return {
        **positions,
        f"{target}.token_type_embedding": token_types[0],
        **source.linear(ours, f"{target}.norm", f"{theirs}.LayerNorm"),
    }


def _self_attention(source: _Source, theirs: str, target: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = (f"{theirs}.attention.self.{part}" for part in ("query", "key", "value"))
    return {
        **source.linear(ours, f"{target}.attention.query_key_value", *parts),
        **_residual(source, f"{theirs}.attention.output", f"{target}.attention.output", ours),
    }


def _cross_attention(source: _Source, theirs: str, target: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    theirs, target = f"{theirs}.crossattention", f"{target}.cross_attention"
    return {
        **source.linear(ours, f"{target}.query", f"{theirs}.self.query"),
        **source.linear(ours, f"{target}.key_value", f"{theirs}.self.key", f"{theirs}.self.value"),
        **_residual(source, f"{theirs}.output", f"{target}.output", ours),
    }


def _feed_forward(source: _Source, theirs: str, target: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        **source.linear(ours, f"{target}.feed_forward.dense", f"{theirs}.intermediate.dense"),
        **_residual(source, f"{theirs}.output", f"{target}.feed_forward.output", ours),
    }


def _residual(source: _Source, theirs: str, target: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        **source.linear(ours, f"{target}.dense", f"{theirs}.dense"),
        **source.linear(ours, f"{target}.norm", f"{theirs}.LayerNorm"),
    }


def _head(source: _Source, theirs: str, target: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {
        **source.linear(ours, f"{target}.dense", f"{theirs}.dense"),
        **source.linear(ours, f"{target}.norm", f"{theirs}.layer_norm"),
        **source.linear(ours, f"{target}.decoder", f"{theirs}.decoder"),
    }
    source.check_equal(f"{theirs}.bias", f"{theirs}.decoder.bias")
    return state


def _configuration(original: Mapping[str, Any]) -> CtalConfig:
    """Sizes and hidden dropout from their YAML; attention dropout is ours."""
    semantic, acoustic = (_section(original, name) for name in ("semantic", "acoustic"))
    audio_size = _size("acoustic", acoustic, "audio_size")
    if audio_size != _FEATURE_SIZE:
        raise InputError(
            f"acoustic.audio_size is {audio_size}; only checkpoints on the authors' {_FEATURE_SIZE} features are read"
        )
    return CtalConfig(
        text_config=CtalTextConfig(
            **_encoder_fields("semantic", semantic),
            vocab_size=_size("semantic", semantic, "vocab_size"),
        ),
        audio_config=CtalAudioConfig(
            **_encoder_fields("acoustic", acoustic),
            feature_size=audio_size,
            max_position_embeddings=_size("acoustic", acoustic, "max_position_embeddings"),
        ),
        audio_is_causal=True,
    )


def _section(original: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = original.get(name)
    if not isinstance(section, dict):
        raise InputError(f"Settings.Config lacks the section '{name}'; {_FETCH}")
    for field, value in _IMPLIED.items():
        if section.get(field, value) != value:
            raise InputError(f"{name}.{field} is {section[field]!r}; only checkpoints trained with {value!r} are read")
    return section


def _encoder_fields(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    rates = ("hidden_dropout_prob", "initializer_range")
    return {field: _size(name, section, field) for field in sizes} | {
        field: _rate(name, section, field) for field in rates
    }


def _size(name: str, section: Mapping[str, Any], field: str) -> int:
    value = section.get(field)
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name}.{field} is {value!r}, not a positive integer; {_FETCH}")
    return value


def _rate(name: str, section: Mapping[str, Any], field: str) -> float:
    value = section.get(field)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{name}.{field} is {value!r}, not a number from 0 to 1; {_FETCH}")
    return float(value)


def _model_card(path: Path, step: int, model: CtalForPreTraining, with_tokenizer: bool) -> str:
    checksum = sha256_of(path)
    text, audio = model.config.text, model.config.audio
    load = "CtalProcessor" if with_tokenizer else "CtalFeatureExtractor"
    return f"""---
library_name: transformers
tags: [ctal, speech, text, multimodal]
---
# CTAL, converted from the authors' checkpoint

Converted by `ctal convert` from `{path.name}` (SHA-256 `{checksum}`), a checkpoint of the authors' pre-training
(Li et al., *CTAL: Pre-training Cross-modal Transformer for Audio-and-Language Representations*, EMNLP 2021) after
{step:,} updates. The weights are theirs, unchanged; so are the terms under which they may be used.

- Text encoder: {text.num_hidden_layers} layers; audio encoder: {audio.num_hidden_layers} layers; hidden size \
{text.hidden_size}, {audio.num_attention_heads} heads, {model.num_parameters():,} parameters.
- Input: {audio.feature_size} features a frame, 80 frames a second, at most {audio.max_frames} frames; \
at most {text.max_tokens} tokens.
- `audio_is_causal` is true: the authors' audio encoder, unlike what their paper says, sees no later frame, and these
  weights were trained so.
- Attention dropout is 0 (the authors trained with it); set `attention_probs_dropout_prob` to train on as they did.
  Outputs in evaluation mode do not depend on it.

```python
from ctal import CtalModel, {load}

model = CtalModel.from_pretrained(folder)
{"processor" if with_tokenizer else "feature_extractor"} = {load}.from_pretrained(folder)
```
"""
