"""Labelled corpora, in tiny trees of exactly the layout in which they are distributed."""

import csv
import logging
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile

from conftest import REAL, needs_real
from ctal.corpora import Utterance, corpus_names, get_corpus
from ctal.errors import InputError
from ctal.store import Store, StoreSummary, prepare_store
from test_corpora import lock

RATE = 16_000

EMOTIONS = {"angry", "happy", "sad", "neutral", "fearful", "disgusted", "surprised", "bored", "calm", "excited"}
EMOTIONS |= {"frustrated"}


def sound(*paths: Path, seconds: float = 0.1) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * RATE)), RATE)


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return path


def write_csv(path: Path, *rows: Mapping[str, object], encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def utterances(corpus: str, root: Path) -> list[Utterance]:
    return list(get_corpus(corpus).prepare(root))


def by_id(corpus: str, root: Path) -> dict[str, Utterance]:
    return {utterance.id: utterance for utterance in utterances(corpus, root)}


def refusal(corpus: str, root: Path) -> str:
    with pytest.raises(InputError) as caught:
        utterances(corpus, root)
    message = str(caught.value)
    assert "\n" not in message
    return message


def utterances_or_refusal(corpus: str, root: Path) -> list[Utterance] | str:
    try:
        return utterances(corpus, root)
    except InputError as error:
        return str(error)


def store_of(corpus: str, root: Path, store: Path) -> StoreSummary:
    return prepare_store(get_corpus(corpus).prepare(root), store, corpus=corpus, workers=1)


# The trees --------------------------------------------------------------------------------------------------------

IEMOCAP_CODES = ("ang", "hap", "exc", "sad", "neu", "fru", "xxx", "sur")


def iemocap(root: Path) -> Path:
    """Five sessions of one dialog, in which an utterance a code alternates between the speakers."""
    for number in range(1, 6):
        dialog = f"Ses0{number}F_impro01"
        session = root / "IEMOCAP_full_release" / f"Session{number}"
        evaluation, transcript = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""], []
        for i, code in enumerate(IEMOCAP_CODES):
            id = f"{dialog}_{'FM'[i % 2]}{i:03d}"
            sound(session / "sentences" / "wav" / dialog / f"{id}.wav")
            evaluation += [f"[{i}.2901 - {i}.9357]\t{id}\t{code}\t[2.5000, 2.5000, 2.5000]", "C-E2:\tNeutral;\t()"]
            evaluation += ["A-E3:\tval 3; act 2; dom  2;\t()", ""]
            transcript.append(f"{id} [00{i}.2901-00{i}.9357]: Excuse me: {code}.")
        write(session / "dialog" / "EmoEvaluation" / f"{dialog}.txt", *evaluation)
        write(session / "dialog" / "transcriptions" / f"{dialog}.txt", *transcript, "M: [LAUGHTER]")
        write(session / "dialog" / "EmoEvaluation" / f"._{dialog}.txt", "macOS")
    return root


MOSEI_LABELS = [
    {"video_id": "-3g5yACwYnA", "clip_id": 0, "text": "Key is, part", "label": 1.0, "annotation": "P", "mode": "train"},
    {"video_id": "-3g5yACwYnA", "clip_id": 2, "text": "of it", "label": -2.3333, "annotation": "N", "mode": "train"},
    {"video_id": "_0efYOjQYRc_", "clip_id": 1, "text": "Well", "label": 0, "annotation": "E", "mode": "valid"},
    {"video_id": "zv0Jl4TIQDc", "clip_id": 0, "text": "No", "label": -3.0, "annotation": "N", "mode": "test"},
]


def mosei_clips(root: Path) -> Path:
    write_csv(root / "label.csv", *MOSEI_LABELS)
    for row in MOSEI_LABELS:
        sound(root / "Raw" / str(row["video_id"]) / f"{row['clip_id']}.wav")
    return root


def mosei(root: Path) -> Path:
    write_csv(root / "label.csv", *MOSEI_LABELS)
    sound(*(root / "Audio/Full/WAV_16000" / f"{row['video_id']}.wav" for row in MOSEI_LABELS), seconds=2)
    segments = root / "Transcript/Segmented/Combined"
    lines = ["-3g5yACwYnA___0___0.0___0.75___Key is, part", "-3g5yACwYnA___1___0.7___1.2___unlabelled"]
    write(segments / "-3g5yACwYnA.txt", *lines, "-3g5yACwYnA___2___1.25___2.1___of___it")
    write(segments / "_0efYOjQYRc_.txt", "_0efYOjQYRc____1___0.5___1.5___Well ")
    write(segments / "zv0Jl4TIQDc.txt", "zv0Jl4TIQDc___0___0.1___0.6___No")
    return root


