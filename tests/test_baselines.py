"""Simple models beside every result: what they can and cannot tell, and what they may not have seen."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import TinyCorpus, needs_real, record
from ctal.baselines import FEW_VALUES, NUM_MFCC, measure_baselines, mfcc_statistics
from ctal.cli import main
from ctal.corpora import get_corpus
from ctal.corpora.demo.card import demo_ceilings
from ctal.corpora.demo.experiment import ceilings
from ctal.errors import InputError
from ctal.store import prepare_store
from ctal.tasks import TASKS, Truth, get_task

EMOTIONS = ("angry", "happy", "sad")
SPEAKERS = 8
UTTERANCES = 9


def make_store(folder: Path, lines: Sequence[dict], corpus: str = "tones") -> Path:
    """Each line is a manifest's, with `pitch` in Hz instead of `audio`."""
    folder.mkdir()
    rows = []
    for number, line in enumerate(lines):
        known = {name: value for name, value in line.items() if name != "pitch"}
        audio = record(folder / f"u{number:03d}.wav", 0.3, pitch=line["pitch"], seed=number)
        rows.append(json.dumps({"audio": audio.name, **known}) + "\n")
    manifest = folder / "all.jsonl"
    manifest.write_text("".join(rows))
    prepare_store(get_corpus("manifest").prepare(manifest), folder / "store", corpus=corpus, workers=1)
    return folder / "store"


def spoken(
    *,
    text: Callable[[int], str | None],
    pitch: Callable[[int, int], float],
    labels: Callable[[int], dict] | None = None,
) -> list[dict]:
    """Utterances of 8 speakers, of which 2 validate and 2 test; `text` and `labels` of a class 0 … 2, `pitch` of a
    speaker and a class."""
    splits = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
    make_labels = labels or (lambda number: {"emotion": EMOTIONS[number]})
    return [
        {
            "text": text(number % 3),
            "pitch": pitch(speaker, number % 3),
            "speaker": f"s{speaker}",
            "split": splits[speaker],
            **make_labels(number % 3),
        }
        for speaker in range(SPEAKERS)
        for number in range(UTTERANCES)
    ]


WORDS = ("go away now", "what a day", "oh well then")


def measured(store: Path, task: str = "emotion", metric: str = "ua", **how: object) -> dict[str, float]:
    evaluation = measure_baselines(task, [store], **how)  # pyright: ignore[reportArgumentType]
    return {name: each["metrics"][metric] for name, each in evaluation["baselines"].items()}


@pytest.fixture(scope="module")
def told_by_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "corpus"
    return make_store(folder, spoken(text=WORDS.__getitem__, pitch=lambda speaker, _: 150 + 20 * speaker))


@pytest.fixture(scope="module")
def told_by_sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "corpus"
    lines = spoken(text=lambda _: "the same words", pitch=lambda speaker, number: (150, 500, 1500)[number] + speaker)
    return make_store(folder, lines)


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voices") / "corpus"
    return make_store(folder, spoken(text=lambda _: None, pitch=lambda speaker, _: 120 * 1.5**speaker))


# What they can tell -----------------------------------------------------------------------------------------------


def test_words_that_give_the_emotion_away_are_told_by_the_bag_of_words_alone(told_by_words: Path) -> None:
    recall = measured(told_by_words)
    assert recall["bag of words"] == 1
    assert recall["both"] == 1
    assert recall["MFCC statistics"] < 0.6
    assert recall["most frequent"] == pytest.approx(1 / 3)


def test_sounds_that_give_the_emotion_away_are_told_by_the_mfcc_statistics_alone(told_by_sound: Path) -> None:
    recall = measured(told_by_sound)
    assert recall["MFCC statistics"] == 1
    assert recall["both"] == 1
    assert recall["bag of words"] == recall["most frequent"] == pytest.approx(1 / 3)


def test_voices_of_different_pitch_are_told_apart_without_a_transcript(voices: Path) -> None:
    baselines = measure_baselines("verification", [voices])["baselines"]
    assert baselines.keys() == {"MFCC statistics", "MFCC statistics, unscaled"}
    for each in baselines.values():
        interval = each["over_speakers"]["eer"]
        assert interval["low"] <= each["metrics"]["eer"] <= interval["high"]
        assert each["metrics"]["eer"] < 0.2


def scores(number: int) -> dict:
    return {"sentiment": (-2.0, 0.0, 1.0)[number]}


