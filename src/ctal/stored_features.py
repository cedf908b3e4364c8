"""Features beside a store's recordings, so that no run computes them again (`ctal features`).

    STORE/features/ANALYSIS/00000.arrow …   for each shard of the store: `id`, `frames` (T), `features` (T·F float16)
    STORE/features/ANALYSIS/features.json   of which recordings they are; written last

They take 92 MB an hour of `mel` with deltas, and are read through memory maps: what decoding and analysis cost in every
pass is paid once. Features are rounded to float16 whether they are stored or not, so storing them changes no result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ctal.audio import load_audio
from ctal.errors import InputError
from ctal.files import write_json
from ctal.processes import usable_cores
from ctal.store import MAPS, Store, is_whole, only_writer, open_arrow, read_json, write_arrow, write_in_processes

FORMAT = "ctal-features"
VERSION = 1
_MANIFEST = "features.json"
_SCHEMA = pa.schema([("id", pa.string()), ("frames", pa.int32()), ("features", pa.large_binary())])

Extract = Callable[[np.ndarray], Tensor]
"""(samples,) float32 at 16 kHz → (T, F) features."""


def rounded(features: Tensor) -> Tensor:
    """(T, F) float16. Normalised features lose at most 5e-4 of their value."""
    return features.half()


@dataclass(frozen=True)
class FeatureSummary:
    """What `write_features` leaves behind."""

    path: Path
    utterances: int
    megabytes: float
    up_to_date: bool
    """True when nothing was missing."""


@dataclass(frozen=True)
class _Job:
    """A file to write."""

    store: Path
    rows: tuple[int, ...]
    path: Path
    fingerprint: str
    """Of the recordings and their analysis."""


def write_features(
    store: Store,
    analysis: str,
    extract: Extract,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureSummary:
    """Writes the features of all utterances of `store`, in `workers` processes (default: one a core).

    Interrupted, it goes on where it stopped. `analysis` names what `extract` does (`CtalFeatureExtractor.analysis`),
    which goes to spawned processes and so has to be picklable; `progress` gets (done, total) in utterances. Raises
    `InputError` where the disk refuses or a worker is killed.
    """
    folder = _folder(store, analysis)
    report = progress or (lambda done, total: None)
    with only_writer(store.path, folder):
        jobs = _jobs(store, folder, analysis)
        missing = [job for job in jobs if not is_whole(job.path, job.fingerprint)]
        up_to_date = not missing and _is_of(folder, store)
        kept = len(store) - sum(len(job.rows) for job in missing)
        report(kept, len(store))
        if not up_to_date:
            (folder / _MANIFEST).unlink(missing_ok=True)  # else an old one would vouch for what is half written
            write = partial(_write_file, extract=extract)
            tasks = [(job, len(job.rows)) for job in missing]
            write_in_processes(write, tasks, folder, workers or usable_cores(), lambda n: report(kept + n, len(store)))
            identity = {"format": FORMAT, "version": VERSION, "content_hash": store.content_hash}
            write_json(folder / _MANIFEST, identity)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return FeatureSummary(folder, len(store), size, up_to_date)


def _folder(store: Store, analysis: str) -> Path:
    return store.path / "features" / analysis


def _jobs(store: Store, folder: Path, analysis: str) -> list[_Job]:
    hashes = np.array(store.audio_hashes())
    numbers, first = np.unique(store.index.shards, return_index=True)
    jobs = []
    for number, rows in zip(numbers.tolist(), np.split(np.arange(len(store)), first)[1:], strict=True):
        facts = json.dumps([FORMAT, VERSION, analysis, [store.index.id(row) for row in rows.tolist()], *hashes[rows]])
        fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        jobs.append(_Job(store.path, tuple(rows.tolist()), folder / f"{number:05d}.arrow", fingerprint))
    return jobs


def _write_file(job: _Job, extract: Extract) -> None:
    store = Store(job.store)
    rows = []
    for row in job.rows:
        stored = store.read(row)
        features = rounded(extract(load_audio(stored.audio, stored.id)))
        rows.append({"id": stored.id, "frames": len(features), "features": features.numpy().tobytes()})
    batch = pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)
    write_arrow(job.path, batch, fingerprint=job.fingerprint)


def other_analyses(store: Store, analysis: str) -> list[str]:
    """Names of analyses that features of the store are kept of, where there are none of `analysis`."""
    if (_folder(store, analysis) / _MANIFEST).is_file():
        return []
    return sorted(path.parent.name for path in (store.path / "features").glob(f"*/{_MANIFEST}"))


def _is_of(folder: Path, store: Store) -> bool:
    manifest = read_json(folder / _MANIFEST)
    return manifest.get("version") == VERSION and manifest.get("content_hash") == store.content_hash


class StoredFeatures:
    """What `write_features` has written, read through memory maps that are opened when needed."""

    def __init__(self, store: Store, analysis: str) -> None:
        """See `open_features`."""
        self._store, self._analysis = store, analysis
        self._file = lru_cache(MAPS)(self._open)

    def __reduce__(self) -> tuple[type[StoredFeatures], tuple[Store, str]]:
        return StoredFeatures, (self._store, self._analysis)

    def read(self, i: int) -> Tensor:
        """(T, F) float16 of utterance `i` of the store."""
        number, row = int(self._store.index.shards[i]), int(self._store.index.rows[i])
        batch = self._file(number)
        if row >= len(batch) or batch.column("id")[row].as_py() != self._store.index.id(i):
            raise InputError(f"{self._path(number)}: was written anew while it was read; start again")
        _, ends, content = batch.column("features").buffers()
        start, end = np.frombuffer(ends, np.int64)[row : row + 2].tolist()
        # Copied out of the map, in which nothing may be written; once, since an element of the column would be a copy.
        values = np.frombuffer(content.slice(start, end - start), np.float16)
        return torch.from_numpy(values.copy()).view(batch.column("frames")[row].as_py(), -1)

    def _open(self, number: int) -> pa.RecordBatch:
        path = self._path(number)
        try:
            return open_arrow(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: cannot be read ({error}); run `ctal features` again") from None

    def _path(self, number: int) -> Path:
        return _folder(self._store, self._analysis) / f"{number:05d}.arrow"


def open_features(store: Store, analysis: str) -> StoredFeatures | None:
    """The stored features of an analysis; None where there are none, or not yet all.

    Raises `InputError` where they are of other recordings than the store has now.
    """
    folder = _folder(store, analysis)
    if not (folder / _MANIFEST).is_file():
        return None
    if not _is_of(folder, store):
        raise InputError(
            f"{folder}: was made before {store.path} was prepared anew; run `ctal features` again, or delete it"
        )
    return StoredFeatures(store, analysis)