MELD_PARTS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
MELD_EMOTIONS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")


def meld(root: Path, suffix: str = ".wav") -> Path:
    for part, clips in MELD_PARTS.items():
        rows = [
            {
                "Sr No.": i + 1,
                "Utterance": f"You’re a genius, {emotion}!",
                "Speaker": ("Joey", "Phoebe")[i % 2],
                "Emotion": emotion,
                "Sentiment": "negative",
                "Dialogue_ID": 0,
                "Utterance_ID": i,
                "StartTime": "00:20:57,256",
            }
            for i, emotion in enumerate(MELD_EMOTIONS)
        ]
        write_csv(root / f"{part}_sent_emo.csv", *rows)
        for i in range(len(rows)):
            clip = root / clips / f"dia0_utt{i}{suffix}"
            sound(clip) if suffix == ".wav" else write(clip, "a video")
    sound(root / MELD_PARTS["test"] / "final_videos_testdia0_utt0.wav")
    return root


def cremad(root: Path) -> Path:
    names = ["1001_DFA_ANG_XX", "1001_IEO_HAP_LO", "1002_WSI_SAD_HI", "1002_TIE_NEU_XX", "1003_MTI_FEA_XX"]
    sound(*(root / "AudioWAV" / f"{name}.wav" for name in [*names, "1040_ITH_DIS_X"]))
    return root


def ravdess(root: Path) -> Path:
    for actor in ("01", "02"):
        names = [f"03-01-0{emotion}-01-0{1 + emotion % 2}-01-{actor}" for emotion in range(1, 9)]
        sound(*(root / f"Actor_{actor}" / f"{name}.wav" for name in names))
    return root


def emodb(root: Path, suffix: str = ".wav") -> Path:
    names = ["03a01Fa", "03b10Wb", "08a04La", "08b02Ea", "16a05Ab", "16b09Td", "16a02Na"]
    sound(*(root / "wav" / f"{name}{suffix}" for name in names))
    return root


def voxceleb1(root: Path) -> Path:
    ids = ["id10001/1zcIwhmdeo4/00001", "id10270/5r0dWxy17C8/00001", "id10270/x6uYqmx31kE/00002"]
    sound(*(root / "wav" / f"{id}.wav" for id in [*ids, "id10309/0b1inHMAr6o/00001", "id10310/0b1inHMAr6o/00007"]))
    return root


TREES: dict[str, Callable[[Path], Path]] = {
    "iemocap": iemocap,
    "iemocap6": iemocap,
    "mosei": mosei,
    "meld": meld,
    "cremad": cremad,
    "ravdess": ravdess,
    "emodb": emodb,
    "voxceleb1": voxceleb1,
}

WITHOUT_TREE = {"librispeech", "folder", "manifest", "demo"}


# What holds of every one ------------------------------------------------------------------------------------------


def test_every_labelled_corpus_is_tried_here():
    assert set(TREES) | WITHOUT_TREE == set(corpus_names())


@pytest.mark.parametrize("corpus", TREES)
def test_every_utterance_of_the_distributed_layout_reaches_the_store(tmp_path: Path, corpus: str):
    root = TREES[corpus](tmp_path / "root")
    found = utterances(corpus, root)
    summary = store_of(corpus, root, tmp_path / "store")
    assert summary.quarantined == ()
    assert summary.utterances == len(found) > 0
    assert summary.with_text == (0 if corpus == "voxceleb1" else len(found))
    stored = Store(tmp_path / "store").read(0)
    assert (stored.id, stored.speaker, stored.labels) == (found[0].id, found[0].speaker, found[0].labels)


@pytest.mark.parametrize("corpus", TREES)
def test_emotions_are_spelled_alike_in_all_corpora_and_every_speaker_is_named(tmp_path: Path, corpus: str):
    found = utterances(corpus, TREES[corpus](tmp_path))
    assert {u.labels["emotion"] for u in found if "emotion" in u.labels} <= EMOTIONS
    assert all(u.speaker for u in found)