def test_few_scores_are_answered_by_one_of_them_and_many_by_numbers_within_their_range(tmp_path: Path) -> None:
    lines = spoken(text=WORDS.__getitem__, pitch=lambda speaker, _: 150 + 20 * speaker, labels=scores)
    error = measured(make_store(tmp_path / "few", lines), "sentiment", "mae")
    assert error["bag of words"] == 0
    assert error["median"] == pytest.approx(1)

    rng = np.random.default_rng(0)
    for line in lines:
        line["sentiment"] += float(rng.uniform(-0.1, 0.1))
    assert len({line["sentiment"] for line in lines}) > FEW_VALUES
    error = measured(make_store(tmp_path / "many", lines), "sentiment", "mae")
    assert error["bag of words"] < 0.15
    assert error["median"] == pytest.approx(1, abs=0.1)


# What they may not have seen, and what must not matter -------------------------------------------------------------


def test_labels_of_the_test_part_do_not_influence_what_is_fitted(told_by_words: Path, tmp_path: Path) -> None:
    """With other labels of the test speakers the answers stay the same, so that right ones become wrong."""
    lines = spoken(text=WORDS.__getitem__, pitch=lambda speaker, _: 150 + 20 * speaker)
    for line in lines:
        if line["split"] == "test":
            line["emotion"] = EMOTIONS[(EMOTIONS.index(line["emotion"]) + 1) % 3]
    before = measure_baselines("emotion", [told_by_words])["baselines"]
    after = measure_baselines("emotion", [make_store(tmp_path / "swapped", lines)])["baselines"]
    assert after["bag of words"]["metrics"]["wa"] == 0
    assert [each.get("strengths") for each in after.values()] == [each.get("strengths") for each in before.values()]


