"""Architecture of CTAL models: everything that travels with the weights.

Sizes follow the paper (section 4.1): text + audio layers are 3+3 (tiny), 6+6 (base), 12+12 (large). `mini` and `nano`
are ours, for laptops and for tests.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ctal.errors import InputError, did_you_mean
from ctal.fusion import FUSIONS

_INHERITED = (
    *("name_or_path", "_name_or_path", "_commit_hash", "torch_dtype", "num_labels", "attn_implementation"),
    *("output_attentions", "experts_implementation", "model_type", "use_cache"),
)
"""Keyword arguments that transformers itself passes to a configuration beside its declared fields; `use_cache` is what
its `Trainer` leaves behind."""


class _CheckedConfig(PreTrainedConfig):
    """Refuses unknown fields, which transformers would accept silently, and so hides misspelt ones."""

    def __post_init__(self, **kwargs: Any) -> None:
        known = {name for name in self.__dataclass_fields__ if not name.startswith("_")}
        for name in kwargs:
            if name not in known and name not in _INHERITED:
                raise InputError(f"{type(self).__name__} has no field '{name}'{did_you_mean(name, known)}")
        super().__post_init__(**kwargs)


class _EncoderConfig(_CheckedConfig):
    hidden_size: int = 768
    """Width of every layer; the same in both encoders."""
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    """Width of the feed-forward layer."""
    hidden_dropout_prob: float = 0.1
    """Dropout after embeddings, attention and feed-forward layers, in training."""
    attention_probs_dropout_prob: float = 0.0
    """Dropout of attention weights, in training. The paper has 0.1; other values than 0 are slower."""
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, value in {**vars(_EncoderConfig), **vars(type(self))}.items():
            if isinstance(value, bool):
                _check_bool(name, getattr(self, name))
            elif isinstance(value, int | float) and name in architecture_fields():
                _check_range(name, getattr(self, name), whole=isinstance(value, int))
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )


class CtalTextConfig(_EncoderConfig):
    """The text encoder: RoBERTa."""

    model_type = "ctal_text"
    base_config_key = "text_config"

    vocab_size: int = 30_000
    max_position_embeddings: int = 512
    """Learned positions; they start behind `pad_token_id`, so 512 serve 510 tokens."""
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    unk_token_id: int = 3
    mask_token_id: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.max_tokens < 3:
            raise InputError(
                f"max_position_embeddings={self.max_position_embeddings}: leaves {max(0, self.max_tokens)} for tokens, "
                "where <s>, </s> and one between them need 3"
            )

    @property
    def max_tokens(self) -> int:
        """Longest text in tokens, `<s>` and `</s>` included."""
        return self.max_position_embeddings - self.pad_token_id - 1


class CtalAudioConfig(_EncoderConfig):
    """The audio encoder: self-attention over frames, cross-attention to the last text state."""

    model_type = "ctal_audio"
    base_config_key = "audio_config"

    feature_size: int = 160
    """Dimensions of a frame."""
    cmvn: str = "utterance"
    """What a new model's features are normalised by: `utterance`: each recording's own mean and deviation, as the
    authors' are; `fixed`: constants, so that how loud and how coloured a voice is stays in them; `level`: the same once
    every recording is as loud, so that only its colour stays; `speaker`: as `fixed`, and then less the mean over the
    speaker's recordings, so that how they differ from how they always sound stays, for emotions (docs/results.md).
    Of a recording that `ctal predict` cuts, every window counts as a recording, but for `speaker`."""
    pitch: bool = False
    """A new model also sees how high a voice is: fundamental frequency, its delta and voicing beside log-mel
    (docs/results.md)."""
    max_position_embeddings: int = 3000
    """Learned positions, one a step of `frame_stack` frames."""
    frame_stack: int = 1
    """Neighbouring frames that are joined before the first linear layer: 1, 2 or 4."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.frame_stack not in (1, 2, 4):
            raise InputError(f"frame_stack must be 1, 2 or 4, not {self.frame_stack}")
        # Masks write zeros, which are the mean of what is normalised.
        _check_choice("cmvn", self.cmvn, ("utterance", "level", "fixed", "speaker"))

    @property
    def max_frames(self) -> int:
        """Longest audio in frames."""
        return self.max_position_embeddings * self.frame_stack


