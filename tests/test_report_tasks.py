"""Pages of fine-tuning say what runs left, stand alone, let no text become markup, and refuse what is broken."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ctal import CtalConfig, CtalFeatureExtractor, CtalProcessor
from ctal.corpora import Utterance
from ctal.diagnostics import Interval
from ctal.errors import InputError
from ctal.metrics import eer_threshold, emotion_metrics, sentiment_metrics, verification_metrics
from ctal.modeling_ctal import CtalForSequenceClassification
from ctal.objective import open_corpus
from ctal.protocols import make_trials, write_trials
from ctal.recipes import FinetuneConfig, make_config
from ctal.report import Column, ResultTable, Row, tasks, write_demo_report, write_task_report
from ctal.report.html import Html, element
from ctal.report.listening import ATTENTION_EXAMPLES, EXAMPLES, examples_section
from ctal.report.pictures import SHOWN_CLASSES
from ctal.report.pretraining import PretrainingContent
from ctal.report.runs import read_task_run
from ctal.store import prepare_store
from ctal.tasks import trial_scores
from ctal.text import train_tokenizer
from test_report import HOSTILE, RATE, Reader, data_of, tones

EMOTIONS = ("angry", HOSTILE, "sad")
SPEAKERS = 6
UTTERANCES = 24
Lines = list[dict[str, Any]]


def known(i: int) -> dict[str, Any]:
    return {"id": f"{HOSTILE}-{i}", "speaker": f"<b>{i % SPEAKERS}</b>"}


def text_of(i: int) -> str | None:
    return f"{HOSTILE} & word {i}" if i % 4 else None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    utterances = []
    for i in range(UTTERANCES):
        soundfile.write(folder / f"{i}.wav", tones(0.3 + 0.01 * i, seed=i), RATE)
        utterances.append(Utterance(audio=folder / f"{i}.wav", text=text_of(i), split="test", **known(i)))
    prepare_store(utterances, folder / "store", corpus="demo", workers=1)
    return folder / "store"


def shared(task: str, store: Path) -> dict[str, Any]:
    return {
        "task": task,
        "protocol": {"name": "split", "description": f"whole <i>speakers</i> {HOSTILE}", "checksum": "018c1052" * 8},
        "inputs": "both",
        "fusion": "orthogonal",
        "config": make_config(FinetuneConfig, {"protocol": "5-fold", "steps": 4}).model_dump(),
        "head": CtalConfig(label_smoothing=0.125).head(),
        "corpus": ["demo"],
        "data_hash": open_corpus([store]).content_hash,
        "versions": {"ctal": "0.1.0"},
        "commit": None,
    }


def emotion_lines(rng: np.random.Generator, names: Sequence[str] = EMOTIONS) -> tuple[Lines, dict[str, float]]:
    lines, numbers = [], []
    for i in range(UTTERANCES):
        chances = rng.dirichlet(np.ones(len(names)) + 2 * np.eye(len(names))[i % len(names)])
        named = {name: round(float(chance), 5) for name, chance in zip(names, chances, strict=True)}
        numbers.append(int(chances.argmax()))
        prediction = names[numbers[-1]]
        lines.append({**known(i), "label": names[i % len(names)], "prediction": prediction, "probabilities": named})
    return lines, emotion_metrics(numbers, [i % len(names) for i in range(UTTERANCES)], len(names))


def sentiment_lines(rng: np.random.Generator) -> tuple[Lines, dict[str, float]]:
    lines = [
        {**known(i), "label": float(i % 7 - 3), "prediction": round(float(1.5 * rng.normal() + i % 7 - 3), 5)}
        for i in range(UTTERANCES)
    ]
    return lines, sentiment_metrics([line["prediction"] for line in lines], [line["label"] for line in lines])


def verification_lines(rng: np.random.Generator) -> Lines:
    voices = rng.normal(size=(SPEAKERS, 5))
    return [
        {
            **known(i),
            "label": known(i)["speaker"],
            "embedding": [round(float(value), 5) for value in voices[i % SPEAKERS] + rng.normal(size=5)],
        }
        for i in range(UTTERANCES)
    ]


def write_run(run: Path, store: Path, task: str, selection: str, lines: Lines, evaluation: Mapping[str, Any]) -> Path:
    """In the form in which `ctal.finetune` leaves a run."""
    run.mkdir(parents=True)
    own = {"fold": "test", "step": 4, "steps": 4, "utterances": len(lines), "speakers": SPEAKERS}
    whole = {**shared(task, store), **own, "validation_metrics": evaluation["metrics"], **evaluation}
    (run / "evaluation.json").write_text(json.dumps(whole))
    (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logged = [{"kind": "validation", "step": step, selection: 0.5 - 0.1 * step} for step in (0, 2, 4)]
    logged.append({"kind": "train", "step": 3, "loss": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    return run


def write_verification(run: Path, store: Path, lines: Lines, fold: str = "test") -> Path:
    ids = [line["id"] for line in lines]
    trials = make_trials(ids, [line["speaker"] for line in lines])
    scores = trial_scores(np.array([line["embedding"] for line in lines]), trials)
    threshold = eer_threshold(scores, trials.is_target) + 0.1
    accepted = scores >= threshold
    evaluation = {
        "fold": fold,
        "metrics": verification_metrics(scores, trials.is_target),
        "trials": {"count": len(scores), "targets": int(trials.is_target.sum())},
        "at_threshold": {
            "threshold": threshold,
            "false_acceptance": float(accepted[~trials.is_target].mean()),
            "false_rejection": float((~accepted[trials.is_target]).mean()),
        },
    }
    write_run(run, store, "verification", "eer", lines, evaluation)
    write_trials(run / "trials.txt", trials, ids)
    return run


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    emotions, measured = emotion_lines(rng)
    missing = {"audio": {name: value / 2 for name, value in measured.items()}}
    scores, errors = sentiment_lines(rng)
    evaluation = {"metrics": measured, "missing_modality": missing}
    return {
        "emotion": write_run(folder / "emotion", store, "emotion", "ua", emotions, evaluation),
        "sentiment": write_run(folder / "sentiment", store, "sentiment", "mae", scores, {"metrics": errors}),
        "verification": write_verification(folder / "verification", store, verification_lines(rng)),
    }


def in_folds(run: Path, store: Path, write_fold: Callable[[Path, Lines, str], object], lines: Lines, task: str) -> Path:
    """Two folds of half of the speakers each."""
    parts = {f"fold {k}": [line for i, line in enumerate(lines) if i % 2 == k] for k in (0, 1)}
    folds = {}
    for name, part in parts.items():
        folder = run / "folds" / name.replace(" ", "-")
        write_fold(folder, part, name)
        folds[name] = json.loads((folder / "evaluation.json").read_text())["metrics"]
    columns = {name: np.array([metrics[name] for metrics in folds.values()]) for name in folds["fold 0"]}
    evaluation = {
        **shared(task, store),
        "model_fold": "fold 1",
        "metrics": {name: float(values.mean()) for name, values in columns.items()},
        "over_folds": {name: asdict(Interval.of(values)) for name, values in columns.items()},
        "folds": folds,
        "utterances": len(lines),
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    named = [{"fold": name, **line} for name, part in parts.items() for line in part]
    (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    return run


RESULTS = ResultTable(
    f"Together {HOSTILE}",
    [Column("UA", "%"), Column("MAE", "points", higher_is_better=False)],
    [
        Row("better <i>model</i>", [Interval(0.71, 0.69, 0.73), 0.5]),
        Row("worse model", [0.6, None]),
        Row("bag of words", [0.8, 0.4], "baseline"),
        Row("both", [0.98, 0.1], "ceiling"),
    ],
    "Means of 3 seeds.",
)


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sections on pre-training have a test module of their own."""
    content = PretrainingContent(["demo"], Html("<p>Pre-trained.</p>"), element("h2", "How it learned"))
    out = tmp_path_factory.mktemp("out") / "new" / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "pretraining_content", lambda run, stores: content)
        write_demo_report(
            out,
            title=f"Demo {HOSTILE}",
            pretraining_run=Path("unused"),
            stores=[store],
            task_runs=runs,
            tables={"all": RESULTS},
            ceilings={"emotion": {"both": 0.985}},
        )
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reader(page: str) -> Reader:
    return Reader(page)


