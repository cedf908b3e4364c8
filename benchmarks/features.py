"""Log-mel features with deltas, normalised: ours beside librosa's functions, of which the authors' code consists."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import librosa
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.harness import Check, Report, Spread, Table, alternate, times_faster
from benchmarks.samples import librispeech_like_seconds, speech_like
from ctal.audio import SAMPLING_RATE
from ctal.features import extract_features

DIFFERENCE_LIMIT = 1e-3
_WORKERS = 2


def librosa_features(wave: np.ndarray) -> np.ndarray:
    """(samples,) at 16 kHz → (T, 160), as the authors compute them."""
    power = librosa.feature.melspectrogram(
        y=wave, sr=SAMPLING_RATE, n_fft=2048, win_length=800, hop_length=200, n_mels=80, pad_mode="constant"
    )
    static = np.log(power + 1e-6)
    both = np.concatenate([static, librosa.feature.delta(static)])
    return ((both - both.mean(1, keepdims=True)) / both.std(1, keepdims=True)).T


def our_features(wave: np.ndarray) -> np.ndarray:
    return extract_features(torch.from_numpy(wave)).numpy()


def our_features_with_pitch(wave: np.ndarray) -> np.ndarray:
    """(samples,) at 16 kHz → (T, 163)."""
    return extract_features(torch.from_numpy(wave), pitch=True).numpy()


Extract = Callable[[np.ndarray], np.ndarray]


@cache
def _waves(count: int, scale: float) -> list[np.ndarray]:
    """Made once in each process."""
    return [speech_like(scale * length, number) for number, length in enumerate(librispeech_like_seconds(count))]


def _extract_all(extract: Extract, count: int, scale: float, part: slice) -> int:
    """Frames of a part of the recordings, on one thread."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        return sum(len(extract(wave)) for wave in _waves(count, scale)[part])


def _in_workers(pool: ProcessPoolExecutor, extract: Extract, count: int, scale: float) -> None:
    parts = [slice(first, None, _WORKERS) for first in range(_WORKERS)]
    list(pool.map(_extract_all, [extract] * _WORKERS, [count] * _WORKERS, [scale] * _WORKERS, parts))


def main(quick: bool) -> Report:
    """Of recordings as long as LibriSpeech's, one at a time."""
    report = Report("features")
    count, scale, rounds = (6, 0.1, 2) if quick else (48, 1.0, 7)
    waves = _waves(count, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # librosa warns of short waves
        difference = max(float(np.abs(our_features(wave) - librosa_features(wave)).max()) for wave in waves)
    report.checks.append(Check("largest difference from librosa's features", difference, DIFFERENCE_LIMIT))

    baseline = "librosa, one thread"
    everything, threads = slice(None), torch.get_num_threads()
    with ProcessPoolExecutor(_WORKERS, get_context("spawn")) as pool:
        contenders = {
            baseline: lambda: _extract_all(librosa_features, count, scale, everything),
            "ours, one thread": lambda: _extract_all(our_features, count, scale, everything),
            "ours with pitch, one thread": lambda: _extract_all(our_features_with_pitch, count, scale, everything),
            f"librosa, {_WORKERS} workers": lambda: _in_workers(pool, librosa_features, count, scale),
            f"ours, {_WORKERS} workers": lambda: _in_workers(pool, our_features, count, scale),
        }
        for work in contenders.values():  # workers start, import and make their recordings
            work()
        seconds = alternate(contenders, rounds)
    torch.set_num_threads(threads)
    total = sum(len(wave) for wave in waves) / SAMPLING_RATE
    rows = []
    for name, each in seconds.items():
        alone = name.replace(f"{_WORKERS} workers", "one thread")
        rate = Spread.of(total / value for value in each)
        rows.append(
            (name, *map(str, (rate, times_faster(seconds[baseline], each), times_faster(seconds[alone], each))))
        )
    columns = ("", "times real time", "times the first row", "times one thread of the same")
    report.tables.append(Table(f"Features of {count} recordings, {total / 60:.1f} min", columns, rows))
    report.notes.append("from samples to normalised (T, 160), with pitch (T, 163); what workers make stays with them")
    report.measured = {"audio_seconds": total, "seconds": seconds}
    return report
