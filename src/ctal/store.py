"""The data store: audio bytes and transcripts in Arrow shards, and an index to plan batches from.

    STORE/shards/00000.arrow …   Arrow IPC files: `id`, `audio` (bytes), `text`, `speaker`, `split`, `labels` (JSON),
                                 `seconds`, `frames` (at 80 a second), `sha256` (of the stored bytes)
    STORE/index.arrow            a row an utterance, without audio and text: what batches are planned from
    STORE/features/              what `ctal features` computed of them, if it was run (`ctal.stored_features`)
    STORE/quarantine.jsonl       recordings that cannot be used: `id`, `audio`, `reason`
    STORE/store.json             counts and content hash; written last, so `"complete": true` means what it says

A shard is planned from the list of utterances alone (128 of them or 64 MiB of sources, whichever comes first), and
carries the fingerprint of its plan. It is written aside, synced and renamed into place. So whatever whole shard has
the right fingerprint is kept: that one rule makes preparing resumable, repeatable and incremental, and makes order
and bytes independent of the number of workers.

Recordings are stored as they are, except 16- and 24-bit PCM WAV, which becomes FLAC: the same samples in about half
the space. Of an utterance that is a segment of a longer recording the segment alone is stored, as mono 16-bit FLAC.
Each is decoded once, to the end, before it is stored; what cannot be decoded never reaches training.

`datasets` reads a store too: `load_dataset("arrow", data_files="STORE/shards/*.arrow")`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import soundfile

from ctal.audio import UNREADABLE, decode_audio, num_frames, resampled_length
from ctal.corpora import WITHOUT_RECORDING, Utterance
from ctal.errors import InputError
from ctal.files import ASIDE, disk_refuses, file_aside, write_json
from ctal.processes import follow_parent, usable_cores

FORMAT = "ctal-store"
VERSION = 1
"""Of the layout above. Part of every shard's fingerprint, so another version is never taken for this one."""

SHARD_UTTERANCES = 128
SHARD_BYTES = 64 * 2**20
"""A shard holds at most so many utterances, and sources of so many bytes (or one larger recording): what a worker
holds in memory, what an interruption loses, and for LibriSpeech 960 h some 2,200 shards of 28 MB."""

MAPS = 4096
"""Shards that a store keeps open, of the some 65,000 files that Linux lets a process map."""

_FINGERPRINT = b"ctal.fingerprint"

_SHARDS_A_WORKER = 2
"""At least so many: a worker takes about a second to start (Python, Arrow, pandas, which Arrow imports), as long as
it then takes for two shards of LibriSpeech."""

_SHARD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("audio", pa.large_binary()),
        ("text", pa.string()),
        ("speaker", pa.string()),
        ("split", pa.string()),
        ("labels", pa.string()),
        ("seconds", pa.float64()),
        ("frames", pa.int32()),
        ("sha256", pa.string()),
    ]
)
Job = TypeVar("Job")

_MEND = "make room or mend it, then run the same command again (finished shards are kept)"
_HASHED = ["id", "sha256", "text", "speaker", "split", "labels"]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A recording that was left out, and why."""

    id: str
    audio: str
    reason: str
    """One line that names the file."""


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What `prepare_store` leaves behind."""

    path: Path
    corpus: str
    utterances: int
    hours: float
    speakers: int
    """Named speakers; 0 where the corpus names none."""
    with_text: int
    shards: int
    content_hash: str
    quarantined: tuple[Quarantined, ...]
    up_to_date: bool
    """True when the store was whole already and nothing was written."""
    removed: int
    """Utterances that the store had before and has no longer."""


@dataclass(frozen=True, slots=True)
class StoredUtterance:
    """One utterance as the store holds it."""

    id: str
    text: str | None
    speaker: str | None
    split: str | None
    labels: dict[str, str | float]
    _audio: pa.LargeBinaryArray = field(repr=False)
    """Of length 1: an array's element would be a copy already."""

    @property
    def audio(self) -> bytes:
        """An encoded sound file, for `ctal.audio.load_audio`; copied out of the map (20 µs for 15 s of FLAC, against
        5 ms to decode it) when it is asked for, so that who has features at hand does not read it."""
        return self._audio[0].as_py()