def written(run: Path, store: Path, out: Path) -> Reader:
    write_task_report(run, [store], out, title="One run")
    reader = Reader(out.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_every_element_is_closed_and_no_text_from_data_is_markup(reader: Reader) -> None:
    assert reader.open == []
    tags = {tag for tag, attributes in reader.elements if "class" not in attributes}
    assert not {"script", "i"} & tags
    assert all(not name.startswith("on") for _, attributes in reader.elements for name in attributes)
    for text in (f"Demo {HOSTILE}", f"Together {HOSTILE}", "better <i>model</i>", f"{HOSTILE} & word", "<b>0</b>"):
        assert text in reader.words


def test_nothing_is_fetched_from_elsewhere(page: str, reader: Reader) -> None:
    sources = [attributes.get(name) for _, attributes in reader.elements for name in ("src", "srcset", "action")]
    assert all(source.startswith("data:") for source in sources if source)
    anchors = {attributes.get("id") for _, attributes in reader.elements}
    links = [str(attributes.get("href")) for attributes in reader.attributes("a")]
    assert len(links) == 3
    assert all(link[0] == "#" and link[1:] in anchors for link in links)
    assert not re.search(r"url\(|https?:", page)


def test_charts_have_alternative_texts(reader: Reader) -> None:
    charts = [each for each in reader.attributes("svg") if "aria-hidden" not in each]
    assert charts
    assert all(each["role"] == "img" and each["aria-label"] for each in charts)


def test_tasks_come_before_pretraining_and_the_warning_before_both(reader: Reader) -> None:
    places = [reader.words.index(text) for text in ("SYNTHETIC SPEECH", "recordings of an emotion", "How it learned")]
    assert places == sorted(places)


def cells(page: str, class_: str) -> list[int]:
    table = re.search(rf'<table class="{class_}.*?</table>', page, re.DOTALL)
    assert table
    return [int(each) for each in re.findall(r"<td[^>]*>(\d+)<small>", table.group())]


def test_confusions_sum_to_the_test_utterances_and_their_diagonal_is_the_accuracy(
    page: str, runs: dict[str, Path]
) -> None:
    counts = np.reshape(cells(page, "confusion"), (len(EMOTIONS), len(EMOTIONS)))
    evaluation = json.loads((runs["emotion"] / "evaluation.json").read_text())

    assert counts.sum() == UTTERANCES
    assert counts.trace() / UTTERANCES == pytest.approx(evaluation["metrics"]["wa"])


def test_many_emotions_share_the_last_row(store: Path, tmp_path: Path) -> None:
    lines, measured = emotion_lines(np.random.default_rng(1), [f"emotion {i}" for i in range(SHOWN_CLASSES + 3)])
    write_run(tmp_path / "run", store, "emotion", "ua", lines, {"metrics": measured})
    reader = written(tmp_path / "run", store, tmp_path / "page.html")

    counts = cells((tmp_path / "page.html").read_text(encoding="utf-8"), "confusion")
    assert len(counts) == SHOWN_CLASSES**2
    assert sum(counts) == UTTERANCES
    assert "(all others)" in reader.words


def test_main_metrics_are_those_of_the_evaluation(reader: Reader, runs: dict[str, Path]) -> None:
    for task, name, form in (("emotion", "ua", ".1%"), ("sentiment", "mae", ".3f"), ("verification", "eer", ".1%")):
        value = json.loads((runs[task] / "evaluation.json").read_text())["metrics"][name]
        assert reader.words.count(f"{value:{form}}") >= 3  # overview, headline and bars


def test_the_curves_eer_is_that_of_the_evaluation(page: str, runs: dict[str, Path]) -> None:
    evaluation = json.loads((runs["verification"] / "evaluation.json").read_text())
    label = re.search(r'aria-label="DET curve: equal error rate ([\d.]+)%', page)
    assert label
    assert float(label.group(1)) == pytest.approx(100 * evaluation["metrics"]["eer"], abs=0.06)


def test_a_marked_eer_lies_on_its_curve(page: str) -> None:
    chart = re.search(r'aria-label="DET curve.*?</svg>', page, re.DOTALL)
    assert chart
    line = re.search(r'<path d="M([^"]*)" class="training">', chart.group())
    marked = re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart.group())
    assert line
    assert marked
    points = np.array([list(map(float, point.split(","))) for point in line.group(1).split("L")])
    x, y = map(float, marked.groups())
    # Few trials make steps, across which the EER is interpolated in rates and the line in deviates.
    assert y == pytest.approx(np.interp(x, points[::-1, 0], points[::-1, 1]), abs=6)


