import io
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import REAL, needs_real
from ctal.corpora import Utterance, get_corpus
from ctal.corpora.folder import transcript_beside
from ctal.errors import InputError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not read here")


def utterances(corpus: str, root: Path) -> list[Utterance]:
    return list(get_corpus(corpus).prepare(root))


def refusal(corpus: str, root: Path) -> str:
    with pytest.raises(InputError) as caught:
        utterances(corpus, root)
    message = str(caught.value)
    assert "\n" not in message
    return message


def lock(locked: Path, patch: pytest.MonkeyPatch) -> None:
    """Take all rights to a file or folder away, as chmod cannot where root runs the tests."""

    def refusing(call: Callable[..., Any], *, needs_rights_to_it: bool) -> Callable[..., Any]:
        def refuse(path: Any = ".", *args: Any, **named: Any) -> Any:
            if isinstance(path, str | Path):
                around = Path(path).parents
                if locked in around or (needs_rights_to_it and locked == Path(path)):
                    raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **named)

        return refuse

    for module, name in ((os, "listdir"), (os, "scandir"), (io, "open")):
        patch.setattr(module, name, refusing(getattr(module, name), needs_rights_to_it=True))
    patch.setattr(os, "stat", refusing(os.stat, needs_rights_to_it=False))


def librispeech(root: Path) -> Path:
    chapter = root / "dev-clean" / "84" / "121123"
    touch(chapter / "84-121123-0000.flac", chapter / "84-121123-0002.flac")
    (chapter / "84-121123.trans.txt").write_text("84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS\n")
    for name in ("._84-121123-0000.flac", "._84-121123.trans.txt"):  # of macOS
        (chapter / name).write_bytes(b"\x00\x05\x16\x07\xff")
    touch(root / "train-clean-100" / "19" / "198" / "19-198-0000.flac", root / "SPEAKERS.TXT")
    return root


# LibriSpeech ------------------------------------------------------------------------------------------------------


def test_librispeech_gives_speaker_and_transcript_and_subsets_side_by_side_are_its_split(tmp_path: Path):
    found = {u.id: u for u in utterances("librispeech", librispeech(tmp_path))}
    assert found["84-121123-0000"].text == "GO DO YOU HEAR"
    assert found["84-121123-0002"].text is None  # a recording without a line
    assert found["19-198-0000"].text is None  # a chapter without transcripts
    assert [u.speaker for u in found.values()] == ["84", "84", "84", "19"]
    assert {u.speaker: u.split for u in found.values()} == {"84": "validation", "19": "train"}


def test_librispeech_yields_a_transcript_without_recording_so_that_it_is_reported(tmp_path: Path):
    lost = next(u for u in utterances("librispeech", librispeech(tmp_path)) if u.id == "84-121123-0001")
    assert not lost.audio.exists()


def test_a_subset_of_librispeech_is_a_root_too_with_the_same_utterances_and_no_split(tmp_path: Path):
    everything = utterances("librispeech", librispeech(tmp_path))
    assert utterances("librispeech", tmp_path / "dev-clean") == [replace(each, split=None) for each in everything[:3]]


@pytest.mark.parametrize("corpus", ["librispeech", "folder", "manifest"])
def test_a_missing_path_is_one_clear_line(tmp_path: Path, corpus: str):
    assert f"{tmp_path / 'absent'}: no such" in refusal(corpus, tmp_path / "absent")


@pytest.mark.parametrize("corpus", ["librispeech", "folder"])
def test_an_empty_folder_is_one_clear_line(tmp_path: Path, corpus: str):
    assert refusal(corpus, tmp_path).startswith(f"{tmp_path}: no ")


@needs_real
def test_real_librispeech_is_found_whole_with_and_without_transcripts():
    with_text = utterances("librispeech", REAL / "LibriSpeech")
    audio_only = utterances("librispeech", REAL / "LibriSpeech-audio-only" / "train-clean-100")
    assert (len(with_text), sum(u.text is not None for u in with_text)) == (100, 100)
    assert (len(audio_only), sum(u.text is not None for u in audio_only)) == (251, 0)
    assert len({u.speaker for u in with_text}) == 10