@pytest.mark.parametrize("corpus", TREES)
def test_ids_and_order_do_not_depend_on_where_the_corpus_lies(tmp_path: Path, corpus: str):
    here, there = (utterances(corpus, TREES[corpus](tmp_path / place)) for place in ("here", "over/there"))
    assert [u.id for u in here] == [u.id for u in there]
    assert len({u.id for u in here}) == len(here)


@pytest.mark.parametrize("corpus", TREES)
def test_no_speaker_is_in_two_splits_unless_the_corpus_says_so(tmp_path: Path, corpus: str):
    splits: dict[str | None, set[str | None]] = {}
    for u in utterances(corpus, TREES[corpus](tmp_path)):
        splits.setdefault(u.speaker, set()).add(u.split)
    assert any(len(each) > 1 for each in splits.values()) == get_corpus(corpus).shares_speakers
    prescribed = {split for each in splits.values() for split in each} - {None}
    assert bool(prescribed) == (corpus in ("mosei", "meld", "voxceleb1"))


def test_meld_alone_shares_speakers():
    assert [name for name in corpus_names() if get_corpus(name).shares_speakers] == ["meld"]


@pytest.mark.parametrize("corpus", TREES)
def test_a_missing_or_empty_root_is_one_line_with_the_path_and_the_mend(tmp_path: Path, corpus: str):
    for root in (tmp_path / "absent", tmp_path):
        message = refusal(corpus, root)
        assert message.startswith(str(root))
        assert "; " in message


@pytest.mark.parametrize("corpus", TREES)
def test_help_says_what_root_is_and_where_the_corpus_comes_from(corpus: str):
    text = get_corpus(corpus).help
    assert text.startswith("ROOT: ")
    assert "http" in text


@pytest.mark.parametrize("corpus", TREES)
def test_a_folder_without_rights_loses_no_recording_in_silence(tmp_path: Path, corpus: str):
    expected = utterances(corpus, TREES[corpus](tmp_path / "root"))
    folders = [path for path in (tmp_path / "root").rglob("*") if path.is_dir()]
    refused = 0
    for folder in folders:
        with pytest.MonkeyPatch.context() as patch:
            lock(folder, patch)
            found = utterances_or_refusal(corpus, tmp_path / "root")
        if isinstance(found, str):
            refused += 1
            assert found.startswith(str(folder))
            assert ": cannot be read (Permission denied); check its rights" in found
        else:
            assert found == expected
    assert refused


@pytest.mark.parametrize("corpus", TREES)
def test_a_file_without_rights_is_one_line_or_left_to_the_store(tmp_path: Path, corpus: str):
    expected = utterances(corpus, TREES[corpus](tmp_path / "root"))
    for path in (path for path in (tmp_path / "root").rglob("*") if path.is_file()):
        with pytest.MonkeyPatch.context() as patch:
            lock(path, patch)
            found = utterances_or_refusal(corpus, tmp_path / "root")
        if isinstance(found, str):
            assert found.startswith(f"{path}: cannot be read (Permission denied); check its rights")
        else:
            assert found == expected


@pytest.mark.parametrize("corpus", TREES)
@pytest.mark.parametrize("name", ["lost+found", ".Trash-1000"])
def test_what_lies_at_the_top_of_a_disk_is_no_part_of_a_corpus(tmp_path: Path, corpus: str, name: str):
    expected = utterances(corpus, TREES[corpus](tmp_path / "root"))
    TREES[corpus](tmp_path / "root" / name)
    assert utterances(corpus, tmp_path / "root") == expected
    with pytest.MonkeyPatch.context() as patch:
        lock(tmp_path / "root" / name, patch)
        assert utterances(corpus, tmp_path / "root") == expected


# IEMOCAP ----------------------------------------------------------------------------------------------------------


def test_iemocap_has_four_emotions_with_excited_counted_as_happy(tmp_path: Path):
    found = utterances("iemocap", iemocap(tmp_path))
    counts = Counter(u.labels["emotion"] for u in found)
    assert counts == {"angry": 5, "happy": 10, "sad": 5, "neutral": 5}


def test_iemocap6_keeps_excited_and_frustrated_apart(tmp_path: Path):
    counts = Counter(u.labels["emotion"] for u in utterances("iemocap6", iemocap(tmp_path)))
    assert counts == dict.fromkeys(("angry", "happy", "excited", "sad", "neutral", "frustrated"), 5)