def test_recordings_are_those_of_different_speakers_with_all_tasks_beside_them(page: str) -> None:
    heard = re.findall(r'<section class="heard">.*?</section>', page, re.DOTALL)
    assert len(heard) == EXAMPLES
    speakers = set()
    for section in heard:
        words, (player, *others) = Reader(section).words, Reader(section).attributes("audio")
        match = re.search(r"script>-(\d+) \(.*?, speaker (<b>\d</b>)\)", words)
        assert match
        speakers.add(match.group(2))
        wave, rate = soundfile.read(data_of(player["src"]))
        assert len(wave) / rate == pytest.approx(0.3 + 0.01 * int(match.group(1)), abs=0.001)
        assert len(others) == 1  # the most similar one
        text = text_of(int(match.group(1)))
        assert (text if text is not None else "(no transcript)") in words
        for task in ("Emotion", "Sentiment", "Verification"):
            assert task in words
    assert len(speakers) == EXAMPLES


def test_a_run_with_its_model_shows_what_two_recordings_attend_to(
    runs: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs["emotion"], tmp_path / "run"))
    tokenizer = train_tokenizer(["word script alert"], 280)
    config = CtalConfig.of_size("nano", vocab_size=len(tokenizer), frame_stack=2)
    CtalForSequenceClassification(config).save_pretrained(run / "model")
    CtalProcessor(CtalFeatureExtractor(), tokenizer).save_pretrained(run / "model")
    (run / "model" / "run.json").write_text(json.dumps({"config": {"inputs": "both"}}))

    reader = written(run, store, tmp_path / "page.html")
    pictures = reader.attributes("img")
    assert len(pictures) == 2 * ATTENTION_EXAMPLES
    assert all(each["alt"] for each in pictures)
    assert "This is attention and not an alignment" in reader.words
    labels = [each.get("title") for each in reader.attributes("li") if each.get("title")]
    assert labels[:6] == ["<s>", "script", "alert", "1", "script", "word"]

    (run / "model" / "run.json").write_text(json.dumps({"config": {"inputs": "audio"}}))
    none = "no model whose audio sees the text lies beside its results"
    assert none in written(run, store, tmp_path / "page.html").words

    (run / "model" / "run.json").write_text(json.dumps({"config": {"inputs": "both"}}))
    config.audio_sees_text = False
    CtalForSequenceClassification(config).save_pretrained(run / "model")
    assert none in written(run, store, tmp_path / "page.html").words