# Writing ----------------------------------------------------------------------------------------------------------


def prepare_store(
    utterances: Iterable[Utterance],
    store: Path,
    *,
    corpus: str,
    workers: int | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> StoreSummary:
    """Write `utterances`, in their order, into the store at `store`, in `workers` processes (default: one a core).

    Run again on the same input it writes nothing; interrupted, it goes on where it stopped; on changed input it
    rewrites the shards that changed; utterances that are no longer in it are counted in `removed`. A recording that
    cannot be used, or whose id is taken, goes into quarantine; each further run tries it again. `progress` gets (done,
    total) in utterances. Workers are spawned: a script that calls this needs the usual `if __name__ == "__main__":`.

    Raises `InputError` if no utterance is usable, if `strict` and one is not, if `store` holds something else, none of
    the utterances or others from another folder, if the disk refuses, or if a worker process is killed. What was
    finished by then is kept for the next run.
    """
    shards, duplicates, total = _plan(utterances)
    if not total:
        raise InputError(f"the corpus '{corpus}' has no utterances: nothing to prepare")
    old, new = _ids_in(store, corpus), {utterance.id for shard in shards for utterance in shard.utterances}
    if old and not old & new:
        raise InputError(f"{store}: holds {len(old)} other utterances; name a new folder, or delete it first")
    root = _common_folder(shards)
    of = read_json(store / "store.json").get("root", root)
    # Ids such as 001 are in many folders. Moved, or written anew elsewhere, the recordings may be the same ones.
    if old and old != new and os.path.isdir(of) and os.path.commonpath([of, root]) not in (of, root):
        raise InputError(f"{store}: holds recordings of {of}; name a new folder, or delete it first")
    plan = hashlib.sha256(
        json.dumps([[shard.fingerprint for shard in shards], [asdict(entry) for entry in duplicates]]).encode()
    ).hexdigest()

    folder = store / "shards"
    missing = [shard for shard in shards if not _is_current(folder / shard.name, shard)]
    report = progress or (lambda done, total: None)
    up_to_date = not missing and _is_finished(store, plan)
    if up_to_date:
        report(total, total)
        manifest, quarantined = read_json(store / "store.json"), _read_quarantine(store)
        _check_usable(manifest["utterances"], quarantined, strict)
    else:
        with only_writer(store, folder):
            identity = {"format": FORMAT, "version": VERSION, "root": root}
            write_json(store / "store.json", {**identity, "complete": False, "corpus": corpus}, _MEND)
            _discard_strays(folder, keep={shard.name for shard in shards})
            kept = total - sum(len(shard.utterances) for shard in missing)
            report(kept, total)
            tasks = [(shard, len(shard.utterances)) for shard in missing]
            write = partial(_write_shard, folder)
            write_in_processes(write, tasks, store, workers or usable_cores(), lambda done: report(kept + done, total))
            quarantined = [
                entry for shard in shards for entry in _quarantine_in(_metadata(folder / shard.name))
            ] + duplicates
            _check_usable(total - len(quarantined), quarantined, strict)
            counts = _write_index(store, shards)
            _write_quarantine(store, quarantined)
            _sync_folders(folder, store)
            manifest = {**identity, "complete": True, "corpus": corpus, **counts}
            manifest |= {"quarantined": len(quarantined), "plan": plan}
            write_json(store / "store.json", manifest, _MEND)

    return StoreSummary(
        path=store,
        corpus=corpus,
        utterances=manifest["utterances"],
        hours=manifest["hours"],
        speakers=manifest["speakers"],
        with_text=manifest["with_text"],
        shards=manifest["shards"],
        content_hash=manifest["content_hash"],
        quarantined=tuple(quarantined),
        up_to_date=up_to_date,
        removed=len(old - new),
    )


@dataclass(frozen=True, slots=True)
class _Shard:
    """What one shard will hold, decided before any audio is read."""

    name: str
    utterances: tuple[Utterance, ...]
    fingerprint: str


def _plan(utterances: Iterable[Utterance]) -> tuple[list[_Shard], list[Quarantined], int]:
    """The shards, the utterances whose id is taken by an earlier one, and the number of all utterances.

    A fingerprint covers everything known of an utterance and its file's place, size and time of change. Consecutive
    segments of one recording count its bytes once, so that they share a shard, where it is decoded once.
    """
    shards: list[_Shard] = []
    duplicates: list[Quarantined] = []
    taken: dict[str, Path] = {}
    group: list[Utterance] = []
    facts: list[object] = []
    size_of_group = 0

    def close_group() -> None:
        nonlocal group, facts, size_of_group
        if group:
            fingerprint = hashlib.sha256(json.dumps([FORMAT, VERSION, facts]).encode()).hexdigest()
            shards.append(_Shard(f"{len(shards):05d}.arrow", tuple(group), fingerprint))
        group, facts, size_of_group = [], [], 0

    total = 0
    for utterance in utterances:
        total += 1
        audio, id = utterance.audio, utterance.id
        if id in taken:
            reason = f"{audio}: the id '{id}' is taken by {taken[id]}; give each recording an id of its own"
            duplicates.append(_quarantine(utterance, reason))
            continue
        taken[id] = audio
        try:
            status = audio.stat()
            size, changed = status.st_size, status.st_mtime_ns
        except (OSError, ValueError):  # the worker will say what is wrong with it
            size, changed = 0, 0
        is_segment = _is_segment(utterance)
        added = 0 if is_segment and group and group[-1].audio == audio else size
        if len(group) == SHARD_UTTERANCES or size_of_group + added > SHARD_BYTES:
            close_group()
            added = size
        group.append(utterance)
        size_of_group += added
        known = (utterance.text, utterance.speaker, utterance.split, _labels_json(utterance.labels))
        # Whole recordings keep the fingerprints that they had before there were segments.
        segment = (utterance.start, utterance.end) if is_segment else ()
        facts.append((id, os.path.abspath(audio), size, changed, *known, *segment))
    close_group()
    return shards, duplicates, total


def _common_folder(shards: Iterable[_Shard]) -> str:
    """The innermost that holds all recordings, with what no encoding can print escaped."""
    folders = {os.path.dirname(os.path.abspath(each.audio)) for shard in shards for each in shard.utterances}
    return os.path.commonpath(folders).encode(errors="backslashreplace").decode()


def write_in_processes(
    write: Callable[[Job], None],
    jobs: Sequence[tuple[Job, int]],
    folder: Path,
    workers: int,
    report: Callable[[int], None],
) -> None:
    """Calls `write` with each job in spawned processes; `report` gets the number of utterances dealt with so far.

    A job comes with how many utterances it has. `folder`, to which they write, is named where a process is killed.
    """
    done = 0
    workers = min(workers, len(jobs) // _SHARDS_A_WORKER)
    if workers <= 1:
        for job, utterances in jobs:
            write(job)
            done += utterances
            report(done)
        return
    # Spawned, not forked: the caller may have threads (a progress bar), and a fork copies their locks held.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), follow_parent)
    try:
        futures = {pool.submit(write, job): utterances for job, utterances in jobs}
        for future in as_completed(futures):
            future.result()
            done += futures[future]
            report(done)
    except BrokenProcessPool:
        raise InputError(
            f"{folder}: a worker process was killed, perhaps for lack of memory; run the same command again, "
            "if need be with fewer workers (finished shards are kept)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shard(folder: Path, shard: _Shard) -> None:
    rows: list[dict[str, Any]] = []
    quarantined: list[Quarantined] = []
    decode = lru_cache(maxsize=1)(decode_audio)
    for utterance in shard.utterances:
        try:
            rows.append(_row(utterance, decode))
        except InputError as error:
            quarantined.append(_quarantine(utterance, str(error)))
    batch = pa.RecordBatch.from_pylist(rows, schema=_SHARD_SCHEMA)
    more = {"ctal.quarantine": json.dumps([asdict(entry) for entry in quarantined])}
    write_arrow(folder / shard.name, batch, fingerprint=shard.fingerprint, metadata=more)


def _is_current(path: Path, shard: _Shard) -> bool:
    """Whether a shard is written as planned, and what is in quarantine still belongs there: what made a recording
    unreadable, such as its rights or the disk it is on, may be mended without a trace in its size or time of change."""
    metadata = _metadata(path)
    if metadata.get(_FINGERPRINT) != shard.fingerprint.encode():
        return False
    refused = {entry.id for entry in _quarantine_in(metadata)}
    decode = lru_cache(maxsize=1)(decode_audio)
    return not any(_is_usable(each, decode) for each in shard.utterances if _quarantine(each, "").id in refused)


def _is_usable(utterance: Utterance, decode: Callable[[Path], tuple[np.ndarray, int]]) -> bool:
    if utterance.audio.suffix.lower() in UNREADABLE:
        return False
    try:
        _row(utterance, decode)
    except InputError:
        return False
    return True


def _quarantine(utterance: Utterance, reason: str) -> Quarantined:
    """With what no encoding can print, such as a file name in another one, escaped."""
    fields = (utterance.id, str(utterance.audio), reason)
    return Quarantined(*(field.encode(errors="backslashreplace").decode() for field in fields))


def _row(utterance: Utterance, decode: Callable[[Path], tuple[np.ndarray, int]]) -> dict[str, Any]:
    """`decode` is `decode_audio`, which remembers the recording that the last segment came from."""
    name = str(utterance.audio)
    labels = _labels_json(utterance.labels)
    try:
        "".join(filter(None, (utterance.id, utterance.text, utterance.speaker, utterance.split, labels))).encode()
    except UnicodeEncodeError:
        reason = "its name or text cannot be read as UTF-8; rename the file, or mend the text"
        raise InputError(f"{name}: {reason}") from None
    if _is_segment(utterance):
        whole, sampling_rate = decode(utterance.audio)
        wave = _cut(whole, sampling_rate, utterance)
        audio = _segment_flac(wave, sampling_rate, name)
    else:
        try:
            source = utterance.audio.read_bytes()
        except (OSError, ValueError) as error:  # the latter of a name that no file can have
            reason = getattr(error, "strerror", None) or error
            if name.endswith(WITHOUT_RECORDING):
                raise InputError(f"{name}: a transcript without a recording; put it beside one, or away") from None
            raise InputError(f"{name}: cannot be read ({reason}); check the path and its rights") from None
        wave, sampling_rate = decode_audio(source, name)
        audio = _compact(source)
    return {
        "id": utterance.id,
        "audio": audio,
        "text": utterance.text,
        "speaker": utterance.speaker,
        "split": utterance.split,
        "labels": labels,
        "seconds": len(wave) / sampling_rate,
        "frames": num_frames(resampled_length(len(wave), sampling_rate)),
        "sha256": hashlib.sha256(audio).hexdigest(),
    }


def _is_segment(utterance: Utterance) -> bool:
    return utterance.start is not None or utterance.end is not None


def _cut(wave: np.ndarray, sampling_rate: int, utterance: Utterance) -> np.ndarray:
    """The segment's samples; an end beyond the recording's is the recording's."""
    seconds = len(wave) / sampling_rate
    start = 0.0 if utterance.start is None else utterance.start
    end = seconds if utterance.end is None else utterance.end
    # Written so that NaN is refused as well.
    if 0 <= start < seconds and end > start:
        segment = wave[round(start * sampling_rate) : round(min(end, seconds) * sampling_rate)]
        if len(segment):
            return segment
    raise InputError(
        f"{utterance.audio}: the segment from {start:g} to {end:g} s is empty or lies outside the recording, "
        f"which lasts {seconds:.2f} s; correct its times or leave it out"
    )


def _segment_flac(wave: np.ndarray, sampling_rate: int, name: str) -> bytes:
    """Float32 samples as 16-bit FLAC: those of a 16-bit mono recording unchanged, what is beyond full scale clipped."""
    samples = np.clip(np.rint(wave * 32_768), -32_768, 32_767).astype(np.int16)
    try:
        return _flac(samples, sampling_rate, "PCM_16")
    except soundfile.LibsndfileError:
        raise InputError(f"{name}: FLAC takes no rate of {sampling_rate} Hz; resample the recording") from None


def _flac(samples: np.ndarray, sampling_rate: int, subtype: str) -> bytes:
    target = BytesIO()
    soundfile.write(target, samples, sampling_rate, format="FLAC", subtype=subtype)
    return target.getvalue()


def _compact(source: bytes) -> bytes:
    """16- and 24-bit PCM WAV as FLAC, which decodes to the same samples; anything else as it is."""
    try:
        with soundfile.SoundFile(BytesIO(source)) as file:
            if file.format not in ("WAV", "WAVEX", "RF64") or file.subtype not in ("PCM_16", "PCM_24"):
                return source
            subtype, sampling_rate = file.subtype, file.samplerate
            samples = file.read(dtype="int16" if subtype == "PCM_16" else "int32")
        return _flac(samples, sampling_rate, subtype)
    except soundfile.LibsndfileError:  # an unusual rate, say: FLAC takes most, not all
        return source


def _labels_json(labels: Mapping[str, str | float]) -> str:
    return json.dumps(dict(labels), sort_keys=True, ensure_ascii=False, allow_nan=False)


def _write_index(store: Path, shards: list[_Shard]) -> dict[str, Any]:
    """Write the index from what the shards hold besides audio, and return the counts for `store.json`."""
    content = hashlib.sha256()
    tables: list[pa.Table] = []
    for number, shard in enumerate(shards):
        batch = open_arrow(store / "shards" / shard.name)
        for row in zip(*(batch.column(name).to_pylist() for name in _HASHED), strict=True):
            content.update(json.dumps(row).encode() + b"\n")
        columns = {
            "id": batch.column("id"),
            "shard": pa.array(np.full(len(batch), number, np.int32)),
            "row": pa.array(np.arange(len(batch), dtype=np.int32)),
            "frames": batch.column("frames"),
            "seconds": batch.column("seconds"),
            "speaker": batch.column("speaker"),
            "split": batch.column("split"),
            "has_text": batch.column("text").is_valid(),
        }
        # Copied out of the map, of which there may be more than a process can have (`MAPS`).
        tables.append(pa.table({name: pa.array(column.to_pylist(), column.type) for name, column in columns.items()}))
    index = pa.concat_tables(tables).combine_chunks()
    write_arrow(store / "index.arrow", index.to_batches()[0])
    return {
        "utterances": len(index),
        "hours": round(float(index.column("seconds").to_numpy().sum()) / 3600, 6),
        "speakers": len(index.column("speaker").drop_null().unique()),
        "with_text": int(index.column("has_text").to_numpy().sum()),
        "shards": len(shards),
        "content_hash": content.hexdigest(),
    }


def _ids_in(store: Path, corpus: str) -> set[str]:
    """The utterances of a store, finished or not. Refuses to write into what is not ours or is another corpus: it may
    have taken hours to make."""
    if store.exists() and not store.is_dir():
        raise InputError(f"{store}: is a file; name a new folder for the store")
    manifest, found = read_json(store / "store.json"), set[str]()
    if not manifest:
        if store.is_dir() and not _is_just_begun(store):
            raise InputError(f"{store}: is not empty and not a store; name a new folder for the store")
    elif manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise InputError(f"{store}: holds something else than a store of this version; name a new folder")
    elif manifest.get("corpus", corpus) != corpus:
        raise InputError(f"{store}: holds the corpus '{manifest['corpus']}'; name a new folder, or delete it first")
    else:
        files = [store / "index.arrow"] if manifest["complete"] else (store / "shards").glob("*.arrow")
        for file in files:
            with suppress(OSError, pa.ArrowException):  # a damaged one is made anew
                found.update(open_arrow(file).column("id").to_pylist())
    return found


def _is_just_begun(store: Path) -> bool:
    """Whether a folder is empty, or holds what a run that was killed at once has left."""
    folder = store / "shards"
    names = {path.name for path in store.iterdir()}
    return names <= {folder.name, f"store.json{ASIDE}"} and (folder.name not in names or not any(folder.iterdir()))


def _check_usable(usable: int, quarantined: list[Quarantined], strict: bool) -> None:
    if not quarantined or (usable and not strict):
        return
    first, others = quarantined[0].reason, len(quarantined) - 1
    more = f" (and {others} other{'s' * (others > 1)})" if others else ""
    lead = "strict, and a recording cannot be used" if usable else "no usable recording"
    raise InputError(f"{lead}: {first}{more}")


def is_whole(path: Path, fingerprint: str) -> bool:
    """Whether an Arrow file is complete (its footer is there) and has this fingerprint: made by the same plan."""
    return _metadata(path).get(_FINGERPRINT) == fingerprint.encode()


def _metadata(path: Path) -> Mapping[bytes, bytes]:
    """Of an Arrow file; none of one that is not complete."""
    try:
        return open_arrow(path).schema.metadata or {}
    except (OSError, pa.ArrowException):
        return {}


def _is_finished(store: Path, plan: str) -> bool:
    manifest = read_json(store / "store.json")
    if not (manifest and manifest["complete"] and manifest["plan"] == plan):
        return False
    try:
        rows = len(open_arrow(store / "index.arrow"))
        return rows == manifest["utterances"] and len(_read_quarantine(store)) == manifest["quarantined"]
    except (OSError, ValueError):
        return False


# Files ------------------------------------------------------------------------------------------------------------


def write_arrow(
    path: Path, batch: pa.RecordBatch, *, fingerprint: str | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes an Arrow file that is whole once it is there; `is_whole` asks for its fingerprint."""
    known = {**(metadata or {}), **({} if fingerprint is None else {_FINGERPRINT: fingerprint})}
    batch = batch.replace_schema_metadata(known)
    with file_aside(path, _MEND) as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def open_arrow(path: Path) -> pa.RecordBatch:
    """The one record batch of an Arrow file, memory-mapped: columns that are not touched are not read."""
    # Closed here, since Arrow's threads may hold the file for a moment more; what is mapped stays with the batch.
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(0)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file or object."""
    try:
        value = json.loads(path.read_bytes())
        return value if isinstance(value, dict) else {}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete the store and prepare it again") from None


def _quarantine_in(metadata: Mapping[bytes, bytes]) -> list[Quarantined]:
    return [Quarantined(**entry) for entry in json.loads(metadata[b"ctal.quarantine"])]


def _write_quarantine(store: Path, entries: list[Quarantined]) -> None:
    with file_aside(store / "quarantine.jsonl", _MEND) as file:
        file.writelines(json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n" for entry in entries)


def _read_quarantine(store: Path) -> list[Quarantined]:
    with (store / "quarantine.jsonl").open(encoding="utf-8") as lines:
        return [Quarantined(**json.loads(line)) for line in lines]


@contextmanager
def only_writer(store: Path, folder: Path) -> Iterator[None]:
    """Makes `folder` in a store and holds the store against a second writer; the system frees a dead one's lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_refuses(store, error, _MEND) from error
    try:
        import fcntl
    except ImportError:  # Windows: two writers would then hinder each other, no more
        yield
        return
    held = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise InputError(f"{store}: another process is writing this store; wait for it to end") from None
    except OSError:  # a network file system that cannot lock
        pass
    try:
        yield
    finally:
        os.close(held)


def _discard_strays(folder: Path, keep: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()


def _sync_folders(*folders: Path) -> None:
    """Make the renames last through a power failure, where the system can."""
    for folder in folders:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


# Reading ----------------------------------------------------------------------------------------------------------


class StoreIndex:
    """What a store says of its N utterances without touching audio: columns, each made when first asked for."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return self._batch.num_rows

    @cached_property
    def ids(self) -> list[str]:
        return self._batch.column("id").to_pylist()

    def id(self, i: int) -> str:
        """One of `ids`, without making the list."""
        return self._batch.column("id")[i].as_py()

    @cached_property
    def shards(self) -> np.ndarray:
        """(N,) int32: number of the shard that holds each utterance, never falling."""
        return self._batch.column("shard").to_numpy()

    @cached_property
    def rows(self) -> np.ndarray:
        """(N,) int32: row in that shard."""
        return self._batch.column("row").to_numpy()

    @cached_property
    def frames(self) -> np.ndarray:
        """(N,) int32: feature frames at 80 a second."""
        return self._batch.column("frames").to_numpy()

    @cached_property
    def seconds(self) -> np.ndarray:
        """(N,) float64."""
        return self._batch.column("seconds").to_numpy()

    @cached_property
    def speakers(self) -> list[str | None]:
        return self._batch.column("speaker").to_pylist()

    @cached_property
    def splits(self) -> list[str | None]:
        return self._batch.column("split").to_pylist()

    @cached_property
    def has_text(self) -> np.ndarray:
        """(N,) bool."""
        return self._batch.column("has_text").to_numpy(zero_copy_only=False)


class Store:
    """A prepared store, read through memory maps that are opened when needed.

    Only the path is pickled, so handing a store to a `DataLoader` worker costs nothing, forked or spawned.
    Raises `InputError` for a path that is missing, not a store, unfinished, incomplete or of a newer version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        manifest = read_json(self.path / "store.json")
        _check_readable(self.path, manifest)
        self.corpus: str = manifest["corpus"]
        self.content_hash: str = manifest["content_hash"]
        """SHA-256 over ids, stored bytes, texts, speakers, splits and labels in order: equal data, equal hash."""
        self.hours: float = manifest["hours"]
        self._length: int = manifest["utterances"]
        self._shard = lru_cache(MAPS)(self._open_shard)

    def __len__(self) -> int:
        return self._length

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.path,)

    @cached_property
    def index(self) -> StoreIndex:
        """Mapped on first use; millions of utterances cost nothing until a column is asked for."""
        return StoreIndex(self._open(self.path / "index.arrow"))

    def labels(self) -> list[dict[str, str | float]]:
        """The labels of every utterance, in order; reads a column of each shard, but no audio."""
        shards = range(int(self.index.shards.max(initial=-1)) + 1)
        return [json.loads(each) for number in shards for each in self._shard(number).column("labels").to_pylist()]

    def audio_hashes(self) -> list[str]:
        """SHA-256 of every utterance's stored recording, in order; reads a column of each shard, but no audio."""
        shards = range(int(self.index.shards.max(initial=-1)) + 1)
        return [each for number in shards for each in self._shard(number).column("sha256").to_pylist()]

    def read(self, i: int) -> StoredUtterance:
        """Utterance `i`, 0 … len - 1, in the order of the corpus."""
        batch, row = self._shard(int(self.index.shards[i])), int(self.index.rows[i])
        if row >= len(batch) or batch.column("id")[row].as_py() != self.index.id(i):
            raise InputError(f"{self.path}: was prepared anew while it was read; start again")

        def value(column: str) -> Any:
            return batch.column(column)[row].as_py()

        return StoredUtterance(
            id=value("id"),
            text=value("text"),
            speaker=value("speaker"),
            split=value("split"),
            labels=json.loads(value("labels")),
            _audio=batch.column("audio").slice(row, 1),
        )

    def _open_shard(self, number: int) -> pa.RecordBatch:
        return self._open(self.path / "shards" / f"{number:05d}.arrow")

    def _open(self, path: Path) -> pa.RecordBatch:
        try:
            return open_arrow(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: cannot be read ({error}); run `ctal prepare` again to mend the store") from None


def _check_readable(path: Path, manifest: dict[str, Any]) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such store; make it with `ctal prepare`")
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path}: not a store (no store.json of ours); make one with `ctal prepare`")
    if manifest["version"] > VERSION:
        raise InputError(f"{path}: written by a newer ctal (store version {manifest['version']}); upgrade ctal")
    if not manifest["complete"]:
        raise InputError(f"{path}: unfinished; run the same `ctal prepare` again, it goes on where it stopped")
    found = sum(1 for shard in (path / "shards").glob("*.arrow"))
    if found < manifest["shards"]:
        raise InputError(f"{path}: has {found} of {manifest['shards']} shards; copy it again or run `ctal prepare`")
