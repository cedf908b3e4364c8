import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile

from conftest import REAL, needs_real
from ctal import store as store_module
from ctal.audio import decode_audio
from ctal.corpora import Utterance, get_corpus
from ctal.errors import InputError
from ctal.store import Store, StoreSummary, prepare_store

RATE = 16_000


def noise(samples: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    shape = samples if channels == 1 else (samples, channels)
    return np.random.default_rng(seed).uniform(-0.9, 0.9, shape)


def record(path: Path, samples: int = 1600, seed: int = 0, subtype: str | None = "PCM_16") -> Path:
    soundfile.write(path, noise(samples, seed), RATE, subtype=subtype)
    return path


def corpus_of(folder: Path, count: int) -> list[Utterance]:
    """Short recordings of different lengths; every third has a text, speakers alternate."""
    folder.mkdir(exist_ok=True)
    return [
        Utterance(
            id=f"u{i:03d}",
            audio=record(folder / f"u{i:03d}.wav", samples=800 + 100 * (i % 7), seed=i),
            text=f"wörter {i}" if i % 3 == 0 else None,
            speaker=f"s{i % 2}",
            split="train" if i % 2 else None,
            labels={"sentiment": i / 2, "emotion": "sad"} if i == 0 else {},
        )
        for i in range(count)
    ]


def prepare(utterances: Iterable[Utterance], store: Path, workers: int = 1, strict: bool = False) -> StoreSummary:
    return prepare_store(utterances, store, corpus="test", workers=workers, strict=strict)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def snapshot(store: Path) -> dict[str, tuple[bytes, int, int]]:
    """Bytes, time of change and inode of every file."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {
        path.relative_to(store).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
        for path in files
    }


def contents(store: Path) -> dict[str, bytes]:
    return {name: facts[0] for name, facts in snapshot(store).items()}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "SHARD_UTTERANCES", 4)


# What is written --------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_prepared_in_the_same_order(tmp_path: Path):
    utterances = corpus_of(tmp_path / "audio", 10)
    summary = prepare(utterances, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert len(store) == summary.utterances == 10
    assert store.content_hash == summary.content_hash
    assert store.corpus == "test"
    assert (summary.with_text, summary.speakers, summary.shards, summary.quarantined) == (4, 2, 3, ())
    for i, utterance in enumerate(utterances):
        stored = store.read(i)
        assert (stored.id, stored.text, stored.speaker, stored.split, stored.labels) == (
            utterance.id,
            utterance.text,
            utterance.speaker,
            utterance.split,
            utterance.labels,
        )
        samples, rate = decode_audio(stored.audio)
        np.testing.assert_array_equal(samples, decode_audio(utterance.audio)[0])
        assert (rate, store.index.frames[i], store.index.seconds[i]) == (
            RATE,
            1 + len(samples) // 200,
            len(samples) / RATE,
        )
    index = store.index
    assert index.ids == [u.id for u in utterances]
    assert index.speakers == [u.speaker for u in utterances]
    assert index.splits == [u.split for u in utterances]
    assert index.has_text.tolist() == [u.text is not None for u in utterances]
    assert index.shards.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert abs(store.hours * 3600 - index.seconds.sum()) < 0.01


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_pcm_wav_becomes_flac_of_identical_samples(tmp_path: Path, subtype: str, rate: int, channels: int):
    audio = tmp_path / "a.wav"
    soundfile.write(audio, noise(3000, channels=channels), rate, subtype=subtype)
    prepare([Utterance("a", audio)], tmp_path / "store")
    stored = Store(tmp_path / "store").read(0).audio
    assert stored[:4] == b"fLaC"
    original, _ = soundfile.read(audio, dtype="int32")
    decoded, decoded_rate = soundfile.read(BytesIO(stored), dtype="int32")
    np.testing.assert_array_equal(decoded, original)
    assert decoded_rate == rate


@pytest.mark.parametrize(
    ("name", "subtype"), [("a.flac", "PCM_16"), ("a.ogg", "VORBIS"), ("a.wav", "FLOAT"), ("a.mp3", None)]
)
def test_other_recordings_are_stored_as_they_are(tmp_path: Path, name: str, subtype: str | None):
    audio = record(tmp_path / name, samples=8000, subtype=subtype)
    prepare([Utterance("a", audio)], tmp_path / "store")
    assert Store(tmp_path / "store").read(0).audio == audio.read_bytes()


def test_a_wav_at_a_rate_that_flac_does_not_take_is_stored_as_it_is_or_identically(tmp_path: Path):
    audio = tmp_path / "a.wav"
    soundfile.write(audio, noise(3000), 70_001, subtype="PCM_16")
    prepare([Utterance("a", audio)], tmp_path / "store")
    stored = Store(tmp_path / "store").read(0).audio
    np.testing.assert_array_equal(decode_audio(stored)[0], decode_audio(audio)[0])


def test_order_and_bytes_are_independent_of_the_number_of_workers(tmp_path: Path):
    utterances = corpus_of(tmp_path / "audio", 30)
    utterances[5].audio.write_text("not audio")
    for workers in (1, 2, 3):
        prepare(utterances, tmp_path / f"store{workers}", workers=workers)
    assert contents(tmp_path / "store1") == contents(tmp_path / "store2") == contents(tmp_path / "store3")


def test_shards_are_bounded_in_bytes_too_and_a_larger_recording_has_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 4000)
    sizes = [800, 800, 3000, 800, 1600]  # samples of two bytes
    utterances = [Utterance(f"{i}", record(tmp_path / f"{i}.wav", size)) for i, size in enumerate(sizes)]
    prepare(utterances, tmp_path / "store")
    assert Store(tmp_path / "store").index.shards.tolist() == [0, 0, 1, 2, 3]


def test_the_content_hash_depends_on_the_data_and_not_on_its_place_or_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = corpus_of(tmp_path / "here", 6)
    reference = prepare(here, tmp_path / "a").content_hash
    assert prepare(here[::-1], tmp_path / "b").content_hash != reference
    assert prepare([*here[:5], replace(here[5], text="other")], tmp_path / "c").content_hash != reference
    monkeypatch.setattr(store_module, "SHARD_UTTERANCES", 2)
    assert prepare(corpus_of(tmp_path / "there", 6), tmp_path / "d").content_hash == reference


def test_hugging_face_datasets_reads_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    utterances = corpus_of(tmp_path / "audio", 6)
    prepare(utterances, tmp_path / "store")
    files = str(tmp_path / "store" / "shards" / "*.arrow")
    table = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table["id"][:] == [u.id for u in utterances]
    assert json.loads(table[0]["labels"]) == utterances[0].labels
    audio = table.cast_column("audio", datasets.Audio(decode=False))[3]["audio"]["bytes"]
    np.testing.assert_array_equal(decode_audio(audio)[0], decode_audio(utterances[3].audio)[0])


# Bad recordings ---------------------------------------------------------------------------------------------------


def bad_recordings(folder: Path) -> dict[str, Utterance]:
    folder.mkdir()
    whole = record(folder / "whole.flac", samples=RATE).read_bytes()
    (folder / "text.wav").write_text("this is not a recording")
    (folder / "empty.wav").touch()
    (folder / "truncated.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(folder / "silent.wav", np.zeros(0), RATE)
    soundfile.write(folder / "nan.wav", np.full(800, np.nan), RATE, subtype="FLOAT")
    (folder / "folder.wav").mkdir()
    names = ("text.wav", "empty.wav", "truncated.flac", "silent.wav", "nan.wav", "folder.wav", "missing.wav")
    return {name: Utterance(name, folder / name) for name in names}


def test_bad_recordings_go_into_quarantine_with_a_reason_and_the_rest_goes_on(tmp_path: Path):
    bad = bad_recordings(tmp_path / "bad")
    good = corpus_of(tmp_path / "good", 3)
    summary = prepare([good[0], *bad.values(), *good[1:]], tmp_path / "store")
    assert Store(tmp_path / "store").index.ids == [u.id for u in good]
    assert [entry.id for entry in summary.quarantined] == list(bad)
    lines = (tmp_path / "store" / "quarantine.jsonl").read_text().splitlines()
    for line, (name, utterance) in zip(map(json.loads, lines), bad.items(), strict=True):
        assert (line["id"], line["audio"]) == (name, str(utterance.audio))
        assert str(utterance.audio) in line["reason"]
        assert "\n" not in line["reason"]


def test_strict_names_the_first_bad_recording_and_counts_the_others(tmp_path: Path):
    utterances = [*corpus_of(tmp_path / "good", 3), *bad_recordings(tmp_path / "bad").values()]
    message = refusal(lambda: prepare(utterances, tmp_path / "store", strict=True))
    assert str(tmp_path / "bad" / "text.wav") in message
    assert "6 others" in message
    assert "unfinished" in refusal(lambda: Store(tmp_path / "store"))
    assert prepare(utterances, tmp_path / "store").utterances == 3
    assert "6 others" in refusal(lambda: prepare(utterances, tmp_path / "store", strict=True))  # up to date, yet strict
    assert len(Store(tmp_path / "store")) == 3


def test_nothing_usable_is_an_error_without_strict_too(tmp_path: Path):
    bad = bad_recordings(tmp_path / "bad")
    message = refusal(lambda: prepare([bad["silent.wav"], bad["nan.wav"]], tmp_path / "store"))
    assert message.startswith("no usable recording")
    assert "silent.wav" in message
    assert "1 other)" in message
    assert "no utterances" in refusal(lambda: prepare([], tmp_path / "store"))


def test_a_taken_id_goes_into_quarantine_naming_its_owner(tmp_path: Path):
    first, second = corpus_of(tmp_path / "audio", 2)
    summary = prepare([first, replace(second, id=first.id)], tmp_path / "store")
    assert summary.utterances == 1
    assert str(first.audio) in summary.quarantined[0].reason
    assert summary.quarantined[0].audio == str(second.audio)


def test_a_name_that_no_file_can_have_is_quarantined(tmp_path: Path):
    (good,) = corpus_of(tmp_path / "audio", 1)
    summary = prepare([good, Utterance("nul", tmp_path / "a\0b.wav")], tmp_path / "store")
    assert summary.utterances == 1
    assert "cannot be read (embedded null byte)" in summary.quarantined[0].reason


def test_a_name_in_an_unknown_encoding_is_quarantined_printably(tmp_path: Path):
    good = corpus_of(tmp_path / "audio", 1)
    name = os.fsdecode(b"gr\xfc\xdfe")
    utterances = [*good, Utterance(name, tmp_path / f"{name}.wav")]
    summary = prepare(utterances, tmp_path / "store")
    assert summary.quarantined[0].id.encode() == b"gr\\udcfc\\udcdfe"
    assert "cannot be read as UTF-8" in summary.quarantined[0].reason
    assert prepare(utterances, tmp_path / "store").up_to_date


def test_a_transcript_in_an_unknown_encoding_is_quarantined(tmp_path: Path):
    good, bad = corpus_of(tmp_path / "audio", 2)
    summary = prepare([good, replace(bad, text=os.fsdecode(b"gr\xfc\xdfe"))], tmp_path / "store")
    assert summary.utterances == 1
    assert summary.quarantined[0].reason.endswith("rename the file, or mend the text")


# Again, interrupted, changed --------------------------------------------------------------------------------------


def test_preparing_again_writes_nothing(tmp_path: Path):
    utterances = [*corpus_of(tmp_path / "audio", 9), *bad_recordings(tmp_path / "bad").values()]
    first = prepare(utterances, tmp_path / "store")
    before = snapshot(tmp_path / "store")
    second = prepare(utterances, tmp_path / "store")
    assert second == replace(first, up_to_date=True)
    assert snapshot(tmp_path / "store") == before


def test_changed_input_rewrites_the_shards_that_changed(tmp_path: Path):
    utterances = corpus_of(tmp_path / "audio", 12)
    first = prepare(utterances, tmp_path / "store")
    before = snapshot(tmp_path / "store")
    record(utterances[5].audio, samples=999, seed=99)
    second = prepare(utterances[:11], tmp_path / "store")
    after = snapshot(tmp_path / "store")
    assert (second.up_to_date, second.utterances) == (False, 11)
    assert second.content_hash != first.content_hash
    kept = [name for name in after if after[name] == before[name]]
    assert kept == ["quarantine.jsonl", "shards/00000.arrow"] or kept == ["shards/00000.arrow"]
    prepare(utterances[:3], tmp_path / "store")
    assert sorted(path.name for path in (tmp_path / "store" / "shards").iterdir()) == ["00000.arrow"]


def test_a_recording_that_is_mended_leaves_quarantine(tmp_path: Path):
    utterances = corpus_of(tmp_path / "audio", 3)
    data = utterances[1].audio.read_bytes()
    utterances[1].audio.unlink()
    assert prepare(utterances, tmp_path / "store").utterances == 2
    utterances[1].audio.write_bytes(data)
    assert prepare(utterances, tmp_path / "store").quarantined == ()


def test_a_recording_that_is_mended_without_a_trace_leaves_quarantine(tmp_path: Path) -> None:
    utterances = corpus_of(tmp_path / "audio", 6)
    audio, whole = utterances[1].audio, utterances[1].audio.read_bytes()
    status = audio.stat()
    audio.write_bytes(bytes(len(whole)))
    os.utime(audio, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prepare(utterances, tmp_path / "store").utterances == 5
    assert prepare(utterances, tmp_path / "store").up_to_date
    audio.write_bytes(whole)
    os.utime(audio, ns=(status.st_atime_ns, status.st_mtime_ns))
    summary = prepare(utterances, tmp_path / "store")
    assert (summary.utterances, summary.quarantined, summary.up_to_date) == (6, (), False)


def test_a_transcript_without_a_recording_is_called_that(tmp_path: Path) -> None:
    record(tmp_path / "a.wav")
    (tmp_path / "b.txt").write_text("words")
    summary = prepare(get_corpus("folder").prepare(tmp_path), tmp_path / "store")
    assert [each.reason for each in summary.quarantined] == [
        f"{tmp_path / 'b.*'}: a transcript without a recording; put it beside one, or away"
    ]


def test_recordings_of_another_folder_do_not_replace_those_whose_names_they_share(tmp_path: Path) -> None:
    prepare(corpus_of(tmp_path / "one", 5), tmp_path / "store")
    whole = contents(tmp_path / "store")
    message = refusal(lambda: prepare(corpus_of(tmp_path / "two", 3), tmp_path / "store"))
    assert message.startswith(f"{tmp_path / 'store'}: holds recordings of {tmp_path / 'one'}; ")
    assert contents(tmp_path / "store") == whole
    more = [replace(each, id=f"more/{each.id}") for each in corpus_of(tmp_path / "more", 2)]
    assert prepare([*corpus_of(tmp_path / "one", 5), *more], tmp_path / "store").utterances == 7


def test_a_corpus_that_was_moved_or_written_anew_elsewhere_is_prepared_again(tmp_path: Path) -> None:
    prepare(corpus_of(tmp_path / "one", 5), tmp_path / "store")
    anew = corpus_of(tmp_path / "two", 5)
    assert prepare(anew, tmp_path / "store").utterances == 5
    moved = tmp_path / os.fsdecode(b"in no encoding: \xff")
    (tmp_path / "two").rename(moved)
    more = Utterance("more", record(tmp_path / "more.wav"))
    utterances = [replace(each, audio=moved / each.audio.name) for each in anew]
    assert prepare([*utterances, more], tmp_path / "store").utterances == 6
    assert prepare(utterances, tmp_path / "store").removed == 1


@pytest.mark.parametrize("damaged", ["shards/00001.arrow", "index.arrow", "quarantine.jsonl"])
def test_a_damaged_file_is_named_when_read_and_mended_when_prepared_again(tmp_path: Path, damaged: str):
    utterances = [*corpus_of(tmp_path / "audio", 8), *bad_recordings(tmp_path / "bad").values()]
    prepare(utterances, tmp_path / "store")
    whole = contents(tmp_path / "store")
    path = tmp_path / "store" / damaged
    path.write_bytes(path.read_bytes()[:-100])
    if damaged.endswith(".arrow"):
        assert damaged in refusal(lambda: Store(tmp_path / "store").read(5))
    assert not prepare(utterances, tmp_path / "store").up_to_date
    assert contents(tmp_path / "store") == whole


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
import ctal.store
from ctal.corpora import Utterance

def die(done, total):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    audio, store, workers = sys.argv[1:]
    ctal.store.SHARD_UTTERANCES = 4
    utterances = [Utterance(path.stem, path) for path in sorted(Path(audio).iterdir())]
    ctal.store.prepare_store(utterances, Path(store), corpus="test", workers=int(workers), progress=die)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_run_again_keeps_whole_shards_and_equals_uninterrupted(tmp_path: Path, workers: int):
    utterances = [Utterance(u.id, u.audio) for u in corpus_of(tmp_path / "audio", 80)]
    store, script = tmp_path / "store", tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    # Workers hold the pipes too, so that this ends only when they have ended: none outlives a killed parent.
    command = [sys.executable, script, tmp_path / "audio", store, str(workers)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert "unfinished" in refusal(lambda: Store(store))

    (store / "shards" / "00007.arrow.part").write_bytes(b"half")
    before = {name: facts for name, facts in snapshot(store).items() if name.endswith(".arrow")}
    assert 1 <= len(before) < 20
    prepare(utterances, store)
    after = snapshot(store)
    assert {name: after[name] for name in before} == before
    prepare(utterances, tmp_path / "uninterrupted")
    assert contents(store) == contents(tmp_path / "uninterrupted")


def test_a_killed_worker_ends_the_run_with_one_line_and_what_is_finished_is_kept(tmp_path: Path):
    utterances = corpus_of(tmp_path / "audio", 80)

    def kill_a_worker(done: int, total: int) -> None:
        if done:
            for worker in multiprocessing.active_children():
                worker.kill()

    def run() -> None:
        prepare_store(utterances, tmp_path / "store", corpus="test", workers=2, progress=kill_a_worker)

    begin = time.monotonic()
    assert "a worker process was killed" in refusal(run)
    assert time.monotonic() - begin < 120
    assert list((tmp_path / "store" / "shards").glob("*.arrow"))
    assert prepare(utterances, tmp_path / "store").utterances == 80


def test_a_full_disk_is_one_line_and_earlier_shards_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    utterances = corpus_of(tmp_path / "audio", 12)
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # store.json and two shards are written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = refusal(lambda: prepare(utterances, tmp_path / "store"))
    assert "No space left on device" in message
    assert "00002.arrow" in message
    assert sorted(contents(tmp_path / "store")) == ["shards/00000.arrow", "shards/00001.arrow", "store.json"]
    before = snapshot(tmp_path / "store")
    assert prepare(utterances, tmp_path / "store").utterances == 12
    after = snapshot(tmp_path / "store")
    assert all(after[name] == before[name] for name in ("shards/00000.arrow", "shards/00001.arrow"))


def test_progress_counts_every_utterance_once_and_ends_at_the_total(tmp_path: Path):
    utterances = corpus_of(tmp_path / "audio", 9)
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        prepare_store(
            [*utterances, utterances[0]],
            tmp_path / "store",
            corpus="test",
            workers=1,
            progress=lambda done, total: seen.append((done, total)),
        )
    assert seen == [(1, 10), (5, 10), (9, 10), (10, 10), (10, 10)]  # the tenth has a taken id


# Where it is written ----------------------------------------------------------------------------------------------


def test_nothing_that_is_not_this_store_is_overwritten(tmp_path: Path):
    utterances = corpus_of(tmp_path / "audio", 2)
    before = contents(tmp_path / "audio")
    assert "is not empty and not a store" in refusal(lambda: prepare(utterances, tmp_path / "audio"))
    assert "is a file" in refusal(lambda: prepare(utterances, utterances[0].audio))
    assert contents(tmp_path / "audio") == before
    prepare(utterances, tmp_path / "store")
    with pytest.raises(InputError, match="holds the corpus 'test'"):
        prepare_store(utterances, tmp_path / "store", corpus="other")


def test_a_store_of_other_recordings_is_not_replaced_and_those_that_are_gone_are_counted(tmp_path: Path):
    one, two, three = (Utterance(name, record(tmp_path / f"{name}.wav")) for name in ("one", "two", "three"))
    assert prepare([one, two], tmp_path / "store").removed == 0
    before = contents(tmp_path / "store")
    assert "holds 2 other utterances; name a new folder" in refusal(lambda: prepare([three], tmp_path / "store"))
    interrupted = json.loads((tmp_path / "store" / "store.json").read_text()) | {"complete": False}
    shutil.copytree(tmp_path / "store", tmp_path / "part")
    (tmp_path / "part" / "store.json").write_text(json.dumps(interrupted))
    (tmp_path / "part" / "index.arrow").unlink()
    assert "holds 2 other utterances; name a new folder" in refusal(lambda: prepare([three], tmp_path / "part"))
    with pytest.raises(InputError, match="holds the corpus 'test'"):
        prepare_store([one, two], tmp_path / "part", corpus="other")
    assert contents(tmp_path / "store") == before
    assert prepare([two, three], tmp_path / "store").removed == 1


def test_a_folder_that_a_kill_left_at_once_is_taken_up(tmp_path: Path):
    (tmp_path / "store" / "shards").mkdir(parents=True)
    (tmp_path / "store" / "store.json.part").touch()
    sound = record(tmp_path / "a.wav")
    assert prepare([Utterance("a", sound)], tmp_path / "store").utterances == 1


def test_two_cannot_prepare_one_store_at_once(tmp_path: Path):
    utterances = corpus_of(tmp_path / "audio", 2)

    def prepare_inside(done: int, total: int) -> None:
        message = refusal(lambda: prepare(utterances, tmp_path / "store"))
        assert "another process is writing this store" in message

    prepare_store(utterances, tmp_path / "store", corpus="test", progress=prepare_inside)


# Reading ----------------------------------------------------------------------------------------------------------


def test_a_path_that_is_no_whole_store_is_one_line_with_the_mend(tmp_path: Path):
    assert "no such store" in refusal(lambda: Store(tmp_path / "absent"))
    assert "not a store" in refusal(lambda: Store(tmp_path))
    store = tmp_path / "store"
    prepare(corpus_of(tmp_path / "audio", 8), store)
    manifest = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(manifest | {"version": 99}))
    assert "upgrade ctal" in refusal(lambda: Store(store))
    (store / "store.json").write_text("{")
    assert "cannot be read" in refusal(lambda: Store(store))
    (store / "store.json").write_text(json.dumps(manifest))
    (store / "shards" / "00001.arrow").unlink()
    assert "1 of 2 shards" in refusal(lambda: Store(store))


def test_a_store_prepared_anew_while_it_is_read_is_noticed(tmp_path: Path):
    utterances = corpus_of(tmp_path / "audio", 8)
    prepare(utterances, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert store.read(0).id == "u000"
    prepare(utterances[::-1], tmp_path / "store")
    assert "prepared anew" in refusal(lambda: store.read(5))


def read_ids(store: Store) -> list[str]:
    return [store.read(i).id for i in range(len(store))]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_store_travels_to_workers_as_its_path(tmp_path: Path, start_method: str):
    utterances = corpus_of(tmp_path / "audio", 6)
    prepare(utterances, tmp_path / "store")
    store = Store(tmp_path / "store")
    read_ids(store)  # maps are open now, and stay here
    assert len(pickle.dumps(store)) < 300
    with multiprocessing.get_context(start_method).Pool(1) as pool:
        assert pool.apply(read_ids, (store,)) == [u.id for u in utterances]


def test_no_more_than_so_many_shards_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAPS", 2)
    utterances = corpus_of(tmp_path / "audio", 24)
    prepare(utterances, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert read_ids(store) == [each.id for each in utterances]
    maps = Path("/proc/self/maps")
    if maps.is_file():
        shards = str(tmp_path / "store" / "shards")
        assert len({line[line.index(shards) :] for line in maps.read_text().splitlines() if shards in line}) == 2


def test_reading_holds_no_file_open_and_opens_only_what_is_asked_for(tmp_path: Path):
    prepare(corpus_of(tmp_path / "audio", 12), tmp_path / "store")
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    store = Store(tmp_path / "store")
    store.read(11)
    assert store._shard.cache_info().currsize == 1
    # Links are read one by one: a descriptor may be closed meanwhile, the listing's own for one.
    held = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert not [path for path in held if path.startswith(str(tmp_path.resolve()))]


def test_importing_the_store_imports_no_torch():
    code = "import sys, ctal.store; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@needs_real
def test_real_speech_is_stored_whole_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # shards of the size that users get
    utterances = list(get_corpus("librispeech").prepare(REAL / "LibriSpeech"))
    summary = prepare(utterances, tmp_path / "store")
    assert (summary.utterances, summary.with_text, summary.speakers, summary.quarantined) == (100, 100, 10, ())
    assert round(summary.hours * 60, 1) == 12.8
    store = Store(tmp_path / "store")
    for i in (0, 50, 99):
        assert store.read(i).audio == utterances[i].audio.read_bytes()


# Segments of longer recordings ------------------------------------------------------------------------------------


def segment(audio: Path, start: float | None, end: float | None) -> Utterance:
    return Utterance(f"{audio.stem}/{start}-{end}", audio, start=start, end=end)


def test_a_segment_is_stored_alone_with_exactly_its_samples(tmp_path: Path):
    audio = record(tmp_path / "long.wav", samples=5 * RATE)
    prepare([segment(audio, 1.0, 2.25), segment(audio, None, 0.5), segment(audio, 4.5, None)], tmp_path / "store")
    store = Store(tmp_path / "store")
    whole, _ = soundfile.read(audio, dtype="int16")
    for i, (start, end) in enumerate([(1.0, 2.25), (0.0, 0.5), (4.5, 5.0)]):
        stored = store.read(i).audio
        samples, rate = soundfile.read(BytesIO(stored), dtype="int16")
        np.testing.assert_array_equal(samples, whole[int(start * RATE) : int(end * RATE)])
        info = soundfile.info(BytesIO(stored))
        assert (rate, info.format, info.subtype, info.channels) == (RATE, "FLAC", "PCM_16", 1)
        assert store.index.seconds[i] == end - start
        assert store.index.frames[i] == 1 + len(samples) // 200


def test_a_segment_of_a_stereo_recording_is_stored_as_mono_at_its_own_rate(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", noise(44_100, channels=2), 44_100, subtype="PCM_16")
    prepare([segment(tmp_path / "a.wav", 0.25, 0.5)], tmp_path / "store")
    samples, rate = soundfile.read(BytesIO(Store(tmp_path / "store").read(0).audio), dtype="float32")
    expected = decode_audio(tmp_path / "a.wav")[0][11_025:22_050]
    assert rate == 44_100
    np.testing.assert_allclose(samples, expected, atol=0.51 / 32_768)


def test_an_end_beyond_the_recording_is_clipped_to_it(tmp_path: Path):
    audio = record(tmp_path / "a.wav", samples=RATE)
    prepare([segment(audio, 0.5, 1.2)], tmp_path / "store")
    assert Store(tmp_path / "store").index.seconds[0] == 0.5


@pytest.mark.parametrize(
    ("start", "end"), [(1.0, 2.0), (7.0, 9.0), (0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.5, 0.50001), (float("nan"), 1.0)]
)
def test_a_segment_that_is_empty_or_outside_is_quarantined_in_one_line_with_file_and_times(
    tmp_path: Path, start: float, end: float
):
    audio = record(tmp_path / "a.wav", samples=RATE)
    summary = prepare([segment(audio, start, end), Utterance("whole", audio)], tmp_path / "store")
    (entry,) = summary.quarantined
    assert entry.reason.startswith(f"{audio}: the segment from {start:g} to {end:g} s")
    assert "lasts 1.00 s" in entry.reason
    assert "\n" not in entry.reason
    assert summary.utterances == 1


def test_segments_of_a_missing_or_broken_recording_are_quarantined_each(tmp_path: Path):
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    bad = [segment(tmp_path / name, start, start + 1) for name in ("lost.wav", "broken.wav") for start in (0, 1)]
    summary = prepare([*bad, Utterance("good", record(tmp_path / "good.wav"))], tmp_path / "store")
    assert [entry.id for entry in summary.quarantined] == [utterance.id for utterance in bad]


def test_consecutive_segments_share_a_shard_and_decode_their_recording_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decoded: list[object] = []

    def counting(source: bytes | Path, name: str | None = None) -> tuple[np.ndarray, int]:
        decoded.append(source)
        return decode_audio(source, name)

    first, second = record(tmp_path / "a.wav", samples=RATE), record(tmp_path / "b.wav", samples=RATE)
    monkeypatch.setattr(store_module, "decode_audio", counting)
    monkeypatch.setattr(store_module, "SHARD_BYTES", int(2.5 * first.stat().st_size))
    utterances = [segment(audio, i / 4, (i + 1) / 4) for audio in (first, second) for i in range(2)]
    assert prepare(utterances, tmp_path / "store").shards == 1
    assert decoded == [first, second]


def test_changing_a_segments_times_changes_its_shard_and_whole_recordings_keep_their_fingerprints(tmp_path: Path):
    audio = record(tmp_path / "a.wav", samples=RATE)

    def fingerprint(utterance: Utterance) -> str:
        return store_module._plan([utterance])[0][0].fingerprint

    whole = Utterance("a", audio)
    cuts = [replace(whole, start=0.0), replace(whole, start=0.1), replace(whole, start=0.1, end=0.5)]
    assert len({fingerprint(utterance) for utterance in (whole, *cuts)}) == 4
    status = audio.stat()
    facts = [["a", str(audio), status.st_size, status.st_mtime_ns, None, None, None, "{}"]]
    written = json.dumps([store_module.FORMAT, store_module.VERSION, facts])  # as before there were segments
    assert fingerprint(whole) == hashlib.sha256(written.encode()).hexdigest()