def test_predictions_do_not_choose_the_recordings(runs: dict[str, Path], store: Path, tmp_path: Path) -> None:
    def shown(run: Path) -> list[str]:
        reader = written(run, store, tmp_path / "page.html")
        return re.findall(r"script>-\d+(?= \()", reader.words)

    other = Path(shutil.copytree(runs["emotion"], tmp_path / "run"))
    lines = [json.loads(line) for line in (other / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        line["prediction"] = "sad"
        line["probabilities"] = dict.fromkeys(EMOTIONS, 0.0) | {"sad": 1.0}
    (other / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert len(shown(runs["emotion"])) == EXAMPLES
    assert shown(runs["emotion"]) == shown(other)


def test_ceilings_and_baselines_are_called_so_and_bold_marks_the_best_model(page: str) -> None:
    table = re.search(r'<table class="results.*?</table>', page, re.DOTALL)
    assert table
    assert re.findall(r"<strong>(.*?)</strong>", table.group()) == ["71.0%", "0.500"]
    assert re.findall(r"<em[^>]*>(.*?)</em>", table.group()) == ["baseline", "best possible"]
    assert "69.0% … 73.0%" in table.group()


def test_a_result_table_has_a_value_in_each_column() -> None:
    with pytest.raises(ValueError, match="'short' has 1 values for 2 columns"):
        ResultTable("Wrong", RESULTS.columns, [Row("short", [0.5])])


def test_folds_have_a_curve_each_and_their_interval(store: Path, tmp_path: Path) -> None:
    def fold(folder: Path, lines: Lines, name: str) -> None:
        write_verification(folder, store, lines, name)

    run = in_folds(tmp_path / "run", store, fold, verification_lines(np.random.default_rng(2)), "verification")
    reader = written(run, store, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    chart = re.search(r'aria-label="DET curve.*?</svg>', page, re.DOTALL)
    interval = json.loads((run / "evaluation.json").read_text())["over_folds"]["eer"]

    assert chart
    assert chart.group().count('class="training"') == 2
    assert f"95% interval {interval['low']:.1%} … {interval['high']:.1%}" in reader.words


def test_folds_of_emotion_are_one_confusion_matrix(store: Path, tmp_path: Path) -> None:
    lines, measured = emotion_lines(np.random.default_rng(3))

    def fold(folder: Path, part: Lines, name: str) -> None:
        write_run(folder, store, "emotion", "ua", part, {"fold": name, "metrics": measured})

    run = in_folds(tmp_path / "run", store, fold, lines, "emotion")
    written(run, store, tmp_path / "page.html")
    assert sum(cells((tmp_path / "page.html").read_text(encoding="utf-8"), "confusion")) == UTTERANCES


def test_recordings_whose_id_stands_in_two_stores_are_not_taken_for_one_another(
    runs: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    run = {"emotion": read_task_run(runs["emotion"], open_corpus([store]))}
    for count, shown in (
        (UTTERANCES - 2, {f"{HOSTILE}-{i}" for i in (UTTERANCES - 2, UTTERANCES - 1)}),
        (UTTERANCES, set()),
    ):
        others = []
        for i in range(count):
            soundfile.write(tmp_path / f"{i}.wav", tones(0.2, seed=100 + i), RATE)
            others.append(Utterance(audio=tmp_path / f"{i}.wav", **known(i)))
        prepare_store(others, tmp_path / f"other-{count}", corpus="demo", workers=1)
        words = Reader(str(examples_section(run, open_corpus([store, tmp_path / f"other-{count}"])))).words
        found = {known(i)["id"] for i in range(UTTERANCES) if f"{known(i)['id']} (" in words}
        assert found == shown
        assert ("name other recordings of the stores too" in words) == (not shown)


def test_a_run_that_measured_nothing_says_so(runs: dict[str, Path], store: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["emotion"], tmp_path / "run"))
    evaluation = json.loads((run / "evaluation.json").read_text())
    for name in ("metrics", "utterances", "speakers", "inputs", "fusion", "missing_modality"):
        del evaluation[name]
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "validation_metrics": {}}))
    (run / "predictions.jsonl").unlink()
    (run / "metrics.jsonl").write_text('{"kind": "validation", "step": 0}\n')
    assert "Nothing was measured" in written(run, store, tmp_path / "page.html").words


@pytest.mark.parametrize("task", ["emotion", "sentiment", "verification"])
def test_all_settings_stand_on_the_page_and_none_takes_another_one_s_place(
    task: str, runs: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    evaluation = json.loads((runs[task] / "evaluation.json").read_text())
    written(runs[task], store, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)

    assert len(dict(shown)) == len(shown)
    for name, value in {**evaluation["config"], **evaluation["head"]}.items():
        assert dict(shown)[name] == str(value)
    for value in (evaluation["protocol"]["checksum"], evaluation["data_hash"], "unknown (not run from a checkout)"):
        assert any(value in each for each in dict(shown).values())


def test_names_with_blanks_are_no_fault(tmp_path: Path) -> None:
    utterances = []
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", tones(0.3, seed=i), RATE)
        speaker = f"speaker {i % 2}"
        utterances.append(Utterance(id=f"a name {i}", audio=tmp_path / f"{i}.wav", text=None, speaker=speaker))
    prepare_store(utterances, tmp_path / "store", corpus="mine", workers=1)
    rng = np.random.default_rng(4)
    lines = [
        {"id": each.id, "speaker": each.speaker, "label": each.speaker, "embedding": rng.normal(size=3).tolist()}
        for each in utterances
    ]
    write_verification(tmp_path / "run", tmp_path / "store", lines)
    assert "a name 3" in written(tmp_path / "run", tmp_path / "store", tmp_path / "page.html").words


def refusal(run: Path, store: Path, out: Path) -> str:
    with pytest.raises(InputError) as caught:
        write_task_report(run, [store], out, title="Refused")
    assert not out.is_file()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["evaluation.json", "predictions.jsonl", "metrics.jsonl", "trials.txt"])
def test_a_missing_file_is_named_with_the_mend(name: str, runs: dict[str, Path], store: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["verification"], tmp_path / "run"))
    (run / name).unlink()
    message = refusal(run, store, tmp_path / "page.html")
    assert str(run / name) in message
    assert "ctal finetune" in message


