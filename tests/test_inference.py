"""Trained models on one's own recordings: windows, batches, results, and the verbs `predict` and `verify`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import REAL, Cli, Finished, needs_real, record
from ctal import CtalConfig, CtalFeatureExtractor, CtalForPreTraining, CtalForXVector, CtalProcessor
from ctal.errors import InputError
from ctal.inference import (
    EmbeddingResult,
    EmotionResult,
    Pipeline,
    Recording,
    SentimentResult,
    TaskModel,
    cut_windows,
    deal_words,
    like_lengths,
    load_recognizer,
    load_task_model,
    pipeline,
)
from ctal.modeling_ctal import CtalForSequenceClassification
from ctal.text import train_tokenizer

RATE = 16_000
MAX_FRAMES = 400
"""5 s, so that long recordings need not be long."""
LONGEST = MAX_FRAMES * 200 - 1
LABELS = {0: "neutral", 1: "happy", 2: "angry"}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nano models of random weights, one a task, and a pre-trained one."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["hello world", "hello again world"], 280)
    processor = CtalProcessor(CtalFeatureExtractor(max_frames=MAX_FRAMES), tokenizer)
    fields = {"vocab_size": len(tokenizer), "frame_stack": 2, "initializer_range": 0.2}
    heads = {
        "emotion": (CtalForSequenceClassification, {"num_labels": 3}),
        "sentiment": (CtalForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}),
        "verification": (CtalForXVector, {"num_labels": 4, "decision_threshold": 0.5}),
        "words": (CtalForSequenceClassification, {"num_labels": 3, "fusion": "text"}),
        "pretraining": (CtalForPreTraining, {}),
    }
    for number, (name, (kind, more)) in enumerate(heads.items()):
        torch.manual_seed(number)
        config = CtalConfig.of_size("nano", **fields)
        for field, value in more.items():
            setattr(config, field, value)
        if config.num_labels == 3:
            config.id2label, config.label2id = LABELS, {label: number for number, label in LABELS.items()}
        kind(config).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        run = {"task": name, "config": {"inputs": "both", "modality_dropout": 0.0}}
        (folder / name / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture(scope="session")
def emotion(models: Path) -> Pipeline[EmotionResult]:
    return pipeline("emotion", models / "emotion", device="cpu")


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five recordings of 0.2–12 s, two of them with a transcript."""
    folder = tmp_path_factory.mktemp("sound")
    for number, seconds in enumerate((1.0, 0.2, 12.0, 2.5, 0.7)):
        record(folder / f"{number}.wav", seconds, pitch=150 + 50 * number, seed=number)
    (folder / "0.txt").write_text("hello world")
    (folder / "2.txt").write_text("hello again world " * 5)
    return folder


def refusal(finished: Finished) -> str:
    """The one line, without its `ctal: `."""
    assert finished.code == 2, finished
    assert finished.errors.startswith("ctal: "), finished.errors
    assert finished.errors.count("\n") == 1, finished.errors
    return finished.errors.removeprefix("ctal: ").rstrip("\n")


def lines_of(finished: Finished) -> list[dict]:
    return [json.loads(line) for line in finished.output.splitlines()]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)


# Windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, LONGEST, LONGEST + 1, LONGEST + 100, 2 * LONGEST + 1, 10 * LONGEST + 7])
@pytest.mark.parametrize("kind", ["noise", "silence"])
def test_windows_cover_the_recording_and_are_neither_longer_than_the_maximum_nor_tiny(samples: int, kind: str) -> None:
    wave = noise(samples / RATE + 1)[:samples] if kind == "noise" else np.zeros(samples, np.float32)
    windows = cut_windows(wave, MAX_FRAMES)
    assert windows[0][0] == 0
    assert windows[-1][1] == samples
    assert all(one[1] == other[0] for one, other in pairwise(windows))
    lengths = [end - start for start, end in windows]
    assert max(lengths) <= LONGEST
    assert len(windows) == 1 or min(lengths) >= RATE