class CtalConfig(_CheckedConfig):
    """A CTAL model: a text encoder and an audio encoder that sees its last state."""

    model_type = "ctal"
    sub_configs_defaults = {  # noqa: RUF012
        "text_config": SubConfigSpec(CtalTextConfig),
        "audio_config": SubConfigSpec(CtalAudioConfig),
    }
    keys_to_ignore_at_inference = ["text_hidden_state", "audio_hidden_state", "cross_attentions"]  # noqa: RUF012

    text_config: dict | CtalTextConfig | None = None
    audio_config: dict | CtalAudioConfig | None = None
    audio_is_causal: bool = False
    """A frame sees itself and earlier frames only. The authors' code does this by accident (docs/parity.md)."""
    audio_sees_text: bool = True
    """The audio encoder attends to the last state of the text; without it the encoders never meet below the head."""
    position_init: str = "sinusoidal"
    """How a new model's learned positions start: as sinusoids as large as what they are added to, or `normal`, as in
    RoBERTa and the authors' code. Sinusoids find the way from sound to words in half the steps (docs/results.md)."""
    tie_word_embeddings: bool = True
    """The MLM decoder shares the word embeddings' weights; transformers reads it from the top level only."""

    fusion: str = "orthogonal"
    """How a task's head combines text and audio: `orthogonal` (the paper's), `orthogonal_attended` (that without
    max-pooling), `concat`, `text`, `audio`, `gated` or `tensor`."""
    audio_pooling: str = "max"
    """Beside what a task's head attends to of the audio: its maximum (`max`, the paper's), its deviation over time
    (`statistics`: attentive statistics pooling, Okabe et al., 2018), or how pitch and voicing are spread and how fast
    the words come, in twelve numbers (`prosody`, for a model with `pitch`; docs/results.md). The fusions `text`,
    `concat` and `orthogonal_attended` look at none."""
    use_weighted_layer_sum: bool = False
    """A task's head sees a weighted sum of the states of all layers, with weights that it learns (SUPERB, Yang et al.,
    2021), not those of the last layer alone."""
    standardise_pools: bool = False
    """Each dimension of the head's pools is brought to mean 0 and variance 1 over the training utterances, as the first
    weights give them (docs/results.md)."""
    orthogonality_weight: float = 1.0
    """Of the orthogonality term in a task's loss; 0 leaves it out."""
    orthogonal_norm: str = "cosine"
    """`reference` divides by the audio's norm twice, as the authors' code does (docs/parity.md)."""
    head_dropout_prob: float = 0.1
    """Dropout of the fused vector in training. The authors' code builds it without applying it."""
    label_smoothing: float = 0.0
    """Share of an emotion's label, a speaker's, or a score's with `histogram`, that is spread over all classes in
    training (Szegedy et al., 2016), so that less is learned by heart."""
    regression_loss: str = "l1"
    """Of a score, such as sentiment: `l1` (the paper's), `mse`, the squared error, or `histogram`: cross-entropy over
    scores from -3 to 3, half a point apart, whose median is the answer (Imani and White, 2018). With `label_smoothing`
    less is learned by heart than with the other two (docs/results.md)."""
    speaker_loss: str = "softmax"
    """Of speaker verification: `softmax` (cross-entropy, the paper's) or `aam` (additive angular margin)."""
    speaker_margin: float = 0.2
    """Of `aam`, in radians (Deng et al., 2019); 0 for none."""
    speaker_scale: float = 30.0
    """Of `aam`: cosines are multiplied by it."""
    decision_threshold: float | None = None
    """Speaker verification: the cosine from which two recordings are taken for the same speaker's."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        choices = {
            "fusion": tuple(FUSIONS),
            "audio_pooling": ("max", "statistics", "prosody"),
            "orthogonal_norm": ("cosine", "reference"),
            "regression_loss": ("l1", "mse", "histogram"),
            "speaker_loss": ("softmax", "aam"),
            "position_init": ("sinusoidal", "normal"),
        }
        for name, allowed in choices.items():
            _check_choice(name, getattr(self, name), allowed)
        names = ("orthogonality_weight", "head_dropout_prob", "label_smoothing", "speaker_margin", "speaker_scale")
        for name in names:
            _check_range(name, getattr(self, name), whole=False)
        if self.audio_pooling == "prosody" and not self.audio.pitch:
            raise InputError(
                "audio_pooling='prosody' is for a model whose features have pitch: pre-train one with --set pitch=true"
            )
        for name, kind in CtalConfig.__annotations__.items():
            if kind == "bool":
                _check_bool(name, getattr(self, name))
        if self.text.hidden_size != self.audio.hidden_size:
            raise InputError(
                f"hidden_size differs: {self.text.hidden_size} in text_config, {self.audio.hidden_size} in audio_config"
            )

    @property
    def text(self) -> CtalTextConfig:
        """`text_config`, typed."""
        assert isinstance(self.text_config, CtalTextConfig)
        return self.text_config

    @property
    def audio(self) -> CtalAudioConfig:
        """`audio_config`, typed."""
        assert isinstance(self.audio_config, CtalAudioConfig)
        return self.audio_config

    def architecture(self) -> dict[str, Any]:
        """All that decides what the encoders compute, by name."""
        parts = {"text_config": self.text, "audio_config": self.audio}
        whole = [name for name in architecture_fields() if owners_of(name) == ["both"]]
        own = {name: getattr(self, name) for name in whole if name not in (*HEAD_FIELDS, "decision_threshold")}
        fields = [name for name in architecture_fields() if name not in whole]
        return own | {
            f"{part}.{name}": getattr(config, name)
            for part, config in parts.items()
            for name in fields
            if hasattr(config, name)
        }

    def head(self) -> dict[str, Any]:
        """All that decides what a task's head computes and how it is trained, by name."""
        return {name: getattr(self, name) for name in HEAD_FIELDS}

    @property
    def hidden_size(self) -> int:
        return self.text.hidden_size

    @property
    def size(self) -> str:
        """The name in `SIZES` of the nearest size that is not smaller; the largest for a larger one."""
        names = sorted(SIZES, key=lambda name: (SIZES[name]["hidden_size"], SIZES[name]["num_hidden_layers"]))
        own = (self.hidden_size, self.text.num_hidden_layers)
        enough = (name for name in names if (SIZES[name]["hidden_size"], SIZES[name]["num_hidden_layers"]) >= own)
        return next(enough, names[-1])

    @classmethod
    def of_size(cls, size: str, **overrides: Any) -> CtalConfig:
        """The configuration called `size` (see `SIZES`), with fields replaced.

        An override is a field of `CtalConfig`, of one encoder, or of both, for example `vocab_size=300`,
        `frame_stack=2` or `hidden_dropout_prob=0`. Raises `InputError` for an unknown size or field.
        """
        if size not in SIZES:
            raise InputError(f"unknown size '{size}'{did_you_mean(size, SIZES)}: choose from {', '.join(SIZES)}")
        text, audio, top = dict(SIZES[size]), dict(SIZES[size]), {}
        for name, value in overrides.items():
            owners = owners_of(name)
            if not owners:
                raise InputError(f"no model field '{name}'{did_you_mean(name, architecture_fields())}")
            for owner in owners:
                {"text encoder": text, "audio encoder": audio, "both": top}[owner][name] = value
        return cls(text_config=text, audio_config=audio, **top)


