"""Recordings: bytes of a sound file in, 16 kHz mono samples out.

Numpy only, so that the store and its workers never import torch; the features are in `ctal.features`.
What libsndfile lets through and would only hurt later (no samples, NaN, a file cut short, absurd rates) is
refused here, in one line that names the file.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

from ctal.errors import InputError

SAMPLING_RATE = 16_000
"""Hz; everything behind `load_audio` is at this rate."""

UNREADABLE = {".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".3gp", ".mka"}
"""How recordings are named that libsndfile does not read."""

FeatureType = Literal["mel", "fbank"]

HOP_LENGTH: dict[FeatureType, int] = {"mel": 200, "fbank": 160}
"""Samples at `SAMPLING_RATE` from one frame to the next: 80 frames a second for `mel`, 100 for `fbank`."""

SAMPLING_RATES = (4_000, 384_000)
"""The lowest and the highest that a recording may have."""
_MAX_CHANNELS = 8
_MAX_PEAK = 2.0**31
"""Full scale of 32-bit integers kept as floats; beyond it, powers overflow float32."""
_BLOCK = 1 << 20
_UNKNOWN_LENGTH = 1 << 62
"""libsndfile reports about 2⁶³ frames for a streamed FLAC, whose end it then cannot tell from a fault."""
_STREAMED_WAV = 0x7FFF_F000
"""Sizes from here on are what sox and ffmpeg write into a WAV header when they cannot seek back to it."""
_MP3_LENGTHS = (b"Xing", b"Info", b"VBRI")
"""What the first frame of an MP3 has where it tells how many follow; else libsndfile estimates it, often too high."""


def decode_audio(source: bytes | Path, name: str | None = None) -> tuple[np.ndarray, int]:
    """Samples of a WAV, FLAC, OGG or MP3 file (or anything else that libsndfile reads), channels averaged.

    `name` is what errors call the recording, by default its path. Returns (num_samples,) float32, full scale ±1,
    and the file's own sampling rate in Hz. Raises `InputError` for a file that is missing, not audio, damaged,
    cut short (as far as the format tells: an MP3 without a length and an OGG do not) or without samples, for NaN,
    infinite or absurdly large samples, and for rates outside 4–384 kHz or more than 8 channels.
    """
    if isinstance(source, Path):
        name = name or str(source)
        try:
            source = source.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{name}: no such file; check the path") from None
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({error.strerror}); check the path and its rights") from None
    name = name or "audio in memory"
    if not source:
        raise InputError(f"{name}: the file is empty; fetch it again or leave it out")

    try:
        with soundfile.SoundFile(io.BytesIO(source)) as file:
            _check_format(file, name)
            wave = _read_mono(file)
            promised = file.frames if file.format != "MP3" or _mp3_tells_its_length(source) else 0
    except soundfile.LibsndfileError as error:
        reason = error.error_string.removeprefix("Error : ").rstrip(".")
        if Path(name).suffix.lower() in UNREADABLE:
            reason = f"in a format that is not read ({reason}); convert it to WAV or FLAC, for example with ffmpeg"
            raise InputError(f"{name}: {reason}") from None
        raise InputError(
            f"{name}: not audio, cut short or damaged ({reason}); fetch it again or leave it out"
        ) from None

    if _is_short_wav(source) or len(wave) < promised:
        raise InputError(f"{name}: cut short, its header promises more samples than it has; fetch it again")
    if len(wave) == 0:
        raise InputError(f"{name}: has no samples; record it again or leave it out")
    peak = np.abs(wave).max()
    if not np.isfinite(peak):
        raise InputError(f"{name}: has NaN or infinite samples; write it again from its source or leave it out")
    if peak > _MAX_PEAK:
        raise InputError(f"{name}: has samples as large as {peak:.1e}; scale it to ±1")
    return wave, file.samplerate


def resampled_length(num_samples: int, sampling_rate: int, target: int = SAMPLING_RATE) -> int:
    """Number of samples after `resample`: the exact ratio, rounded up, as in librosa."""
    return -(-num_samples * target // sampling_rate)


def resample(wave: np.ndarray, sampling_rate: int, target: int = SAMPLING_RATE) -> np.ndarray:
    """`wave` (num_samples,) at `target` Hz: (`resampled_length`,) float32, by soxr at its HQ setting.

    That is what `librosa.load` does by default and what the authors' features were computed from.
    """
    if sampling_rate == target:
        return wave
    resampled = soxr.resample(wave, sampling_rate, target, quality="HQ")
    # soxr rounds to nearest; a last partial sample is kept as a zero, so that the length follows from the index.
    length = resampled_length(len(wave), sampling_rate, target)
    return np.pad(resampled[:length], (0, max(0, length - len(resampled))))


def load_audio(source: bytes | Path, name: str | None = None) -> np.ndarray:
    """`decode_audio`, then `resample`: (num_samples,) float32 at `SAMPLING_RATE`. Raises `InputError`."""
    return resample(*decode_audio(source, name))


def num_frames(num_samples: int, feature_type: FeatureType = "mel") -> int:
    """Feature frames of `num_samples` ≥ 1 samples at `SAMPLING_RATE`; the first frame is centred on sample 0."""
    return 1 + num_samples // HOP_LENGTH[feature_type]


def checked_rate(sampling_rate: float | None, name: str) -> int:
    """A sampling rate that comes with samples; raises `InputError` for none, or one outside 4–384 kHz or not whole."""
    if sampling_rate is None:
        raise InputError(f"{name}: sampling_rate is not given; pass that of the samples, for example {SAMPLING_RATE}")
    low, high = SAMPLING_RATES
    if not low <= sampling_rate <= high or sampling_rate != int(sampling_rate):
        raise InputError(f"{name}: a sampling rate of {sampling_rate} Hz; give a whole number from {low} to {high}")
    return int(sampling_rate)


def _check_format(file: soundfile.SoundFile, name: str) -> None:
    low, high = SAMPLING_RATES
    if not low <= file.samplerate <= high:
        raise InputError(f"{name}: a sampling rate of {file.samplerate} Hz, outside {low}–{high}; correct its header")
    if file.frames >= _UNKNOWN_LENGTH:
        raise InputError(f"{name}: its header leaves the length open (a streamed FLAC); write it again with its length")
    if file.channels > _MAX_CHANNELS:
        raise InputError(f"{name}: {file.channels} channels, more than {_MAX_CHANNELS}; mix it down first")


def _read_mono(file: soundfile.SoundFile) -> np.ndarray:
    """Block by block: a header that promises a terabyte must not be believed before the samples are there."""
    blocks: list[np.ndarray] = [np.empty(0, np.float32)]
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block[:, 0] if file.channels == 1 else block.mean(axis=1))
    return np.concatenate(blocks)


def _mp3_tells_its_length(data: bytes) -> bool:
    start = 0
    if data[:3] == b"ID3":  # titles and pictures come first, their size in seven bits a byte
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    first_frame = data[start : start + 1024]
    return any(name in first_frame for name in _MP3_LENGTHS)


def _is_short_wav(data: bytes) -> bool:
    """Whether a RIFF/WAVE file ends before its data chunk does, which libsndfile hides by correcting the length."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return False
    position = 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"data":
            return position + 8 + size > len(data) and size < _STREAMED_WAV
        position += 8 + size + size % 2  # chunks start at even positions
    return False