def test_iemocap_names_the_one_who_speaks_and_the_session(tmp_path: Path):
    found = by_id("iemocap", iemocap(tmp_path))
    male = found["Ses03F_impro01_M001"]
    assert (male.speaker, male.labels["session"], male.text) == ("Ses03M", "Ses03", "Excuse me: hap.")
    assert found["Ses03F_impro01_F000"].speaker == "Ses03F"
    assert len({u.speaker for u in found.values()}) == 10
    # Leaving a session out leaves its speakers out.
    assert all(u.speaker and u.speaker.startswith(str(u.labels["session"])) for u in found.values())


def test_labels_that_iemocaps_rule_leaves_out_are_counted_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        utterances("iemocap", iemocap(tmp_path))
    assert "left out 15 utterances with other labels (5 fru, 5 xxx, 5 sur)" in caplog.text


def test_the_release_itself_is_a_root_of_iemocap_too(tmp_path: Path):
    assert by_id("iemocap", iemocap(tmp_path)) == by_id("iemocap", tmp_path / "IEMOCAP_full_release")


@pytest.mark.parametrize("lost", ["Session3", "Session2/dialog/EmoEvaluation", "Session5/sentences/wav"])
def test_a_missing_session_or_folder_of_iemocap_is_named(tmp_path: Path, lost: str):
    folder = iemocap(tmp_path) / "IEMOCAP_full_release" / lost
    folder.rename(tmp_path / "elsewhere")
    assert refusal("iemocap", tmp_path).startswith(f"{folder}: no such folder; IEMOCAP has Session1 to Session5")


def test_an_utterance_of_iemocap_without_sound_is_quarantined(tmp_path: Path):
    wavs = iemocap(tmp_path / "root") / "IEMOCAP_full_release/Session1/sentences/wav"
    lost = wavs / "Ses01F_impro01" / "Ses01F_impro01_F000.wav"
    lost.unlink()
    (entry,) = store_of("iemocap", tmp_path / "root", tmp_path / "store").quarantined
    assert (entry.id, entry.audio) == (lost.stem, str(lost))


def test_an_utterance_that_stands_twice_in_iemocap_is_quarantined(tmp_path: Path):
    folder = iemocap(tmp_path / "root") / "IEMOCAP_full_release/Session1/dialog/EmoEvaluation"
    path = folder / "Ses01F_impro01.txt"
    path.write_text(path.read_text() + "[0.2901 - 0.9357]\tSes01F_impro01_F000\tsad\t[2.5000, 2.5000, 2.5000]\n")
    (entry,) = store_of("iemocap", tmp_path / "root", tmp_path / "store").quarantined
    assert "the id 'Ses01F_impro01_F000' is taken" in entry.reason


# CMU-MOSEI --------------------------------------------------------------------------------------------------------


def test_both_layouts_of_mosei_give_the_same_ids_splits_speakers_and_sentiments(tmp_path: Path):
    raw, clips = by_id("mosei", mosei(tmp_path / "raw")), by_id("mosei", mosei_clips(tmp_path / "clips"))
    assert list(raw) == list(clips) == ["-3g5yACwYnA/0", "-3g5yACwYnA/2", "_0efYOjQYRc_/1", "zv0Jl4TIQDc/0"]
    for id, utterance in raw.items():
        other = clips[id]
        assert (utterance.split, utterance.speaker, utterance.labels) == (other.split, other.speaker, other.labels)
    assert [u.split for u in raw.values()] == ["train", "train", "validation", "test"]
    assert raw["-3g5yACwYnA/2"].labels == {"sentiment": -2.3333}


def test_mosei_segments_have_the_times_and_words_of_the_transcript(tmp_path: Path):
    found = by_id("mosei", mosei(tmp_path))
    second = found["-3g5yACwYnA/2"]
    assert (second.start, second.end, second.text) == (1.25, 2.1, "of___it")
    assert second.audio == tmp_path / "Audio/Full/WAV_16000/-3g5yACwYnA.wav"
    assert (found["_0efYOjQYRc_/1"].start, found["_0efYOjQYRc_/1"].text) == (0.5, "Well")