@pytest.mark.parametrize("task", ["emotion", "verification"])
def test_answers_do_not_depend_on_what_else_is_tested(
    task: str, told_by_words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither words nor voices of one test speaker count (in frequencies, means, deviations) for the other's."""
    lines = spoken(text=WORDS.__getitem__, pitch=lambda speaker, _: 150 + 20 * speaker)
    for line in lines:
        if line["speaker"] == "s7":
            line |= {"pitch": 4000, "text": "go go go away"}
    outputs: dict[str, list[np.ndarray]] = {}
    original = get_task(task)

    def measure(values: np.ndarray, truth: Truth) -> dict[str, float]:
        if len(values) == 2 * UTTERANCES:
            outputs.setdefault(store.parent.name, []).append(values[:UTTERANCES])
        return original.measure(values, truth)

    monkeypatch.setitem(TASKS, task, replace(original, measure=measure))
    for store in (told_by_words, make_store(tmp_path / "changed", lines)):
        measure_baselines(task, [store])
    one, other = outputs.values()
    assert len(one) == len(other) > 1
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("task", ["emotion", "verification"])
def test_two_measurements_give_the_same_numbers(task: str, told_by_sound: Path) -> None:
    assert measure_baselines(task, [told_by_sound]) == measure_baselines(task, [told_by_sound])


def test_the_protocol_is_that_of_a_fine_tuning(told_by_words: Path) -> None:
    from ctal.objective import open_corpus
    from ctal.protocols import make_protocol
    from ctal.recipes import FinetuneConfig, make_config

    corpus = open_corpus([told_by_words])
    share = make_config(FinetuneConfig).validation_share
    for name in ("auto", "5-fold"):
        expected = make_protocol(name, corpus, np.arange(len(corpus)), share)
        evaluation = measure_baselines("emotion", [told_by_words], name)
        assert evaluation["protocol"]["checksum"] == expected.checksum
        for each in evaluation["baselines"].values():
            assert list(each.get("folds", {"test": None})) == [fold.name for fold in expected.folds]


def test_means_are_over_folds_and_pooled_metrics_over_utterances(told_by_words: Path) -> None:
    evaluation = measure_baselines("emotion", [told_by_words], "leave-one-speaker-out")
    each = evaluation["baselines"]["bag of words"]
    assert each["metrics"]["ua"] == np.mean([fold["ua"] for fold in each["folds"].values()]) == 1
    assert each["pooled_metrics"] == {"wa": 1, "ua": 1}
    assert evaluation["utterances"] == SPEAKERS * UTTERANCES


def test_without_transcripts_the_bag_of_words_is_left_out_and_that_is_said(voices: Path) -> None:
    evaluation = measure_baselines("emotion", [voices])
    assert evaluation["baselines"].keys() == {"most frequent", "MFCC statistics"}
    assert len(evaluation["notes"]) == 1


def test_a_missing_transcript_is_an_empty_one(tmp_path: Path) -> None:
    lines = spoken(text=WORDS.__getitem__, pitch=lambda speaker, _: 150 + 20 * speaker)
    for line in lines[::4]:
        line["text"] = None
    tested = [line for line in lines if line["split"] == "test"]
    known = np.mean([line["text"] is not None for line in tested])
    assert measured(make_store(tmp_path / "some", lines), metric="wa")["bag of words"] >= known


def test_another_store_can_be_fitted_on(told_by_sound: Path, voices: Path) -> None:
    evaluation = measure_baselines("verification", [voices], train_on=[told_by_sound])
    assert evaluation["utterances"] == 2 * UTTERANCES  # the published test part
    assert str(told_by_sound) in evaluation["protocol"]["description"]
    with pytest.raises(InputError, match="is tested too"):
        measure_baselines("verification", [voices], train_on=[voices])
    with pytest.raises(InputError, match="--protocol 5-fold"):
        measure_baselines("verification", [voices], "5-fold", train_on=[told_by_sound])


def test_mfcc_statistics_are_those_of_the_spectrum_and_the_level_is_in_the_first_alone() -> None:
    time = np.arange(16_000) / 16_000
    wave = (0.3 * np.sin(2 * np.pi * 300 * (1 + time) * time)).astype(np.float32)
    wave += np.random.default_rng(0).normal(0, 0.05, len(wave)).astype(np.float32)
    quiet, loud = mfcc_statistics(wave), mfcc_statistics(2 * wave)
    assert quiet.shape == (4 * NUM_MFCC,)
    # Twice the amplitude adds ln 4 to every log-mel channel: √80 · ln 4 to c0 of an orthonormal transform.
    assert loud[0] - quiet[0] == pytest.approx(np.sqrt(80) * np.log(4), rel=1e-2)
    assert np.abs(loud[1:] - quiet[1:]).max() < 0.05


# On the command line ----------------------------------------------------------------------------------------------


def ctal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ctal", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capfd.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, shown.out, shown.err


def test_the_verb_prints_a_row_a_baseline_and_json(
    told_by_words: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = ctal(monkeypatch, capfd, "baseline", "emotion", told_by_words)
    assert code == 0
    evaluation = measure_baselines("emotion", [told_by_words])
    assert evaluation["protocol"]["checksum"][:16] in out
    assert all(name in out for name in evaluation["baselines"])
    code, out, _ = ctal(monkeypatch, capfd, "baseline", "emotion", told_by_words, "--json")
    assert json.loads(out)["baselines"] == evaluation["baselines"]


def test_what_cannot_be_measured_is_one_line(
    tiny: TinyCorpus, told_by_words: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        (["emotion", tiny.store], "no utterance of the store has a label 'emotion'"),
        (["emotion", told_by_words, "--train-on", tiny.store], "no utterance of the store has a label 'emotion'"),
        (["emotin", tiny.store], "did you mean 'emotion'"),
        (
            ["verification", tiny.store, "--protocol", "leave-one-speaker-out"],
            "use --protocol 5-fold with at least ten speakers, or --train-on",
        ),
        (["emotion", told_by_words, "--protocol", "all"], "protocol=all: measures nothing"),
        (["emotion", told_by_words, "--protocol", "foldd"], "protocol 'foldd'"),
    ):
        code, out, err = ctal(monkeypatch, capfd, "baseline", *arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert said in err


# On real speech and on the demo corpus ----------------------------------------------------------------------------


def test_ceilings_have_the_names_of_the_metrics_and_a_card_says_the_same(tmp_path: Path) -> None:
    table = demo_ceilings()
    assert table.keys() == {"text alone", "audio alone", "both", "neither"}
    assert table["text alone"].keys() == {"wa", "ua", "mae"}
    assert table["both"]["ua"] == pytest.approx(1)
    card = {"ceilings": {view: ceiling._asdict() for view, ceiling in ceilings().items()}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert demo_ceilings(tmp_path) == demo_ceilings(tmp_path / "card.json") == table
    with pytest.raises(InputError, match=r"nowhere.* not the card of a demo corpus"):
        demo_ceilings(tmp_path / "nowhere")


def test_ceilings_stand_beside_the_demo_corpus_alone(told_by_words: Path, tmp_path: Path) -> None:
    lines = spoken(text=WORDS.__getitem__, pitch=lambda speaker, _: 150 + 20 * speaker)
    evaluation = measure_baselines("emotion", [make_store(tmp_path / "demo", lines, corpus="demo")])
    assert evaluation["ceilings"]["text alone"] == {name: demo_ceilings()["text alone"][name] for name in ("wa", "ua")}
    assert "ceilings" not in measure_baselines("emotion", [told_by_words])


@needs_real
def test_real_voices_are_told_apart_better_than_by_chance(tmp_path: Path) -> None:
    from conftest import REAL

    stores = {}
    for name in ("LibriSpeech/test-other", "LibriSpeech-audio-only/train-clean-100"):
        stores[name] = tmp_path / Path(name).name
        prepare_store(get_corpus("librispeech").prepare(REAL / name), stores[name], corpus="librispeech", workers=1)
    tested, other = stores.values()
    error = measured(tested, "verification", "eer", train_on=[other])
    assert all(math.isfinite(each) and each < 0.15 for each in error.values())
