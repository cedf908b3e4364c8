"""The pages of fine-tuning: how well each task is done, on which data, and where that comes from.

Numbers come from what `ctal.finetune` left, none is measured anew, but for the DET curve, which is checked against the
EER that was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctal.batching import Corpus
from ctal.objective import open_corpus
from ctal.report.html import (
    Html,
    capital,
    element,
    join,
    signed,
    source,
    synthetic_warning,
    table,
    tiles,
    unfolding,
    write_page,
)
from ctal.report.listening import examples_section
from ctal.report.pictures import PICTURES, learning
from ctal.report.pretraining import pretraining_content
from ctal.report.results import METRICS, Kind, Metric, ResultTable, kind_mark, result_table
from ctal.report.runs import TaskRun, read_task_run


def write_demo_report(
    out: Path,
    *,
    title: str,
    pretraining_run: Path,
    stores: Sequence[Path],
    task_runs: Mapping[str, Path],
    tables: Mapping[str, ResultTable] | None = None,
    ceilings: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Writes one self-contained HTML file: what fine-tuning found, then what pre-training had learned.

    Args:
        out: The file to write; missing folders are made.
        title: Heading of the page.
        pretraining_run: Folder of the run that the tasks started from, as for `write_pretraining_report`.
        stores: The stores of all runs, in their order.
        task_runs: Name → folder that `ctal finetune` left; the name is the section's heading.
        tables: Result tables; one under the name of a task stands in its section, others above all tasks.
        ceilings: Name of a task → what is known to whoever answers (`text`, `audio`, `both`) → the best value of the
            main metric (UA, MAE, EER) that is possible then.

    Raises:
        InputError: A file of a run is missing, damaged or of another run, or `out` cannot be written.
    """
    corpus = open_corpus(stores)
    runs = {name: read_task_run(folder, corpus) for name, folder in task_runs.items()}
    pretraining = pretraining_content(pretraining_run, stores)
    corpora = [*pretraining.corpora, *(each for run in runs.values() for each in run.evaluation["corpus"])]
    introduction = element(
        "p",
        "A CTAL model reads a recording of speech together with its transcript. It was pre-trained on recordings "
        "without labels and then fine-tuned for each of the tasks below. First comes what it does with recordings that "
        "it was not trained on, then what pre-training alone had taught it.",
    )
    body = join(
        _top(title, introduction, corpora),
        _task_sections(runs, corpus, tables or {}, ceilings or {}),
        element("h2", "Before that: pre-training", class_="part"),
        pretraining.introduction,
        pretraining.sections,
    )
    write_page(out, title, body)


def write_task_report(run: Path, stores: Sequence[Path], out: Path, *, title: str) -> None:
    """Writes one self-contained HTML file on what `ctal finetune` left in `run`, of one fold or several.

    Args:
        run: Folder of the run.
        stores: The run's own stores, in its order.
        out: The file to write; missing folders are made.
        title: Heading of the page.

    Raises:
        InputError: A file of the run is missing, damaged or of another run, or `out` cannot be written.
    """
    corpus = open_corpus(stores)
    read = read_task_run(run, corpus)
    introduction = element(
        "p",
        "A CTAL model reads a recording of speech together with its transcript. This one was fine-tuned for a task. "
        "The page shows how well it does on recordings that were left out of its training.",
    )
    sections = _task_sections({read.task.name: read}, corpus, {}, {})
    write_page(out, title, join(_top(title, introduction, read.evaluation["corpus"]), sections))


def _top(title: str, introduction: Html, corpora: Sequence[str]) -> Html:
    warning = synthetic_warning() if "demo" in corpora else Html()
    return join(element("h1", title), introduction, warning)