@pytest.mark.parametrize("task", ["emotion", "sentiment", "verification"])
@pytest.mark.parametrize("name", ["evaluation.json", "predictions.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("text", ['{"kind": "tr', '{"step": 3}', "[1]"], ids=["cut short", "another form", "a list"])
def test_a_damaged_file_is_refused(
    task: str, name: str, text: str, runs: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs[task], tmp_path / "run"))
    (run / name).write_text(text)
    assert str(run / name) in refusal(run, store, tmp_path / "page.html")


def test_files_of_different_runs_are_refused(runs: dict[str, Path], store: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["verification"], tmp_path / "run"))
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["metrics"]["eer"] += 0.01
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert "they are not of one run" in refusal(run, store, tmp_path / "page.html")

    lines = (run / "predictions.jsonl").read_text().splitlines()
    (run / "predictions.jsonl").write_text("\n".join(lines[1:]))
    assert f"has {UTTERANCES - 1} utterances" in refusal(run, store, tmp_path / "page.html")


def test_stores_of_another_run_are_refused(runs: dict[str, Path], store: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(store, tmp_path / "other"))
    write = partial(write_task_report, runs["emotion"], [store, other], tmp_path / "page.html", title="Refused")
    with pytest.raises(InputError, match="not a run on these stores"):
        write()