def _check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name}='{value}'{did_you_mean(str(value), allowed)}: use {', '.join(allowed)}")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r}: must be true or false")


def _check_range(name: str, value: Any, *, whole: bool) -> None:
    """Counts are whole and at least 1 (ids 0), dropout and smoothing are shares below 1, other numbers are positive."""
    if whole:
        lowest = 0 if name.endswith("_token_id") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise InputError(f"{name}={value!r}: must be a whole number of at least {lowest}")
    elif not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{name}={value!r}: must be a number")
    elif name.endswith(("dropout_prob", "smoothing")) and not 0 <= value < 1:
        raise InputError(f"{name}={value}: must be at least 0 and below 1")
    elif name in ("orthogonality_weight", "speaker_margin") and not 0 <= value < float("inf"):
        raise InputError(f"{name}={value}: must be at least 0")
    elif not name.endswith(("dropout_prob", "smoothing", "weight", "margin")) and not 0 < value < float("inf"):
        raise InputError(f"{name}={value}: must be above 0")


def _size(layers: int, hidden: int, heads: int, ffn: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
    }


SIZES: dict[str, dict[str, int]] = {
    "nano": _size(2, 64, 2, 128),
    "mini": _size(3, 256, 4, 1024),
    "tiny": _size(3, 768, 12, 3072),
    "base": _size(6, 768, 12, 3072),
    "large": _size(12, 768, 12, 3072),
}
"""Name → fields that both encoders share."""


def architecture_fields() -> dict[str, Any]:
    """Names that `CtalConfig.of_size` accepts as overrides, with their defaults."""
    kinds = (_EncoderConfig, CtalTextConfig, CtalAudioConfig, CtalConfig)
    return {
        name: getattr(kind, name) for kind in kinds for name in kind.__annotations__ if not name.endswith("_config")
    }


HEAD_FIELDS = (
    *("fusion", "audio_pooling", "use_weighted_layer_sum", "standardise_pools"),
    *("orthogonality_weight", "orthogonal_norm", "head_dropout_prob"),
    *("label_smoothing", "regression_loss", "speaker_loss", "speaker_margin", "speaker_scale"),
)
"""Fields of `CtalConfig` that concern the head of a task alone."""

ONE_TASKS_FIELDS = {
    "regression_loss": "sentiment",
    **dict.fromkeys(("speaker_loss", "speaker_margin", "speaker_scale"), "verification"),
}
"""Those of `HEAD_FIELDS` that change nothing but for one task."""


def settable_fields() -> dict[str, Any]:
    """`architecture_fields` of the encoders, without those that follow from the tokenizer, the features or a task."""
    fitted = ("vocab_size", "feature_size", "tie_word_embeddings", "decision_threshold", *HEAD_FIELDS)
    return {
        name: default
        for name, default in architecture_fields().items()
        if name not in fitted and not name.endswith("_token_id")
    }


def meanings() -> dict[str, str]:
    """What the fields that have more to say than their name say below it in this file."""
    said: dict[str, list[str]] = {}
    for kind in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        for field, below in pairwise(kind.body if isinstance(kind, ast.ClassDef) else ()):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    said.setdefault(name, []).append(" ".join(text.split()))
    return {name: " ".join(texts) for name, texts in said.items()}


def owners_of(name: str) -> list[str]:
    """Which parts of the model have the field `name`: `text encoder`, `audio encoder` or `both` (as a whole)."""
    if name in CtalConfig.__annotations__:
        return ["both"]
    kinds = {"text encoder": CtalTextConfig, "audio encoder": CtalAudioConfig}
    return [
        owner for owner, kind in kinds.items() if name in kind.__annotations__ or name in _EncoderConfig.__annotations__
    ]


AutoConfig.register("ctal", CtalConfig)