def test_the_stored_segment_is_cut_from_the_recording_and_its_end_clipped(tmp_path: Path):
    store_of("mosei", mosei(tmp_path / "root"), tmp_path / "store")
    np.testing.assert_allclose(Store(tmp_path / "store").index.seconds, [0.75, 0.75, 1.0, 0.5])


def test_segments_of_mosei_without_label_or_line_are_counted_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    mosei(tmp_path)
    write_csv(tmp_path / "label.csv", *MOSEI_LABELS, MOSEI_LABELS[0] | {"clip_id": 9})
    write(tmp_path / "Transcript/Segmented/Combined/_aJghSQmxD8.txt", "1234", "other___0___0___1___x")
    with caplog.at_level(logging.WARNING):
        assert len(utterances("mosei", tmp_path)) == 4
    assert "left out 4 segments" in caplog.text
    for kind in ("1 in label.csv alone", "1 without a label", "1 not VIDEO___", "1 of another video"):
        assert kind in caplog.text
    assert "other words" not in caplog.text


def test_labels_of_another_numbering_of_segments_are_noticed_by_their_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    mosei(tmp_path)
    swapped = [MOSEI_LABELS[0] | {"clip_id": 2}, MOSEI_LABELS[1] | {"clip_id": 0}, *MOSEI_LABELS[2:]]
    write_csv(tmp_path / "label.csv", *swapped)
    with caplog.at_level(logging.WARNING):
        utterances("mosei", tmp_path)
    assert "2 segments have other words than in label.csv" in caplog.text


def test_segments_of_a_lost_recording_and_outside_of_it_are_quarantined(tmp_path: Path):
    root = mosei(tmp_path / "root")
    (root / "Audio/Full/WAV_16000/zv0Jl4TIQDc.wav").unlink()
    write(root / "Transcript/Segmented/Combined/_0efYOjQYRc_.txt", "_0efYOjQYRc____1___528.0___531.5___Well")
    lost, outside = sorted(store_of("mosei", root, tmp_path / "store").quarantined, key=lambda entry: entry.id)[::-1]
    assert "zv0Jl4TIQDc.wav: no such file" in lost.reason
    assert "_0efYOjQYRc_.wav: the segment from 528 to 531.5 s" in outside.reason


def test_clips_of_mosei_that_are_missing_or_stand_twice_are_quarantined(tmp_path: Path):
    root = mosei_clips(tmp_path / "root")
    write_csv(root / "label.csv", *MOSEI_LABELS, MOSEI_LABELS[0], MOSEI_LABELS[0] | {"clip_id": 9})
    missing, twice = store_of("mosei", root, tmp_path / "store").quarantined
    assert missing.id == "-3g5yACwYnA/9"
    assert "is taken" in twice.reason


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": "good"}, "line 2: label 'good' is not a number from -3 to 3"),
        ({"label": 4}, "line 2: label '4' is not"),
        ({"label": "nan"}, "line 2: label 'nan' is not"),
        ({"mode": "dev2"}, "line 2: mode 'dev2' is not train, valid or test"),
    ],
)
def test_a_line_of_label_csv_that_cannot_be_understood_is_named(tmp_path: Path, change: dict[str, object], says: str):
    write_csv(mosei_clips(tmp_path) / "label.csv", MOSEI_LABELS[0] | change)
    assert f"{tmp_path / 'label.csv'}, {says}" in refusal("mosei", tmp_path)


def test_mosei_without_label_csv_or_with_another_table_says_so(tmp_path: Path):
    table = mosei(tmp_path) / "label.csv"
    write_csv(table, {"video": "x", "clip_id": 1})
    assert "no column 'video_id' (did you mean 'video'?)" in refusal("mosei", tmp_path)
    table.unlink()
    assert refusal("mosei", tmp_path).startswith(f"{table}: no such file; put the label.csv of MMSA")


# MELD -------------------------------------------------------------------------------------------------------------


def test_meld_has_seven_emotions_and_the_published_splits(tmp_path: Path):
    found = utterances("meld", meld(tmp_path))
    assert len({u.labels["emotion"] for u in found}) == 7
    assert Counter(u.split for u in found) == {"train": 7, "validation": 7, "test": 7}
    assert found[3].id == "train/dia0_utt3"
    assert (found[3].text, found[3].speaker) == ("You’re a genius, joy!", "Phoebe")
    assert found[3].labels == {"emotion": "happy", "polarity": "negative"}


