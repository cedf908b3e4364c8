"""Speech from espeak-ng: speakers, the library itself, and the room and noise around it.

espeak-ng is a C library with global state: one voice, one callback, not safe in threads. So it lives in worker
processes (`ctal.corpora.demo` starts them), each of which loads it once. It is GPL-3 and comes only with the `[demo]`
extra.
"""

import ctypes
import io
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import soundfile
import soxr
from scipy.signal import fftconvolve, lfilter

from ctal.corpora.demo.experiment import (
    BASE_PITCH_HERTZ,
    BASE_PITCH_RANGE,
    BASE_WORDS_PER_MINUTE,
    SPEAKER_DEVIATION,
    Prosody,
)
from ctal.errors import InputError

SAMPLE_RATE: Final = 16_000

VARIANTS: Final = {
    "male": ("m1", "m2", "m3", "m4", "m6", "m7"),
    "female": ("f1", "f2", "f3", "f4", "f5"),
}
"""espeak-ng's voice variants that sound like a person; whisper, robot, croak and klatt do not."""


@dataclass(frozen=True, slots=True)
class Speaker:
    """A voice, drawn from continuous parameters; everything but the variant is a real number."""

    name: str
    sex: str
    """`male` or `female`: which variants and which pitch."""
    variant: str
    """The espeak-ng variant whose voice quality is the starting point."""
    prosody: Prosody
    """How this speaker deviates in any style."""
    vocal_tract: float
    """Factor of all formant frequencies."""
    formants: tuple[float, ...]
    """Further factor of each of the formants 0 … 8."""
    tilt: float
    """Spectral tilt, the coefficient of 1 + tilt·z⁻¹: above 0 is darker."""


def draw_speaker(name: str, sex: str, generator: np.random.Generator) -> Speaker:
    """A random speaker of `sex`."""
    return Speaker(
        name=name,
        sex=sex,
        variant=str(generator.choice(VARIANTS[sex])),
        prosody=Prosody(*generator.normal(0, SPEAKER_DEVIATION).tolist()),
        vocal_tract=float(np.exp(generator.normal(0, 0.06))),
        formants=tuple(np.exp(generator.normal(0, 0.03, size=9)).tolist()),
        tilt=float(generator.normal(0, 0.2)),
    )


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker needs to make one sound file."""

    path: Path
    text: str
    speaker: Speaker
    prosody: Prosody
    """Style and jitter; the speaker's own deviation comes on top."""
    seed: tuple[int, ...]
    """Seeds the room and the noise."""


def require_espeak() -> None:
    """Raises `InputError` where the `[demo]` extra is not installed."""
    try:
        import espeakng_loader  # noqa: F401
    except ImportError as error:
        raise InputError("the demo corpus needs espeak-ng: pip install 'ctal[demo]'") from error


def espeak_version() -> str:
    """Version of the bundled espeak-ng; call it in a worker process only."""
    return _espeak().version


