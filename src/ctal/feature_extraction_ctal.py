"""`CtalFeatureExtractor`: recordings to acoustic features, the way transformers does it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, BatchFeature, SequenceFeatureExtractor

from ctal.audio import HOP_LENGTH, SAMPLING_RATE, FeatureType, checked_rate, num_frames, resample
from ctal.configuration_ctal import CtalConfig
from ctal.errors import InputError, did_you_mean
from ctal.features import (
    NUM_MEL,
    Cmvn,
    DeltaOrder,
    FrameSums,
    extract_features,
    extract_features_batch,
    feature_size,
)

Wave = np.ndarray | Tensor | Sequence[float]
"""One recording, mono, floating point, full scale ±1."""

Padding = Literal[True, False, "longest"]
"""transformers' names; without padding only a batch of equal lengths fits into a tensor."""

_OPTIONS = ("feature_type", "delta_order", "cmvn", "pitch")
"""Fields that `extract_features` takes."""
_DERIVED = ("feature_size", "sampling_rate", "padding_value", "padding_side", "return_attention_mask")
"""Attributes of every `SequenceFeatureExtractor` that follow from ours, so that they are not saved."""
_OF_A_SPEAKER = ("speaker_mean",)
"""What `for_speaker` adds, which is not the model's and is not saved either."""
_BOOKKEEPING = ("feature_extractor_type", "processor_class", "auto_map")
"""What transformers adds to a saved feature extractor."""


class CtalFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel features with deltas and, if wanted, pitch, normalised, at 80 (`mel`) or 100 (`fbank`) frames a second.

    Raises `InputError` for an unknown field or a value that it cannot have.
    """

    model_input_names = ["input_features", "feature_attention_mask"]  # noqa: RUF012 (as in the base class)

    def __init__(
        self,
        feature_type: FeatureType = "mel",
        delta_order: DeltaOrder = 1,
        cmvn: Cmvn | bool = "utterance",
        max_frames: int = 3000,
        pitch: bool = False,
        **kwargs: Any,
    ) -> None:
        """`max_frames` is what the model has positions for; longer recordings are refused or, if asked, truncated.
        `cmvn` may also be True, for `utterance`, or False, for `none`; with `speaker`, a recording's own mean is taken
        for its speaker's, unless recordings of the speaker are given (`for_speaker`). `pitch` adds the fundamental
        frequency, its delta and voicing (`ctal.pitch`)."""
        if isinstance(cmvn, bool):
            cmvn = "utterance" if cmvn else "none"
        fields = (*_OPTIONS, "max_frames")
        for name in kwargs:
            if name not in _BOOKKEEPING:
                raise InputError(f"{type(self).__name__} has no field '{name}'{did_you_mean(name, fields)}")
        if feature_type not in get_args(FeatureType):
            raise InputError(f"feature_type is '{feature_type}'; choose from {', '.join(get_args(FeatureType))}")
        if delta_order not in get_args(DeltaOrder):
            raise InputError(f"delta_order is {delta_order}; choose from 0, 1, 2")
        if cmvn not in get_args(Cmvn):
            hint = did_you_mean(str(cmvn), get_args(Cmvn))
            raise InputError(f"cmvn is '{cmvn}'{hint}; choose from {', '.join(get_args(Cmvn))}")
        if max_frames < 1:
            raise InputError(f"max_frames is {max_frames}; it must be at least 1")
        if not isinstance(pitch, bool):
            raise InputError(f"pitch is {pitch!r}; it is true or false")
        if pitch and feature_type != "mel":
            raise InputError(
                f"pitch: the windows of {feature_type} are too short for deep voices; use feature_type mel"
            )
        super().__init__(feature_size(delta_order, pitch), SAMPLING_RATE, padding_value=0.0, **kwargs)
        self.feature_type: FeatureType = feature_type
        self.delta_order: DeltaOrder = delta_order
        self.cmvn: Cmvn = cmvn
        self.max_frames = max_frames
        self.pitch = pitch
        self.speaker_mean: Tensor | None = None

    def __call__(
        self,
        audio: Wave | Sequence[Wave],
        sampling_rate: int | None = None,
        padding: Padding = True,
        truncation: bool = False,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Features of one recording or of a list of them, on the device where tensors lie.

        Returns `input_features` (B, T, `feature_size`) float32, 0 behind the last frame of each, and
        `feature_attention_mask` (B, T) int64. Resamples from `sampling_rate` (Hz, of all). Raises `InputError` when
        that is missing or unusable, for recordings longer than `max_frames` unless `truncation` cuts them, for unequal
        lengths without `padding`, and for what is not one channel of finite floating-point samples.
        """
        rate = checked_rate(sampling_rate, "audio")
        check_padding(padding)
        recordings = list(audio) if _is_batch(audio) else [audio]
        if not recordings:
            raise InputError("audio is an empty list; pass at least one recording")
        waves = [self._wave(each, rate, f"audio[{i}]", truncation) for i, each in enumerate(recordings)]
        features_BTD, lengths_B = extract_features_batch(waves, **self._options())
        mask_BT = torch.arange(features_BTD.shape[1], device=lengths_B.device) < lengths_B[:, None]
        if self.speaker_mean is not None:
            features_BTD = (features_BTD - self.speaker_mean.to(features_BTD.device)) * mask_BT[..., None]
        if not padding and not mask_BT.all():
            raise InputError("recordings of different lengths do not fit into one tensor; pass padding=True")
        return BatchFeature(
            {"input_features": features_BTD, "feature_attention_mask": mask_BT.long()}, tensor_type=return_tensors
        )

    @property
    def analysis(self) -> str:
        """A name of how features are made, for what is kept of them: extractors of one name give the same, but for a
        speaker that one of them knows."""
        normalised = {"utterance": "-cmvn", "none": ""}.get(self.cmvn, f"-{self.cmvn}")
        return f"{self.feature_type}-{self.delta_order}{normalised}{'-pitch' * self.pitch}"

    @property
    def parts(self) -> dict[str, slice]:
        """Which dimensions of a frame are log-mel (`static`), their deltas of all orders (`delta`), and `pitch`."""
        deltas_end = NUM_MEL * (1 + self.delta_order)
        ends = {"static": (0, NUM_MEL), "delta": (NUM_MEL, deltas_end), "pitch": (deltas_end, self.feature_size)}
        return {name: slice(start, end) for name, (start, end) in ends.items() if start < end}

    def features(self, wave: np.ndarray) -> Tensor:
        """Features (T, `feature_size`) float32 of one utterance (num_samples ≥ 1,) at 16 kHz, however long.

        For training data, whose lengths are planned beforehand and whose waves were checked when they were decoded.
        """
        features_TD = extract_features(torch.from_numpy(wave), **self._options())
        return features_TD if self.speaker_mean is None else features_TD - self.speaker_mean

    @property
    def is_by_speaker(self) -> bool:
        """Whether a speaker's mean is taken away."""
        return self.cmvn == "speaker"

    @property
    def uncentred(self) -> CtalFeatureExtractor:
        """The one whose features, less a speaker's mean, are those of this one: with `speaker` that of `fixed`, else
        itself."""
        if not self.is_by_speaker:
            return self
        other = copy(self)
        other.cmvn, other.speaker_mean = "fixed", None
        return other

    def for_speaker(self, recordings: Iterable[Wave], sampling_rate: int | None = None) -> CtalFeatureExtractor:
        """One like it for a speaker of whom `recordings`, of any lengths, are known (`sampling_rate` in Hz); it keeps
        their mean (D,) in `speaker_mean`, and is saved without it.

        The more they are, and the more moods they are of, the better how someone always sounds is told from how they
        sound now. Raises `InputError` for no recording, for what `__call__` does not take, and where features are not
        normalised by the speaker.
        """
        rate = checked_rate(sampling_rate, "recordings of the speaker")
        if not self.is_by_speaker:
            raise InputError(
                f"recordings of the speaker: the model does not normalise by them (its cmvn is {self.cmvn}); give none"
            )
        options = self.uncentred._options()
        sums = FrameSums.of(
            extract_features(self._checked(recording, rate, f"recording {number} of the speaker"), **options)
            for number, recording in enumerate(recordings)
        )
        if sums is None:
            raise InputError("recordings of the speaker: none is given; give at least one")
        other = copy(self)
        other.speaker_mean = sums.mean()
        return other

    def _options(self) -> dict[str, Any]:
        """Those of `extract_features`, before a known speaker's mean is taken away."""
        source = self if self.speaker_mean is None else self.uncentred
        return {name: getattr(source, name) for name in _OPTIONS}

    def to_dict(self) -> dict[str, Any]:
        """The fields of the constructor and the class."""
        return {name: value for name, value in super().to_dict().items() if name not in _DERIVED + _OF_A_SPEAKER}

    def _wave(self, recording: Any, sampling_rate: int, name: str, truncation: bool) -> Tensor:
        """One checked wave (num_samples,) float32 at 16 kHz, of at most `max_frames`."""
        wave = self._checked(recording, sampling_rate, name)
        if num_frames(len(wave), self.feature_type) > self.max_frames:
            hop = HOP_LENGTH[self.feature_type]
            if not truncation:
                raise InputError(
                    f"{name} is {len(wave) / SAMPLING_RATE:.1f} s long, more than {self.max_frames} frames "
                    f"({self.max_frames * hop / SAMPLING_RATE:.1f} s); split it or pass truncation=True"
                )
            wave = wave[: self.max_frames * hop - 1]
        return wave

    def _checked(self, recording: Any, sampling_rate: int, name: str) -> Tensor:
        """(num_samples,) float32 at 16 kHz, however long."""
        wave = recording
        if not isinstance(wave, Tensor):
            values = np.array(wave)
            if values.dtype.kind not in "biuf":
                raise InputError(f"{name} is {values.dtype}, not samples; `ctal.audio.load_audio` reads a file")
            wave = torch.from_numpy(values)
        if wave.ndim != 1 or len(wave) == 0:
            raise InputError(f"{name} has shape {tuple(wave.shape)}; pass one channel, (samples,), of at least one")
        if not wave.is_floating_point():
            raise InputError(f"{name} has {wave.dtype} samples; pass floating point, scaled to ±1")
        if not wave.isfinite().all():
            raise InputError(f"{name} has NaN or infinite samples; leave it out")
        if sampling_rate != SAMPLING_RATE:
            resampled = resample(wave.detach().float().cpu().numpy(), sampling_rate)
            wave = torch.from_numpy(resampled).to(wave.device)
        return wave.float()


def check_padding(padding: Padding) -> None:
    """Raises `InputError` for another of transformers' ways to pad, which would give another shape than asked for."""
    if padding not in get_args(Padding):
        raise InputError(f"padding is {padding!r}; pass True, to the longest of the batch, or False")


def _is_batch(audio: Any) -> bool:
    """Whether it is a sequence of recordings; an array is always one recording, a list of numbers too."""
    return isinstance(audio, (list, tuple)) and not (audio and np.isscalar(audio[0]))


AutoFeatureExtractor.register(CtalConfig, CtalFeatureExtractor, exist_ok=True)
