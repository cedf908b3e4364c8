"""What a run of fine-tuning left (`ctal.finetune`), read and checked, whatever its task and however many its folds.

N test utterances, E dimensions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ctal.batching import Corpus
from ctal.diagnostics import Interval
from ctal.errors import InputError
from ctal.metrics import verification_metrics
from ctal.protocols import Trials, read_trials
from ctal.report.html import read_json, read_text
from ctal.tasks import Task, get_task, trial_scores

MEND = "ctal finetune … --resume"
"""Writes anew what a run lacks."""

ROUNDING = 1e-3
"""Embeddings are written with five decimals, so that an EER of what was written may differ by so much at most."""

ONLY_FOLD = "test"
"""The fold of a run with a single one, whose predictions do not name it."""


@dataclass(frozen=True)
class Prediction:
    """What was predicted of one test utterance."""

    id: str
    speaker: str | None
    fold: str
    label: str | float | None
    """The truth."""
    prediction: str | float | None
    """A class or a score; None where an embedding stands for it."""
    probabilities: Mapping[str, float]
    """Class → probability; empty without classes."""
    embedding: np.ndarray | None
    """(E,)."""


@dataclass(frozen=True)
class Trialled:
    """The trials of one fold: of a model of its own, so that embeddings of two folds cannot be compared."""

    fold: str
    predictions: Sequence[Prediction]
    trials: Trials
    scores: np.ndarray
    """(M,) cosines."""
    eer: float
    at_threshold: Mapping[str, float] | None
    """The model's own operating point: `threshold`, `false_acceptance`, `false_rejection`."""

    @cached_property
    def unit_NE(self) -> np.ndarray:
        """Embeddings of length 1: only their directions are compared."""
        return unit_embeddings(self.predictions)


@dataclass(frozen=True)
class TaskRun:
    folder: Path
    task: Task
    evaluation: Mapping[str, Any]
    predictions: Sequence[Prediction]
    """Of all test utterances; none where everything was trained on."""
    trialled: Sequence[Trialled]
    """One a fold for verification, none for other tasks."""
    curves: Mapping[str, Sequence[tuple[int, float]]]
    """Fold → (step, the metric that chooses the epoch, on the validation part)."""

    @property
    def has_model(self) -> bool:
        return (self.folder / "model" / "config.json").is_file()

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of several folds: means over them."""
        return self.evaluation["metrics"]

    @property
    def value(self) -> float:
        """The main metric."""
        return self.metrics[self.task.selection]

    def interval(self, metric: str) -> Interval | None:
        """Over folds; None with one fold."""
        folds = self.evaluation.get("over_folds")
        return Interval(**folds[metric]) if folds else None

    @cached_property
    def by_id(self) -> Mapping[str, Prediction]:
        return {each.id: each for each in self.predictions}

    @property
    def speakers(self) -> int:
        return len({each.speaker for each in self.predictions} - {None})

    @property
    def classes(self) -> Sequence[str]:
        """In the model's order."""
        return list(self.predictions[0].probabilities) if self.predictions else []


def read_task_run(folder: Path, corpus: Corpus) -> TaskRun:
    """Raises `InputError` where a file is missing, damaged or of another run, or the run is of other data."""
    path = folder / "evaluation.json"
    evaluation = read_json(path, MEND)
    try:
        task = get_task(evaluation["task"])
        is_measured = "metrics" in evaluation
        _check_form(evaluation, task)
    except (KeyError, TypeError, AttributeError):
        raise _other_form(path) from None
    if evaluation["data_hash"] != corpus.content_hash:
        raise InputError(f"{folder}: not a run on these stores; give its own, in the same order")
    predictions = _read_predictions(folder, task) if is_measured else []
    if is_measured and len(predictions) != evaluation["utterances"]:
        raise InputError(
            f"{folder / 'predictions.jsonl'}: has {len(predictions)} utterances, but {path} counts "
            f"{evaluation['utterances']}; let `{_again(folder)}` write both anew"
        )
    known = set(corpus.ids)
    for each in predictions:
        if each.id not in known:
            raise InputError(f"{folder / 'predictions.jsonl'}: '{each.id}' is not in the stores; give those of the run")
    folds = _fold_folders(folder, evaluation)
    is_compared = task.compares and is_measured
    trialled = [_trialled(name, path, predictions) for name, path in folds.items()] if is_compared else []
    curves = {name: _curve(path / "metrics.jsonl", task) for name, path in folds.items()}
    return TaskRun(folder, task, evaluation, predictions, trialled, curves)