def test_a_window_ends_in_the_pause() -> None:
    wave = noise(8)
    wave[int(4.2 * RATE) : int(4.6 * RATE)] *= 0.01
    (_, cut), *_ = cut_windows(wave, MAX_FRAMES)
    assert 4.2 <= cut / RATE <= 4.6


def test_tiny_maxima_still_give_windows_that_fit() -> None:
    windows = cut_windows(noise(1), max_frames=10)
    assert max(end - start for start, end in windows) < 10 * 200
    assert sum(end - start for start, end in windows) == RATE


def test_words_go_where_the_speech_is_and_none_is_lost() -> None:
    wave = np.concatenate([noise(4), np.zeros(4 * RATE, np.float32), noise(2)])
    windows = [(0, 4 * RATE), (4 * RATE, 8 * RATE), (8 * RATE, 10 * RATE)]
    assert deal_words("a b c d e f", wave, windows) == ["a b c d", None, "e f"]
    assert deal_words("a b c d e", np.zeros_like(wave), windows) == ["a b", "c d", "e"]
    assert deal_words("a", wave, windows).count(None) == 2


# Results ----------------------------------------------------------------------------------------------------------


def values(result: EmotionResult) -> list[float]:
    return list(result.probabilities.values())


def test_a_batch_gives_what_one_by_one_gives_in_whatever_order(emotion: Pipeline[EmotionResult], sound: Path) -> None:
    paths = sorted(sound.glob("*.wav"))
    texts = [None, "hello", "hello again", None, "world"]
    together = emotion(paths, text=texts)
    backwards = emotion(paths[::-1], text=texts[::-1])[::-1]
    for path, text, one, other in zip(paths, texts, together, backwards, strict=True):
        alone = emotion(path, text=text)
        assert one.audio == other.audio == alone.audio == str(path)
        assert one.inputs == alone.inputs == ("audio and text" if text else "audio alone")
        np.testing.assert_allclose(values(one), values(alone), atol=1e-5)
        np.testing.assert_allclose(values(other), values(alone), atol=1e-5)
    assert len({tuple(np.round(values(each), 3)) for each in together}) == len(paths)