@pytest.mark.parametrize("how", ["Windows-1252 bytes", "their code points in UTF-8"])
def test_quotes_of_windows_1252_in_melds_tables_are_read_as_quotes(tmp_path: Path, how: str):
    path = meld(tmp_path) / "dev_sent_emo.csv"
    as_bytes = path.read_text(encoding="utf-8").encode("cp1252")
    path.write_bytes(as_bytes if how.startswith("Windows") else as_bytes.decode("latin-1").encode("utf-8"))
    assert {u.text[:6] for u in utterances("meld", tmp_path) if u.text} == {"You’re"}


def test_clips_in_a_folder_a_part_are_found_too(tmp_path: Path):
    meld(tmp_path)
    expected = [(u.id, u.text) for u in utterances("meld", tmp_path)]
    for part, clips in MELD_PARTS.items():
        (tmp_path / part).mkdir()
        (tmp_path / clips).rename(tmp_path / part / clips)
        (tmp_path / f"{part}_sent_emo.csv").rename(tmp_path / part / f"{part}_sent_emo.csv")
    found = utterances("meld", tmp_path)
    assert [(u.id, u.text) for u in found] == expected
    assert all(u.audio.exists() for u in found)


@pytest.mark.parametrize("corpus", ["meld", "mosei"])
def test_clips_that_are_videos_only_are_refused_with_the_command_that_extracts_their_sound(tmp_path: Path, corpus: str):
    root = tmp_path / "a root"
    if corpus == "meld":
        meld(root, suffix=".mp4")
    else:
        for clip in list((mosei_clips(root) / "Raw").rglob("*.wav")):
            clip.rename(clip.with_suffix(".mp4"))
    message = refusal(corpus, root)
    assert ".mp4: the clips are videos only; extract the sound beside them: find " in message
    # The command as printed, with a stand-in for ffmpeg that makes its last argument.
    program = tmp_path / "bin" / "ffmpeg"
    write(program, "#!/bin/sh", 'for last; do :; done; : > "$last"').chmod(0o755)
    command = message.partition("beside them: ")[2]
    subprocess.run(["sh", "-c", command], check=True, env={"PATH": f"{program.parent}:/usr/bin:/bin"})
    assert all(u.audio.exists() for u in utterances(corpus, root))


def test_a_missing_clip_and_a_repeated_line_of_meld_are_quarantined(tmp_path: Path):
    root = meld(tmp_path / "root")
    (root / "dev_splits_complete/dia0_utt6.wav").unlink()
    table = root / "test_sent_emo.csv"
    table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    missing, twice = store_of("meld", root, tmp_path / "store").quarantined
    assert (missing.id, twice.id) == ("dev/dia0_utt6", "test/dia0_utt0")


@pytest.mark.parametrize("lost", ["train_sent_emo.csv", "output_repeated_splits_test"])
def test_a_missing_table_or_folder_of_meld_is_named(tmp_path: Path, lost: str):
    (meld(tmp_path) / lost).rename(tmp_path / "elsewhere")
    assert refusal("meld", tmp_path).startswith(f"{tmp_path / lost}: no such ")


# Acted sentences --------------------------------------------------------------------------------------------------


def test_cremads_names_give_actor_sentence_and_emotion(tmp_path: Path):
    found = by_id("cremad", cremad(tmp_path))
    first = found["1001_DFA_ANG_XX"]
    assert (first.speaker, first.text, first.split) == ("1001", "Don't forget a jacket.", None)
    assert first.labels == {"emotion": "angry", "sentence": "DFA"}
    assert len({u.labels["emotion"] for u in found.values()}) == 6
    assert by_id("cremad", tmp_path / "AudioWAV") == found