def _check_form(evaluation: Mapping[str, Any], task: Task) -> None:
    """A `KeyError` or `TypeError` where something is missing that pages say."""
    wanted = ("config", "corpus", "data_hash", "versions", "commit")
    protocol, config = evaluation["protocol"], evaluation["config"]
    _ = [evaluation[name] for name in wanted], protocol["name"] + protocol["description"] + protocol["checksum"]
    _ = config["weights"] + config["inputs"]
    if "metrics" in evaluation:
        _ = evaluation["utterances"] + evaluation["metrics"][task.selection], evaluation["fusion"]
    if "over_folds" in evaluation:
        _ = [Interval(**each) for each in evaluation["over_folds"].values()]


def _other_form(path: Path) -> InputError:
    return InputError(f"{path}: not the form of this version; run `ctal finetune` anew")


def _again(folder: Path) -> str:
    """Judges the model again: a run with an evaluation counts as done."""
    return f"rm '{folder / 'evaluation.json'}'; {MEND}"


def _read_predictions(folder: Path, task: Task) -> list[Prediction]:
    path = folder / "predictions.jsonl"
    predictions = []
    for number, line in enumerate(read_text(path, _again(folder)).splitlines(), start=1):
        try:
            predictions.append(_prediction(json.loads(line), task))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: line {number} is damaged; `{_again(folder)}` writes it anew") from None
    return predictions


def _prediction(line: Mapping[str, Any], task: Task) -> Prediction:
    embedding = np.array(line["embedding"], dtype=np.float64) if task.compares else None
    probabilities = {}
    if not task.compares:
        kind = float if task.problem_type == "regression" else str
        _ = kind(line["prediction"]), kind(line["label"])
        if kind is float:
            if not math.isfinite(line["prediction"]):
                raise ValueError
        else:
            probabilities = {str(name): float(chance) for name, chance in line["probabilities"].items()}
            _ = probabilities[line["prediction"]], probabilities[line["label"]]
    known = (line["id"], line["speaker"], line.get("fold", ONLY_FOLD), line["label"], line.get("prediction"))
    return Prediction(*known, probabilities, embedding)


def _fold_folders(folder: Path, evaluation: Mapping[str, Any]) -> dict[str, Path]:
    """Each fold's run; of a single fold, the run itself."""
    if "folds" not in evaluation:
        return {ONLY_FOLD: folder}
    found = {read_json(path, MEND).get("fold"): path.parent for path in folder.glob("folds/*/evaluation.json")}
    for name in evaluation["folds"]:
        if name not in found:
            raise InputError(f"{folder / 'folds'}: the run of fold '{name}' is gone; `{MEND}` makes it anew")
    return {name: found[name] for name in evaluation["folds"]}


def _trialled(fold: str, folder: Path, predictions: Sequence[Prediction]) -> Trialled:
    own = [each for each in predictions if each.fold == fold]
    evaluation = read_json(folder / "evaluation.json", MEND)
    path, ids = folder / "trials.txt", [each.id for each in own]
    if not path.is_file():
        read_text(path, _again(folder))
    trials = read_trials(path, ids)
    scores = trial_scores(unit_embeddings(own), trials)
    eer = verification_metrics(scores, trials.is_target)["eer"]
    stated = evaluation["metrics"]["eer"]
    if not abs(eer - stated) <= ROUNDING:
        raise InputError(
            f"{path}: gives an EER of {eer:.4f}, but {folder / 'evaluation.json'} says {stated:.4f}, so they are not "
            f"of one run; let `{_again(folder)}` write both anew"
        )
    return Trialled(fold, own, trials, scores, eer, evaluation.get("at_threshold"))


def unit_embeddings(predictions: Sequence[Prediction]) -> np.ndarray:
    """(N, E) of length 1; of length 0 where they were."""
    embeddings_NE = np.stack([each.embedding for each in predictions if each.embedding is not None])
    return embeddings_NE / np.maximum(np.linalg.norm(embeddings_NE, axis=1, keepdims=True), 1e-12)


def _curve(path: Path, task: Task) -> list[tuple[int, float]]:
    try:
        rows = [json.loads(line) for line in read_text(path, MEND).splitlines()]
        judged = [row for row in rows if row["kind"] == "validation" and task.selection in row]
        return [(row["step"], float(row[task.selection])) for row in judged]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: is damaged; `{MEND}` mends it") from None