def make_file(job: Job) -> float:
    """Synthesises `job`, writes its FLAC (16 kHz, 16 bit), and returns seconds; call it in a worker process only.

    The file is written aside and renamed, so that one that exists is whole.
    """
    generator = np.random.default_rng(job.seed)
    prosody = Prosody(*np.add(job.speaker.prosody, job.prosody).tolist())
    wave = _espeak().speak(job.text, _voice(job.speaker, prosody), prosody)
    wave = _record(wave, job.speaker.tilt, generator)
    encoded = io.BytesIO()
    soundfile.write(encoded, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    job.path.parent.mkdir(parents=True, exist_ok=True)
    aside = job.path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_bytes(encoded.getvalue())
    aside.replace(job.path)
    return len(wave) / SAMPLE_RATE


def _record(wave_N: np.ndarray, tilt: float, generator: np.random.Generator) -> np.ndarray:
    """The voice as a microphone in some room hears it: channel, reverberation, noise and gain differ each time."""
    wave_N = np.asarray(lfilter([1.0, tilt + generator.normal(0, 0.04)], [1.0], wave_N))
    reverberation_seconds = generator.uniform(0.1, 0.35)
    time_M = np.arange(int(reverberation_seconds * SAMPLE_RATE)) / SAMPLE_RATE
    room_M = generator.normal(size=len(time_M)) * 10 ** (-3 * time_M / reverberation_seconds)
    direct_to_reverberant = 10 ** (generator.uniform(6, 15) / 10)
    room_M *= np.sqrt(1 / (direct_to_reverberant * np.sum(room_M**2)))
    room_M[0] += 1
    wave_N = fftconvolve(wave_N, room_M)[: len(wave_N)]

    colour = generator.uniform(0.4, 0.9)
    noise_N = np.asarray(lfilter([1.0], [1.0, -colour], generator.normal(size=len(wave_N))))
    signal_to_noise = 10 ** (generator.uniform(20, 35) / 10)
    wave_N = wave_N + noise_N * np.sqrt(np.mean(wave_N**2) / (signal_to_noise * np.mean(noise_N**2)))

    # Loudness tells nothing of the style: it is random, and the features are normalised per utterance anyhow.
    decibels = generator.uniform(-32, -22)
    wave_N = wave_N * 10 ** (decibels / 20) / np.sqrt(np.mean(wave_N**2))
    return np.clip(wave_N, -1, 1 - 2**-15)


def _voice(speaker: Speaker, prosody: Prosody) -> str:
    """An espeak-ng voice file: the variant with this speaker's formants and this utterance's pitch.

    https://github.com/espeak-ng/espeak-ng/blob/master/docs/voices.md describes the format.
    """
    pitch = BASE_PITCH_HERTZ[speaker.sex] * np.exp(prosody.pitch)
    half_width = np.exp(BASE_PITCH_RANGE * np.exp(prosody.pitch_range) / 2)
    lines = ["name ctal-demo", "language en", f"pitch {pitch / half_width:.0f} {pitch * half_width:.0f}"]
    for line in _variant(speaker.variant):
        if match := re.match(r"formant\s+(\d)\s+(\d+)(.*)", line):
            number, percent, rest = int(match[1]), int(match[2]), match[3]
            lines.append(f"formant {number} {percent * speaker.vocal_tract * speaker.formants[number]:.0f}{rest}")
        elif re.match(r"(flutter|roughness|stressAdd|stressAmp|breath|breathw|consonants|voicing)\s", line):
            lines.append(line)
    return "\n".join(lines) + "\n"


@cache
def _variant(name: str) -> tuple[str, ...]:
    import espeakng_loader

    path = Path(espeakng_loader.get_data_path()) / "voices" / "!v" / name
    return tuple(path.read_text(encoding="utf-8").splitlines())


class _Espeak:
    """libespeak-ng in retrieval mode: samples come by callback, nothing is played.

    Numbers are those of espeak-ng's `speak_lib.h`.
    """

    _RETRIEVAL, _DONT_EXIT = 1, 0x8000
    _RATE, _WORD_GAP = 1, 7
    _CHARS_UTF8 = 1

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self._rate = self._library.espeak_Initialize(self._RETRIEVAL, 0, data, self._DONT_EXIT)
        if self._rate <= 0:
            raise RuntimeError(f"espeak-ng does not start: espeak_Initialize gave {self._rate}")
        self._library.espeak_Info.restype = ctypes.c_char_p
        self.version: str = self._library.espeak_Info(None).decode()
        self._chunks: list[bytes] = []
        # Kept as attributes: ctypes frees a callback, and tempfile a folder, that nobody holds.
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(
            self._receive
        )
        self._library.espeak_SetSynthCallback(self._callback)
        self._folder = tempfile.TemporaryDirectory(prefix="ctal-espeak-")

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _events: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, text: str, voice: str, prosody: Prosody) -> np.ndarray:
        """(N,) float64 at 16 kHz, without the silence around it but for 50 ms."""
        path = Path(self._folder.name) / "voice"
        path.write_text(voice, encoding="ascii")
        self._check(self._library.espeak_ng_SetVoiceByFile(os.fsencode(path)))
        words_per_minute = np.clip(BASE_WORDS_PER_MINUTE * np.exp(prosody.rate), 80, 450)
        self._check(self._library.espeak_SetParameter(self._RATE, round(words_per_minute), 0))
        self._check(self._library.espeak_SetParameter(self._WORD_GAP, max(0, round(prosody.word_gap)), 0))
        self._chunks.clear()
        encoded = text.encode()
        self._check(self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, self._CHARS_UTF8, None, None))
        self._check(self._library.espeak_Synchronize())
        wave_N = np.frombuffer(b"".join(self._chunks), np.int16) / 2**15
        loud = np.flatnonzero(np.abs(wave_N) > 0.01)
        if not len(loud):
            raise RuntimeError(f"espeak-ng was silent on {text!r}")
        margin = self._rate // 20
        wave_N = wave_N[max(0, loud[0] - margin) : loud[-1] + margin]
        return soxr.resample(wave_N, self._rate, SAMPLE_RATE)

    @staticmethod
    def _check(status: int) -> None:
        if status != 0:
            raise RuntimeError(f"espeak-ng failed with status {status:#x}")


@cache
def _espeak() -> _Espeak:
    return _Espeak()