def test_batches_that_are_bounded_give_the_same(
    emotion: Pipeline[EmotionResult], sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(sound.glob("*.wav"))
    expected = emotion(paths)
    monkeypatch.setattr("ctal.inference.BATCH_FRAMES", {"cpu": 100})
    monkeypatch.setattr("ctal.inference._SORTED_FRAMES", 200)
    monkeypatch.setattr("ctal.inference._FILES_AHEAD", 1)
    for one, other in zip(expected, emotion(paths), strict=True):
        np.testing.assert_allclose(values(one), values(other), atol=1e-5)


def test_a_path_its_samples_and_a_tensor_of_them_give_the_same(emotion: Pipeline[EmotionResult], sound: Path) -> None:
    wave, rate = soundfile.read(sound / "0.wav", dtype="float32")
    expected = values(emotion(sound / "0.wav"))
    for audio in (wave, torch.from_numpy(wave), str(sound / "0.wav"), wave.astype(np.float64)):
        np.testing.assert_allclose(values(emotion(audio, sampling_rate=rate)), expected, atol=1e-5)
    coarse = torch.from_numpy(wave).bfloat16()
    rounded = values(emotion(coarse.float(), sampling_rate=rate))
    np.testing.assert_array_equal(values(emotion(coarse, sampling_rate=rate)), rounded)


def test_probabilities_are_the_mean_over_windows_weighted_by_duration(
    emotion: Pipeline[EmotionResult], sound: Path
) -> None:
    result = emotion(sound / "2.wav", text="hello again world again")
    assert len(result.windows) >= 3
    assert result.windows[0].start == 0
    assert result.windows[-1].end == result.duration == 12.0
    weights = [window.end - window.start for window in result.windows]
    rows = [list((window.probabilities or {}).values()) for window in result.windows]
    np.testing.assert_allclose(values(result), np.average(rows, axis=0, weights=weights), atol=1e-6)
    assert sum(values(result)) == pytest.approx(1)
    assert result.label == max(result.probabilities, key=lambda label: result.probabilities[label])
    assert " ".join(window.text for window in result.windows if window.text) == "hello again world again"
    assert "not aligned" in result.notes[0]


def test_each_task_gives_its_own_result(models: Path, sound: Path) -> None:
    score = pipeline("sentiment", models / "sentiment")(sound / "2.wav")
    assert isinstance(score, SentimentResult)
    expected = [window.score for window in score.windows]
    weights = [window.end - window.start for window in score.windows]
    assert score.score == pytest.approx(np.average(np.array(expected, float), weights=weights))

    embedding = pipeline("verification", models / "verification")(sound / "2.wav")
    assert isinstance(embedding, EmbeddingResult)
    assert np.linalg.norm(embedding.embedding) == pytest.approx(1)
    assert embedding.embedding.shape == (2 * 64,)


def test_an_empty_transcript_is_the_same_as_none_and_the_result_says_so(
    emotion: Pipeline[EmotionResult], sound: Path
) -> None:
    none = emotion(sound / "0.wav")
    assert none.inputs == "audio alone"
    assert any("modality dropout" in note for note in none.notes)
    for text in ("", "  ", "?!"):
        empty = emotion(sound / "0.wav", text=text)
        assert (empty.inputs, empty.text) == ("audio alone", None)
        assert any("no word" in note for note in empty.notes)
        assert values(empty) == values(none)
    assert values(emotion(sound / "0.wav", text="hello")) != values(none)


def test_a_transcript_longer_than_the_model_reads_is_cut_and_the_result_says_so(
    emotion: Pipeline[EmotionResult], sound: Path
) -> None:
    result = emotion(sound / "0.wav", text="qx " * 600)
    assert any("rest is not read" in note for note in result.notes)
    assert not any("rest is not read" in note for note in emotion(sound / "0.wav", text="qx " * 100).notes)


def test_silence_and_very_short_recordings_get_a_finite_result_and_a_note(emotion: Pipeline[EmotionResult]) -> None:
    silent = emotion(np.zeros(RATE, np.float32), sampling_rate=RATE)
    assert "silence" in silent.notes[0]
    for samples in (1, 100, RATE // 5):
        short = emotion(noise(1)[:samples], sampling_rate=RATE)
        assert "short" in short.notes[0]
        assert np.isfinite(values(short)).all()
    assert np.isfinite(values(silent)).all()


def test_ten_minutes_and_stereo_at_another_rate_are_heard_whole(
    emotion: Pipeline[EmotionResult], tmp_path: Path
) -> None:
    long = emotion(noise(600), sampling_rate=RATE)
    assert long.windows[-1].end == long.duration == 600
    time = np.arange(2 * 44_100) / 44_100
    wave = 0.3 * np.sin(2 * np.pi * 300 * time)
    soundfile.write(tmp_path / "stereo.wav", np.stack([wave, wave], 1), 44_100)
    soundfile.write(tmp_path / "mono.wav", wave, 44_100)
    stereo, mono = emotion([tmp_path / "stereo.wav", tmp_path / "mono.wav"])
    assert stereo.duration == pytest.approx(2)
    np.testing.assert_allclose(values(stereo), values(mono), atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_lower_precisions_are_near_fp32_and_not_the_same(
    models: Path, sound: Path, emotion: Pipeline[EmotionResult], precision: str
) -> None:
    rounded = values(pipeline("emotion", models / "emotion", device="cpu", precision=precision)(sound / "0.wav"))
    exact = values(emotion(sound / "0.wav"))
    np.testing.assert_allclose(rounded, exact, atol=0.05)
    assert not np.array_equal(rounded, exact)


def test_a_recogniser_hears_what_has_no_transcript_window_by_window(models: Path, sound: Path) -> None:
    heard: list[float] = []

    def asr(wave: np.ndarray, rate: int) -> str:
        heard.append(len(wave) / rate)
        return "hello" if len(heard) != 2 else " ..."

    hearing = pipeline("emotion", models / "emotion", asr=asr)
    result = hearing(sound / "2.wav")
    assert sum(heard) == pytest.approx(12)
    assert [window.text for window in result.windows[:2]] == ["hello", None]
    assert result.inputs == "audio and text"
    assert result.text == " ".join(["hello"] * (len(heard) - 1))
    count = len(heard)
    assert hearing(sound / "2.wav", text="given").text == "given"
    assert len(heard) == count


def test_a_model_hears_or_reads_only_what_it_was_trained_on(models: Path, sound: Path) -> None:
    words = pipeline("emotion", models / "words")
    assert words(sound / "2.wav", text="hello").inputs == "text alone"
    assert values(words(sound / "2.wav", text="hello")) == values(words(sound / "0.wav", text="hello"))
    with pytest.raises(InputError, match=r"0\.wav: the model reads text alone"):
        words(sound / "0.wav")
    loaded = load_task_model(models / "emotion")
    deaf = TaskModel(loaded.task, loaded.model, loaded.processor, "audio", {})
    with_text = pipeline("emotion", deaf)(sound / "0.wav", text="hello")
    assert with_text.inputs == "audio alone"
    assert any("not read" in note for note in with_text.notes)


def test_verification_is_symmetric_and_gives_a_recording_compared_with_itself_1(models: Path, sound: Path) -> None:
    verifier = pipeline("verification", models / "verification")
    a, b = sound / "2.wav", sound / "3.wav"
    assert verifier.verify(a, a).score == pytest.approx(1, abs=1e-6)
    assert verifier.verify(a, a).same_speaker
    assert verifier.verify(a, b).score == pytest.approx(verifier.verify(b, a).score, abs=1e-6)
    assert verifier.verify(a, b).score < 0.9999


def test_one_bad_recording_does_not_stop_the_others_and_places_are_kept(
    emotion: Pipeline[EmotionResult], sound: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.wav"
    bad.write_text("not a recording\n" * 50)
    results = list(emotion.each(map(Recording, [sound / "0.wav", bad, tmp_path / "none.wav", sound / "3.wav"])))
    assert [isinstance(each, InputError) for each in results] == [False, True, True, False]
    assert str(results[1]).startswith(f"{bad}: not audio")
    with pytest.raises(InputError, match=r"bad\.wav"):
        emotion([sound / "0.wav", bad])


# Wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.zeros(10, np.float32), None, "sampling_rate is not given"),
        (np.zeros(10, np.float32), 10, "10 Hz"),
        (np.zeros(10, np.float32), 44_100.5, r"44100\.5 Hz"),
        (np.zeros((2, 10), np.float32), RATE, "one channel"),
        (np.zeros(0, np.float32), RATE, "at least one"),
        (np.zeros(10, np.int16), RATE, "int16"),
        (np.full(10, np.nan, np.float32), RATE, "NaN"),
        ([0.1, 0.2], RATE, r"audio\[0\]: float is neither"),
        (7, RATE, "int"),
    ],
)
def test_samples_that_cannot_be_used_are_named(
    emotion: Pipeline[EmotionResult], audio: object, rate: float | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        emotion(audio, sampling_rate=rate)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_texts_must_match_recordings(emotion: Pipeline[EmotionResult], sound: Path) -> None:
    with pytest.raises(InputError, match="2 texts for 1 recordings"):
        emotion([sound / "0.wav"], text=["a", "b"])
    with pytest.raises(InputError, match="one recording"):
        emotion(sound / "0.wav", text=["a"])  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_tasks_precisions_and_recognisers_that_do_not_fit_are_named(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a model of emotion, not of verification"):
        pipeline("verification", models / "emotion")
    with pytest.raises(InputError, match="did you mean 'emotion'"):
        pipeline("emotions", models / "emotion")  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(InputError, match="precision 'fp8'"):
        pipeline("emotion", models / "emotion", precision="fp8")
    with pytest.raises(InputError, match="precision int8 is for CPUs; use bf16 on meta"):
        pipeline("emotion", models / "emotion", precision="int8", device="meta")
    with pytest.raises(InputError, match="does not compare speakers"):
        pipeline("emotion", models / "emotion").verify("a.wav", "b.wav")
    with pytest.raises(InputError, match="asr 'no/such-model': neither a folder nor"):
        load_recognizer("no/such-model")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_recognizer(str(tmp_path))


def copied(models: Path, folder: Path, **changes: object) -> Path:
    """The emotion model with changed fields of its config.json."""
    folder.mkdir()
    for file in (models / "emotion").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_what_is_not_a_task_model_is_refused_in_one_line(ctal: Cli, models: Path, sound: Path, tmp_path: Path) -> None:
    cut = copied(models, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    expected = {
        tmp_path / "nowhere": "no such folder",
        tmp_path / "empty": "config.json is missing",
        models / "pretraining": "fine-tune it first with `ctal finetune`",
        copied(models, tmp_path / "other", architectures=["CtalForPoetry"]): "unknown architecture 'CtalForPoetry'",
        copied(models, tmp_path / "bert", model_type="bert"): "a model of type 'bert'",
        cut: "cannot be loaded",
    }
    for folder, reason in expected.items():
        message = refusal(ctal("predict", sound / "0.wav", "--model", folder))
        assert message.startswith(f"{folder}: ")
        assert reason in message


def test_weights_that_lack_the_head_are_refused(models: Path, tmp_path: Path) -> None:
    headless = copied(models, tmp_path / "headless")
    (headless / "model.safetensors").write_bytes((models / "pretraining" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="lacks classifier"):
        load_task_model(headless)


# ctal predict -----------------------------------------------------------------------------------------------------


def test_predict_takes_files_and_folders_with_the_transcripts_beside_them(
    ctal: Cli, models: Path, sound: Path, emotion: Pipeline[EmotionResult]
) -> None:
    finished = ctal("predict", sound / "3.wav", sound, "--model", models / "emotion", "--json")
    assert finished.code == 0, finished.errors
    rows = lines_of(finished)
    assert [Path(row["audio"]).name for row in rows] == ["3.wav", "0.wav", "1.wav", "2.wav", "3.wav", "4.wav"]
    assert [row["text"] for row in rows[1:3]] == ["hello world", None]
    assert rows[1]["probabilities"] == pytest.approx(
        emotion(sound / "0.wav", text="hello world").probabilities, abs=1e-5
    )
    assert lines_of(ctal("predict", sound / "0.wav", "--model", models / "emotion", "--json"))[0]["text"]

    table = ctal("predict", sound, "--model", models / "emotion")
    assert table.code == 0
    assert "audio and text" in table.output
    assert "not aligned" in table.errors


def test_predict_takes_a_text_or_a_table_of_transcripts(ctal: Cli, models: Path, sound: Path, tmp_path: Path) -> None:
    fixed = ("--model", models / "emotion", "--json")
    assert lines_of(ctal("predict", sound / "0.wav", "--text", "again", *fixed))[0]["text"] == "again"
    assert lines_of(ctal("predict", sound / "0.wav", "--text", "", *fixed))[0]["text"] is None
    table = tmp_path / "all.tsv"
    table.write_text(f"audio\ttext\n{sound / '3.wav'}\tworld\n")
    rows = lines_of(ctal("predict", sound / "0.wav", sound / "3.wav", "--transcripts", table, *fixed))
    assert [row["text"] for row in rows] == [None, "world"]

    listed = lines_of(ctal("predict", table, sound / "0.wav", *fixed))
    assert [(Path(row["audio"]).name, row["text"]) for row in listed] == [("3.wav", "world"), ("0.wav", "hello world")]
    (tmp_path / "labels.csv").write_text("file,emotion\na.wav,angry\n")
    assert "no column 'audio'" in refusal(ctal("predict", tmp_path / "labels.csv", *fixed))

    assert refusal(ctal("predict", sound, "--text", "a", *fixed)).startswith("--text is the transcript of one")
    other = refusal(ctal("predict", sound / "0.wav", "--transcripts", table, *fixed))
    assert other.startswith(f"{table}: names none of the recordings")
    both = refusal(ctal("predict", sound / "0.wav", "--transcripts", table, "--text", "a", *fixed))
    assert both.startswith("--text and --transcripts")


def test_predict_does_the_rest_when_a_file_is_no_recording_and_exits_with_2(
    ctal: Cli, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.wav").write_text("not a recording\n" * 50)
    (tmp_path / "alone.txt").write_text("a transcript of nothing")
    record(tmp_path / "b.wav", 0.5)
    for options in ([], ["--json"]):
        finished = ctal("predict", tmp_path, "--model", models / "verification", *options)
        assert finished.code == 2
        assert finished.errors.count("not audio") == 1
        assert "b.wav" in finished.output
        assert "a.wav" not in finished.output
    assert refusal(finished).startswith(f"{tmp_path / 'a.wav'}: not audio")
    assert len(lines_of(finished)[0]["embedding"]) == 128


def test_predict_names_a_transcript_in_another_encoding_goes_on_and_prints_any_file_name(
    ctal: Cli, models: Path, tmp_path: Path
) -> None:
    record(tmp_path / "a.wav", 0.5)
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    other = record(tmp_path / "b.wav", 0.5).rename(tmp_path / os.fsdecode(b"gr\xfc\xdfe.wav"))
    for arguments in ([tmp_path], [tmp_path, "--json"], [tmp_path / "a.wav", other]):
        finished = ctal("predict", *arguments, "--model", models / "emotion")
        assert finished.code == 2
        said = f"ctal: {tmp_path / 'a.wav'}: its transcript cannot be read as UTF-8; mend it\n"
        assert finished.errors.startswith(said)
        assert "gr\\udcfc\\udcdfe.wav" in finished.output


def test_predict_names_missing_paths_and_empty_folders(ctal: Cli, models: Path, tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "nowhere", "no such file or folder"), (tmp_path, "no recording in it")):
        assert refusal(ctal("predict", path, "--model", models / "emotion")).startswith(f"{path}: {reason}")


# ctal verify ------------------------------------------------------------------------------------------------------


def test_a_model_that_normalises_by_the_speaker_is_given_recordings_of_whoever_speaks(
    ctal: Cli, models: Path, sound: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "emotion", folder)
    saved = json.loads((folder / "processor_config.json").read_text())
    saved["feature_extractor"]["cmvn"] = "speaker"
    (folder / "processor_config.json").write_text(json.dumps(saved))
    command = ("predict", sound / "0.wav", "--json", "--model")
    given = {
        "nobody": (),
        "itself": ("--speaker", sound / "0.wav"),
        "files": [part for number in range(5) for part in ("--speaker", sound / f"{number}.wav")],
        "folder": ("--speaker", sound),
        "enough": ("--speaker", sound, "--speaker", sound),
    }
    said = {name: lines_of(ctal(*command, folder, *more))[0] for name, more in given.items()}
    notes = {name: any("this one alone: do not rely on it" in note for note in said[name]["notes"]) for name in said}
    assert notes == {"nobody": True, "itself": False, "files": False, "folder": False, "enough": False}
    few = {
        name: [note for note in said[name]["notes"] if "trained with all of each speaker's" in note] for name in said
    }
    assert {name: [note.split(",")[0] for note in found] for name, found in few.items()} == {
        "nobody": [],
        "itself": ["the model is given 1 of the speaker's recordings"],
        "files": ["the model is given 5 of the speaker's recordings"],
        "folder": ["the model is given 5 of the speaker's recordings"],
        "enough": [],
    }
    heard = {name: list(each["probabilities"].values()) for name, each in said.items()}
    assert heard["nobody"] == pytest.approx(heard["itself"], abs=1e-4)
    assert heard["folder"] == heard["files"]
    assert heard["folder"] != pytest.approx(heard["itself"], abs=1e-4)
    assert "does not normalise by them (its cmvn is utterance)" in refusal(
        ctal(*command, models / "emotion", "--speaker", sound)
    )
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(ctal(*command, folder, "--speaker", tmp_path / "empty"))
    assert "no such file or folder" in refusal(ctal(*command, folder, "--speaker", tmp_path / "nowhere"))
    (tmp_path / "a.wav").write_text("not audio")
    assert "a.wav" in refusal(ctal(*command, folder, "--speaker", tmp_path / "a.wav"))
    run = json.loads((folder / "run.json").read_text())
    run["config"]["random_speaker_mean"] = True
    (folder / "run.json").write_text(json.dumps(run))
    (note,) = (each for each in lines_of(ctal(*command, folder))[0]["notes"] if "alone" in each)
    assert "with a few others it is surer" in note
    some = ctal(*command, folder, "--speaker", tmp_path / "a.wav", "--speaker", sound / "0.wav")
    assert some.code == 2
    assert "--speaker: " in some.errors
    assert "a.wav" in some.errors
    (judged,) = lines_of(some)
    assert judged["probabilities"] == said["itself"]["probabilities"]
    assert "1 of the speaker's recordings cannot be used, and are left out" in judged["notes"]
    assert not any("trained with all" in note for note in judged["notes"])


def test_of_a_speaker_of_whom_nothing_else_is_known_the_whole_recording_is_the_measure(models: Path) -> None:
    loaded = load_task_model(models / "emotion")
    extractor = CtalFeatureExtractor(cmvn="speaker", max_frames=MAX_FRAMES)
    loaded = replace(loaded, processor=CtalProcessor(extractor, loaded.processor.tokenizer))
    wave = np.concatenate([noise(4.0), 0.01 * noise(4.0, seed=1)])
    short = noise(1.0, seed=2)
    alone = pipeline("emotion", loaded, device="cpu")([wave, short], sampling_rate=RATE)
    assert len(alone[0].windows) == 2
    for audio, one in zip((wave, short), alone, strict=True):
        known = pipeline("emotion", loaded, device="cpu", speaker=Recording(audio, sampling_rate=RATE))
        other = known(audio, sampling_rate=RATE)
        for mine, its in zip(one.windows, other.windows, strict=True):
            assert mine.probabilities == pytest.approx(its.probabilities, abs=1e-4)


def test_verify_says_who_speaks(ctal: Cli, models: Path, sound: Path, tmp_path: Path) -> None:
    a, b = sound / "1.wav", sound / "3.wav"
    fixed = ("--model", models / "verification")
    assert ctal("verify", a, a, *fixed).output == "same speaker: score 1.0000, threshold 0.5000\n"
    (one,), (other,) = (lines_of(ctal("verify", *pair, *fixed, "--json")) for pair in ((a, b), (b, a)))
    assert one["score"] == pytest.approx(other["score"], abs=1e-6)
    assert one["verdict"] == ("same speaker" if one["score"] >= 0.5 else "different speakers")
    assert "some recordings have a transcript" in ctal("verify", a, sound / "0.wav", *fixed).errors

    undecided = copied(models, tmp_path / "undecided")
    for file in (models / "verification").iterdir():
        (undecided / file.name).write_bytes(file.read_bytes())
    config = json.loads((undecided / "config.json").read_text())
    (undecided / "config.json").write_text(json.dumps(config | {"decision_threshold": None}))
    assert "no verdict" in ctal("verify", a, b, "--model", undecided).output


def test_verify_scores_a_list_and_measures_it_where_it_has_labels(
    ctal: Cli, models: Path, sound: Path, tmp_path: Path
) -> None:
    fixed = ("--model", models / "verification")
    trials = tmp_path / "trials.txt"
    trials.write_text("1 1.wav 1.wav\n0 1.wav 3.wav\n\n0 3.wav 4.wav\n")
    measured = ctal("verify", "--trials", trials, "--root", sound, *fixed)
    assert measured.code == 0
    lines = measured.output.splitlines()
    assert lines[0] == "1.000000 1.wav 1.wav"
    assert lines[3] == "EER 0.00%, minDCF 0.0000, 3 trials"
    whole = lines_of(ctal("verify", "--trials", trials, "--root", sound, *fixed, "--json"))[3]
    assert (whole["eer"], whole["left_out"]) == (0, 0)

    trials.write_text("1 1.wav 1.wav\n0 1.wav 3.wav\n0 3.wav gone.wav\n1 gone.wav gone.wav\n")
    some, as_json = (ctal("verify", "--trials", trials, "--root", sound, *fixed, *more) for more in ((), ("--json",)))
    assert some.code == 2
    assert some.output.splitlines()[2] == "EER 0.00%, minDCF 0.0000, 2 trials; 2 of 4 trials left out"
    assert {name: lines_of(as_json)[2][name] for name in ("trials", "left_out")} == {"trials": 2, "left_out": 2}
    trials.write_text("1 1.wav 1.wav\n0 3.wav gone.wav\n")
    assert "of two; 1 of 2 trials left out" in ctal("verify", "--trials", trials, "--root", sound, *fixed).errors

    trials.write_text("\ufeff1 1.wav 1.wav\n1 3.wav 3.wav\n", encoding="utf-8")  # as Windows writes it
    of_one_kind = ctal("verify", "--trials", trials, "--root", sound, *fixed)
    assert (of_one_kind.code, len(of_one_kind.output.splitlines())) == (0, 2)
    assert "no EER: it needs trials of one speaker and of two" in of_one_kind.errors

    unlabelled = sound / "trials.txt"
    unlabelled.write_text("1.wav\t3.wav\n3.wav\tgone.wav\n")
    finished = ctal("verify", "--trials", unlabelled, *fixed)
    unlabelled.unlink()
    assert finished.code == 2
    assert finished.errors.startswith(f"ctal: {sound / 'gone.wav'}: no such file")
    assert "1.wav and 1 more: no transcript" in finished.errors
    assert len(finished.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no trials"),
        ("a.wav\n", "line 1: write"),
        ("2 a.wav b.wav\n", "line 1: write"),
        ("a b\n1 a b\n", "some lines have a label"),
        (None, "cannot be read"),
    ],
)
def test_a_list_of_another_form_is_named(
    ctal: Cli, models: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    trials = tmp_path / "trials.txt"
    if content is not None:
        trials.write_text(content)
    told = refusal(ctal("verify", "--trials", trials, "--model", models / "verification"))
    assert told.startswith(f"{trials}")
    assert message in told


def test_verify_wants_two_recordings_or_a_list_and_a_model_of_speakers(ctal: Cli, models: Path, sound: Path) -> None:
    a = sound / "0.wav"
    for arguments in ([], [a], [a, a, a], [a, a, "--trials", a]):
        assert refusal(ctal("verify", *arguments, "--model", models / "verification")).startswith("give two recordings")
    assert "a model of emotion" in refusal(ctal("verify", a, a, "--model", models / "emotion"))
    assert "no such file" in refusal(ctal("verify", a, sound / "gone.wav", "--model", models / "verification"))


def test_predicting_loads_nothing_of_training_and_measuring() -> None:
    code = (
        "import sys, ctal; ctal.pipeline; print(*{'sklearn', 'datasets', 'pyarrow', 'tensorboard'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "\n"


# Real recordings --------------------------------------------------------------------------------------------------


@needs_real
def test_real_recordings_are_cut_at_pauses_and_judged(emotion: Pipeline[EmotionResult]) -> None:
    path = min((REAL / "LibriSpeech" / "test-other").rglob("*.flac"))
    wave, rate = soundfile.read(path, dtype="float32")
    result = emotion(path, text="hello world " * 20)
    assert result.duration == pytest.approx(len(wave) / rate)
    overall = np.sqrt(np.mean(wave**2))
    for window in result.windows[:-1]:
        cut = int(window.end * rate)
        assert np.sqrt(np.mean(wave[cut - 1600 : cut + 1600] ** 2)) < 0.5 * overall


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 60))
def test_batches_of_like_lengths_hold_everything_once_within_the_limit_or_one_alone(
    frames: list[int], limit: int
) -> None:
    batches = list(like_lengths(frames, limit))
    assert sorted(number for batch in batches for number in batch) == list(range(len(frames)))
    for batch in batches:
        assert len(batch) == 1 or max(frames[number] for number in batch) * len(batch) <= limit
    lengths = [frames[number] for batch in batches for number in batch]
    assert lengths == sorted(frames, reverse=True)