@pytest.mark.parametrize("name", ["121123", "121123/84-121123.trans.txt"])
def test_a_chapter_or_transcript_of_librispeech_without_rights_is_one_clear_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    locked = librispeech(tmp_path) / "dev-clean" / "84" / name
    lock(locked, monkeypatch)
    assert refusal("librispeech", tmp_path) == f"{locked}: cannot be read (Permission denied); check its rights"


# A folder of recordings -------------------------------------------------------------------------------------------


def test_a_folder_gives_recordings_at_any_depth_with_the_text_beside_them(tmp_path: Path):
    touch(tmp_path / "b.WAV", tmp_path / "sub" / "a.v1.flac", tmp_path / "c.mp3")
    (tmp_path / "sub" / "a.v1.txt").write_text("\ufeff  Grüße, welt\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text(" \n")
    found = utterances("folder", tmp_path)
    assert [(u.id, u.text, u.speaker) for u in found] == [
        ("b", None, None),
        ("c", None, None),
        ("sub/a.v1", "Grüße, welt", None),
    ]


def test_ids_do_not_depend_on_where_the_corpus_lies(tmp_path: Path):
    for place in ("here", "over/there"):
        touch(tmp_path / place / "sub" / "a.wav", tmp_path / place / "b.wav")
        (tmp_path / place / "m.csv").write_text("audio\nsub/a.wav\n" + str(tmp_path / place / "b.wav"))
    for corpus, root in (("folder", "."), ("manifest", "m.csv")):
        here, there = (utterances(corpus, tmp_path / place / root) for place in ("here", "over/there"))
        assert {u.id for u in here} == {u.id for u in there} == {"sub/a", "b"}


def test_a_text_without_recording_and_a_format_nobody_reads_are_yielded_to_be_reported(tmp_path: Path):
    touch(tmp_path / "a.wav", tmp_path / "phone.m4a")
    (tmp_path / "alone.txt").write_text("hello")
    assert [u.audio.name for u in utterances("folder", tmp_path)] == ["a.wav", "alone.*", "phone.m4a"]


def test_other_files_in_a_folder_are_counted_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    touch(tmp_path / "a.wav", tmp_path / "._a.wav", tmp_path / "x.pdf", tmp_path / "y.pdf", tmp_path / "Makefile")
    with caplog.at_level(logging.WARNING):
        assert len(utterances("folder", tmp_path)) == 1
    assert "4 files or folders that are not recordings (2 .pdf" in caplog.text


def test_recordings_in_hidden_folders_such_as_of_a_trash_are_left_out_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    root = tmp_path / ".cache" / ".here"  # as the user named it
    touch(root / "sub" / "a.wav", root / ".Trash-1000" / "files" / "deleted.wav", root / "sub" / ".git" / "b.wav")
    with caplog.at_level(logging.WARNING):
        assert [u.id for u in utterances("folder", root)] == ["sub/a"]
    assert "2 files or folders that are not recordings (2 hidden)" in caplog.text


@pytest.mark.parametrize("corpus", ["folder", "librispeech"])
@pytest.mark.parametrize("name", ["lost+found", ".Trash-1000"])
def test_what_the_system_keeps_for_itself_at_the_top_of_a_disk_does_not_matter(
    tmp_path: Path, corpus: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    expected = utterances(corpus, librispeech(tmp_path))
    touch(tmp_path / name / "a.wav")
    lock(tmp_path / name, monkeypatch)
    assert utterances(corpus, tmp_path) == expected


def test_a_folder_without_rights_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path / "a.wav", tmp_path / "sub" / "b.wav")
    lock(tmp_path / "sub", monkeypatch)
    refused = f"{tmp_path / 'sub'}: cannot be read (Permission denied); check its rights"
    assert refusal("folder", tmp_path) == refused
    assert refusal("folder", tmp_path / "sub") == refused


def test_links_to_folders_are_followed_though_not_in_circles(tmp_path: Path):
    touch(tmp_path / "elsewhere" / "a.wav")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "root")
    assert [u.id for u in utterances("folder", tmp_path / "root")] == ["link/a"]