def _task_sections(
    runs: Mapping[str, TaskRun],
    corpus: Corpus,
    tables: Mapping[str, ResultTable],
    ceilings: Mapping[str, Mapping[str, float]],
) -> Html:
    anchors = {name: f"task-{number}" for number, name in enumerate(runs, start=1)}
    measured = {name: run for name, run in runs.items() if run.predictions}
    overview = (
        (element("a", capital(name), href=f"#{anchors[name]}"), _main_value(run), METRICS[run.task.selection].meaning)
        for name, run in measured.items()
    )
    return join(
        tiles(overview) if len(runs) > 1 else Html(),
        *(result_table(each) for name, each in tables.items() if name not in runs),
        *(
            _task_section(name, anchors[name], run, tables.get(name), ceilings.get(name, {}))
            for name, run in runs.items()
        ),
        examples_section(measured, corpus) if measured else Html(),
    )


def _main_value(run: TaskRun) -> str:
    return METRICS[run.task.selection].shown(run.value)


# A task


def _task_section(
    name: str, anchor: str, run: TaskRun, results: ResultTable | None, ceilings: Mapping[str, float]
) -> Html:
    heading = element("h2", capital(name), id=anchor)
    if not run.predictions:
        why = f"Nothing was measured: {run.evaluation['protocol']['description']}."
        return join(heading, element("p", why), _settings(run))
    say, picture = SAYINGS[run.task.name], PICTURES[run.task.name]
    return join(
        heading,
        element("p", say(run), class_="headline"),
        element("p", _measured_on(run), class_="note"),
        _ladder(run, ceilings),
        picture(run),
        result_table(results) if results else Html(),
        _all_metrics(run),
        learning(run),
        _settings(run),
    )


def _say_emotion(run: TaskRun) -> str:
    labels = len({each.label for each in run.predictions})
    return f"{_main_value(run)} of the recordings of an emotion are recognised, averaged over {labels} emotions (UA)."


def _say_sentiment(run: TaskRun) -> str:
    return f"Predictions are {_main_value(run)} points off on average (MAE), on a scale from −3 to 3."


def _say_verification(run: TaskRun) -> str:
    return (
        f"{_main_value(run)} equal error rate (EER): the share of pairs of one speaker that is rejected, and of pairs "
        "of two that is accepted, where the threshold makes both equal."
    )


SAYINGS: Mapping[str, Callable[[TaskRun], str]] = {
    "emotion": _say_emotion,
    "sentiment": _say_sentiment,
    "verification": _say_verification,
}


def _measured_on(run: TaskRun) -> str:
    protocol, interval = run.evaluation["protocol"], run.interval(run.task.selection)
    who = f" of {run.speakers} speakers" if run.speakers else ""
    trials = sum(len(each.scores) for each in run.trialled)
    pairs = f", {trials:,} pairs of them" if trials else ""
    over, metric = "", METRICS[run.task.selection]
    shown = metric.shown
    if interval:
        ends = f", 95% interval {shown(interval.low)} … {shown(interval.high)}" if np.isfinite(interval.low) else ""
        over = f" Mean over {len(run.evaluation['folds'])} folds{ends}."
    elif ends := run.evaluation.get("over_speakers", {}).get(run.task.selection):
        over = f" {metric.name}: 95% interval over speakers {shown(ends['low'])} … {shown(ends['high'])}."
    return (
        f"Measured on {len(run.predictions):,} test utterances{who}{pairs}. Protocol: {protocol['description']} "
        f"(checksum {protocol['checksum'][:8]}).{over}"
    )


INPUTS = {"both": "audio and text", "audio": "audio alone", "text": "text alone"}


@dataclass(frozen=True)
class _Rung:
    name: str
    value: float
    kind: Kind