def test_ravdess_reads_speech_and_leaves_songs_and_videos_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    sound(*(ravdess(tmp_path) / "Actor_01" / f"{kind}-05-01-01-01-01.wav" for kind in ("03-02", "01-01", "01-02")))
    with caplog.at_level(logging.WARNING):
        found = by_id("ravdess", tmp_path)
    assert "left out 3 recordings that are not of speech alone (2 songs, 1 of videos)" in caplog.text
    assert len(found) == 16
    assert len({u.labels["emotion"] for u in found.values()}) == 8
    calm = found["03-01-02-01-01-01-02"]
    assert (calm.speaker, calm.text) == ("Actor_02", "Kids are talking by the door.")
    assert calm.labels == {"emotion": "calm", "sentence": "01"}


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_emodbs_names_give_speaker_sentence_and_emotion(tmp_path: Path, suffix: str):
    found = by_id("emodb", emodb(tmp_path, suffix))
    first = found["03a01Fa"]
    assert (first.speaker, first.text) == ("03", "Der Lappen liegt auf dem Eisschrank.")
    assert first.labels == {"emotion": "happy", "sentence": "a01"}
    assert len({u.labels["emotion"] for u in found.values()}) == 7
    assert by_id("emodb", tmp_path / "wav") == found


@pytest.mark.parametrize("corpus", ["cremad", "emodb"])
def test_recordings_with_other_names_are_counted_aloud_and_hidden_copies_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, corpus: str
):
    expected = utterances(corpus, TREES[corpus](tmp_path))
    folder = expected[0].audio.parent
    sound(folder / "mine.wav", folder / "other.wav", folder / f"._{expected[0].audio.name}")
    with caplog.at_level(logging.WARNING):
        assert utterances(corpus, tmp_path) == expected
    assert "left out 2 recordings with other names (2 such as mine.wav)" in caplog.text


@needs_real
def test_a_tree_with_the_names_of_real_emodb_is_read_whole_and_as_its_manifest_says(tmp_path: Path):
    with (REAL / "EmoDB" / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = {Path(row["audio"]).stem: row for row in csv.DictReader(file)}
    (tmp_path / "wav").mkdir()
    for name in rows:
        (tmp_path / "wav" / f"{name}.wav").touch()
    found = utterances("emodb", tmp_path)
    assert len(found) == len(rows) == 535
    assert len({u.speaker for u in found}) == 10
    assert len({u.labels["sentence"] for u in found}) == 10
    spelled = {"happiness": "happy", "anger": "angry", "boredom": "bored", "disgust": "disgusted", "fear": "fearful"}
    spelled |= {"sadness": "sad", "neutral": "neutral"}
    for u in found:
        row = rows[u.id]
        assert (u.speaker, u.text, u.labels["sentence"]) == (row["speaker"], row["text"], row["sentence"])
        assert u.labels["emotion"] == spelled[row["emotion"]]


# VoxCeleb1 --------------------------------------------------------------------------------------------------------


def test_the_test_speakers_of_voxceleb1_are_the_official_forty(tmp_path: Path):
    found = by_id("voxceleb1", voxceleb1(tmp_path))
    assert {u.speaker: u.split for u in found.values()} == {
        "id10001": "train",
        "id10270": "test",
        "id10309": "test",
        "id10310": "train",
    }


def test_ids_of_voxceleb1_are_those_of_the_official_trial_lists(tmp_path: Path):
    found = by_id("voxceleb1", voxceleb1(tmp_path))
    trial = "1 id10270/5r0dWxy17C8/00001.wav id10270/x6uYqmx31kE/00002.wav"
    assert {name.removesuffix(".wav") for name in trial.split()[1:]} <= set(found)


@pytest.mark.parametrize("place", ["", "wav", "vox1_dev_wav/wav"])
def test_voxceleb1_is_found_with_and_without_outer_folders_and_in_one_or_two(tmp_path: Path, place: str):
    merged = list(by_id("voxceleb1", voxceleb1(tmp_path / "merged")))
    target = tmp_path / "root" / place
    target.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "merged" / "wav").rename(target)
    assert list(by_id("voxceleb1", tmp_path / "root")) == merged
    apart = tmp_path / "root" / "vox1_test_wav" / "wav"
    apart.mkdir(parents=True)
    for speaker in ("id10270", "id10309"):
        (target / speaker).rename(apart / speaker)
    assert list(by_id("voxceleb1", tmp_path / "root")) == merged


def test_a_recording_that_is_in_two_parts_of_voxceleb1_is_quarantined_once(tmp_path: Path):
    sound(voxceleb1(tmp_path / "root") / "test" / "wav" / "id10270/5r0dWxy17C8/00001.wav")
    (entry,) = store_of("voxceleb1", tmp_path / "root", tmp_path / "store").quarantined
    assert "the id 'id10270/5r0dWxy17C8/00001' is taken" in entry.reason