def test_a_transcript_that_cannot_be_read_is_left_to_the_store_to_quarantine(tmp_path: Path):
    touch(tmp_path / "a.wav", tmp_path / "b.wav", tmp_path / "c.wav")
    (tmp_path / "a.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "b.txt").write_text("welt")
    (tmp_path / "c.txt").symlink_to(tmp_path / "nowhere.txt")
    latin, fine, missing = utterances("folder", tmp_path)
    assert (latin.text or "").encode(errors="surrogateescape") == "Grüße".encode("latin-1")
    assert fine.text == "welt"
    assert [transcript_beside(each.audio) for each in (latin, fine, missing)] == [latin.text, "welt", missing.text]
    with pytest.raises(UnicodeEncodeError):
        (missing.text or "").encode()


# Manifests --------------------------------------------------------------------------------------------------------


def manifest(folder: Path, text: str, name: str = "m.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_tsv_and_json_lines_say_the_same(tmp_path: Path):
    row = {
        "audio": "wav/a.flac",
        "id": "u1",
        "text": 'Well, "no"',
        "speaker": "03",
        "split": "dev",
        "emotion": "anger",
        "sentiment": "-1.5",
    }
    comma = manifest(tmp_path, ",".join(row) + '\nwav/a.flac,u1,"Well, ""no""",03,dev,anger,-1.5\n')
    tab = manifest(tmp_path, "\t".join(row) + '\nwav/a.flac\tu1\t"Well, ""no"""\t03\tdev\tanger\t-1.5\n', "m.tsv")
    lines = manifest(tmp_path, json.dumps(row | {"sentiment": -1.5}) + "\n\n", "m.jsonl")
    labels = {"emotion": "anger", "sentiment": -1.5}
    expected = Utterance("u1", tmp_path / "wav/a.flac", 'Well, "no"', "03", "validation", labels)
    for path in (comma, tab, lines):
        assert utterances("manifest", path) == [expected]


def test_further_labels_come_in_an_object_and_empty_cells_are_unknown(tmp_path: Path):
    lines = manifest(
        tmp_path, '{"audio": "a.wav", "speaker": 7, "labels": {"arousal": 3, "emotion": "sad"}}', "m.jsonl"
    )
    (only,) = utterances("manifest", lines)
    assert (only.speaker, only.labels) == ("7", {"arousal": 3, "emotion": "sad"})
    (only,) = utterances("manifest", manifest(tmp_path, "audio,text,emotion,sentiment\na.wav,,,\n"))
    assert (only.text, only.labels) == (None, {})
    (only,) = utterances("manifest", manifest(tmp_path, "audio,emotion,sentiment\na.wav, , \n"))
    assert only.labels == {}
    (only,) = utterances("manifest", manifest(tmp_path, '{"audio": "a.wav", "labels": {"emotion": " "}}', "m.jsonl"))
    assert only.labels == {}


def test_an_unused_column_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        utterances("manifest", manifest(tmp_path, "audio,sentence\na.wav,b01\n"))
    assert "not used: sentence" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("m.csv", "audoi,text\na.wav,x\n", "no column 'audio' (did you mean 'audoi'?)"),
        ("m.jsonl", '{"audio_path": "a.wav"}', "no column 'audio' (did you mean 'audio_path'?)"),
        ("m.csv", "", "no column 'audio'"),
        ("m.csv", "audio;text\na.wav;x\n", "fields seem to be separated by ';'; save it with commas"),
        ("m.csv", "audio,text\n", "has no recordings"),
        ("m.jsonl", "\n", "has no recordings"),
        ("m.csv", "audio,text\na.wav,x\nb.wav,well, no\n", "line 3: 3 fields"),
        ("m.csv", 'audio,text\na.wav,"x"y\n', "line 2: not CSV"),
        ("m.tsv", 'audio\ttext\na.wav\t"Come in\nb.wav\tor not\nc.wav\tdo"\n', "lines 2 to 4: text in quotes"),
        ("m.csv", 'audio,text\na.wav,x\nb.wav,"y\n"\n', "lines 3 to 4: text in quotes"),
        ("m.csv", 'audio,"text\na.wav,x"\n', "lines 1 to 2: text in quotes"),
        ("m.csv", 'audio,text\na.wav,x\nb.wav,"y\nc.wav,z\n', "line 3: not CSV (unexpected end of data)"),
        ("m.csv", "audio,audio\na.wav,b.wav\n", "'audio' stands there twice"),
        ("m.csv", "audio,text\n,x\n", "line 2: 'audio' is empty"),
        ("m.csv", "audio,text\na.wav,x\n.,x\n", "line 3: 'audio' is '.', which names no file"),
        ("m.csv", "audio,id\n/,x\n", "line 2: 'audio' is '/', which names no file"),
        ("m.csv", "audio,split\na.wav,tran\n", "split 'tran' (did you mean 'train'?)"),
        ("m.csv", "audio,sentiment\na.wav,good\n", "sentiment 'good' is not a number"),
        ("m.csv", "audio,sentiment\na.wav,nan\n", "not a finite number"),
        ("m.csv", "audio,sentiment\na.wav,5\n", "sentiment 5 is not between -3 and 3"),
        ("m.jsonl", '{"audio": "a.wav"}\n{"audio": \n', "line 2: not JSON"),
        ("m.jsonl", f'{{"audio": "a.wav"}}\n{{"audio": "b.wav", "text": {"1" * 5000}}}', "line 2: not JSON"),
        ("m.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("m.jsonl", f'{{"audio": "a.wav", "labels": {{"x": {"1" * 400}}}}}', "line 1: label 'x' is 111"),
        ("m.csv", f"""audio,labels\na.wav,{{x: {"1" * 5000}}}""", "'labels' must be an object"),
        ("m.csv", f"""audio,labels\na.wav,{"1" * 5000}""", "'labels' must be an object"),
        ("m.jsonl", '["a.wav"]', "line 1: not an object"),
        ("m.jsonl", '{"audio": ["a.wav"]}', "'audio' must be text"),
        ("m.jsonl", '{"audio": "a.wav", "labels": "sad"}', "'labels' must be an object"),
        ("m.xlsx", "audio\na.wav\n", "must end in .csv"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_one_line_with_the_place(
    tmp_path: Path, name: str, text: str, says: str
):
    message = refusal("manifest", manifest(tmp_path, text, name))
    assert says in message
    assert name in message


def test_a_manifest_without_rights_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = manifest(tmp_path, "audio\na.wav\n")
    for locked in (path, tmp_path):
        with monkeypatch.context() as patch:
            lock(locked, patch)
            assert refusal("manifest", path) == f"{path}: cannot be read (Permission denied); check its rights"


def test_a_manifest_that_names_its_own_folder_as_a_recording_is_one_clear_line(tmp_path: Path):
    assert "which names no file" in refusal("manifest", manifest(tmp_path, f"audio\n{tmp_path}\n"))


def test_a_manifest_in_another_encoding_is_named(tmp_path: Path):
    (tmp_path / "m.csv").write_bytes("audio,text\na.wav,Grüße\n".encode("latin-1"))
    assert "m.csv: not UTF-8" in refusal("manifest", tmp_path / "m.csv")


@needs_real
def test_the_manifest_of_real_emodb_gives_speakers_and_emotions():
    found = utterances("manifest", REAL / "EmoDB" / "manifest.csv")
    assert len(found) == len({u.id for u in found}) == 535
    assert found[0].id == "wav/03a01Fa"
    assert len({u.labels["emotion"] for u in found}) == 7
    assert len({u.speaker for u in found}) == 10
    assert all(u.audio.is_file() for u in found)