def _ladder(run: TaskRun, ceilings: Mapping[str, float]) -> Html:
    """The main metric between what needs no model and what is possible at best, as bars."""
    selection = run.task.selection
    metric, given = METRICS[selection], INPUTS.get(run.evaluation["inputs"], run.evaluation["inputs"])
    rungs = [_Rung(f"this model, given {given}", run.value, "model")]
    for each, metrics in run.evaluation.get("missing_modality", {}).items():
        rungs.append(_Rung(f"this model, given {INPUTS.get(each, each)}", metrics[selection], "model"))
    rungs.append(_without_a_model(run))
    rungs += [_Rung(INPUTS.get(name, name), value, "ceiling") for name, value in ceilings.items()]
    full = 1.0 if metric.higher_is_better and metric.is_share else max(rung.value for rung in rungs) or 1.0
    bars = (
        element(
            "li",
            element("span", rung.name, *kind_mark(rung.kind)),
            element("span", metric.shown(rung.value)),
            class_=rung.kind,
            style=f"--share: {max(0.0, rung.value / full):.1%}",
        )
        for rung in sorted(rungs, key=lambda rung: rung.value, reverse=metric.higher_is_better)
    )
    better = "longer is better" if metric.higher_is_better else "shorter is better"
    return join(element("p", f"{metric.name}, {better}:", class_="note"), element("ul", *bars, class_="bars ladder"))


def _without_a_model(run: TaskRun) -> _Rung:
    labels = [each.label for each in run.predictions]
    if run.task.compares:
        return _Rung("guessing", 0.5, "baseline")
    if run.task.problem_type == "regression":
        values = np.array(labels, dtype=np.float64)
        middle = float(np.median(values))
        said = f"always {signed(middle)}, the median of the test utterances"
        return _Rung(said, float(np.abs(values - middle).mean()), "baseline")
    return _Rung("always the same emotion", 1 / len(set(labels)), "baseline")


def _all_metrics(run: TaskRun) -> Html:
    """All that was measured, with what the validation part gave."""
    chosen: Mapping[str, float] = run.evaluation.get("validation_metrics") or {}
    head = ["Measure", "Test"]
    head += ["Validation"] if chosen else []
    head += ["95% over folds"] if "over_folds" in run.evaluation else []
    rows = []
    for key, value in run.metrics.items():
        metric = METRICS.get(key, Metric(key, "", is_share=False))
        row: list[Any] = [join(metric.name, element("small", metric.meaning)), metric.shown(value)]
        if chosen:
            row.append(metric.shown(chosen[key]) if key in chosen else "–")
        if interval := run.interval(key):
            is_known = np.isfinite(interval.low)
            row.append(f"{metric.shown(interval.low)} … {metric.shown(interval.high)}" if is_known else "–")
        rows.append(row)
    chose = element("p", "The validation part chose the epoch, so its values flatter.", class_="note")
    folds = run.evaluation.get("folds", {})
    keys = [key for key in run.metrics if key in METRICS][:3]
    sizes = Counter(each.fold for each in run.predictions)
    by_fold = (
        [join(name, element("small", f"{sizes[name]} utterances")), *(METRICS[key].shown(metrics[key]) for key in keys)]
        for name, metrics in folds.items()
    )
    return element(
        "details",
        element("summary", "All measures"),
        table(head, rows),
        chose if chosen else Html(),
        table(["Fold", *(METRICS[key].name for key in keys)], by_fold) if folds else Html(),
    )


def _settings(run: TaskRun) -> Html:
    evaluation = run.evaluation
    weights = {"pretrained": "pre-trained", "random": "from scratch"}.get(evaluation["config"]["weights"])
    settings = {
        "data": source(evaluation["corpus"]),
        # The setting `protocol` only says what was asked for, such as `auto`.
        "judged by": f"{evaluation['protocol']['name']}, checksum {evaluation['protocol']['checksum']}",
        "trials": str(evaluation["trials"]) if "trials" in evaluation else None,
        "given to the model": INPUTS.get(evaluation["config"]["inputs"]),
        "weights at the start": weights,
        "step": f"{evaluation['step']} of {evaluation['steps']}" if "step" in evaluation else None,
        "data hash": evaluation["data_hash"],
        "commit": evaluation["commit"] or "unknown (not run from a checkout)",
        "versions": ", ".join(f"{name} {version}" for name, version in evaluation["versions"].items()),
        **evaluation["config"],
        **evaluation.get("head", {"fusion": evaluation.get("fusion")}),  # early runs name no more of their head
    }
    known = {name: value for name, value in settings.items() if value is not None}
    return unfolding("Where it comes from: data, protocol, versions, commit, all settings", known)
