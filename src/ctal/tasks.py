"""The tasks of the paper (section 4.2): one `Task` value each; nothing else knows which task it is.

A task says what is predicted, with which head, how it is measured and which measure chooses the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ctal.batching import Corpus
from ctal.errors import InputError, did_you_mean
from ctal.metrics import eer_interval, eer_threshold, emotion_metrics, sentiment_metrics, verification_metrics
from ctal.modeling_ctal import CtalForSequenceClassification, CtalForXVector, CtalTaskOutput
from ctal.protocols import Trials

Metrics = dict[str, float]
TaskModel = CtalForSequenceClassification | CtalForXVector


class Truth(NamedTuple):
    """What N utterances are judged by."""

    targets: np.ndarray
    """(N,) class numbers or scores."""
    num_labels: int
    trials: Trials | None
    """Pairs of the N utterances, where a task compares them."""


@dataclass(frozen=True)
class Task:
    name: str
    help: str
    model: type[CtalForSequenceClassification] | type[CtalForXVector]
    label: Callable[[Corpus, int], str | float | None]
    """What is predicted of a row of a corpus; None where it is not labelled."""
    problem_type: str
    """transformers' name: `single_label_classification` or `regression`."""
    outputs: Callable[[CtalTaskOutput], torch.Tensor | None]
    """(B, K) what is measured of a model's output."""
    measure: Callable[[np.ndarray, Truth], Metrics]
    """Metrics of (N, K) outputs."""
    selection: str
    """The metric that chooses the epoch."""
    higher_is_better: bool
    compares: bool = False
    """Utterances are judged in pairs, and classes are those of the training part alone."""

    def score(self, metrics: Metrics) -> float:
        """Lower is better."""
        value = metrics[self.selection]
        return -value if self.higher_is_better else value


def _emotion(outputs_NC: np.ndarray, truth: Truth) -> Metrics:
    return emotion_metrics(outputs_NC.argmax(1), truth.targets.astype(np.int64), truth.num_labels)


def _sentiment(outputs_N1: np.ndarray, truth: Truth) -> Metrics:
    return sentiment_metrics(outputs_N1[:, 0], truth.targets)


def _verification(embeddings_NE: np.ndarray, truth: Truth) -> Metrics:
    assert truth.trials is not None
    scores = trial_scores(embeddings_NE, truth.trials)
    measured = verification_metrics(scores, truth.trials.is_target)
    return {**measured, "threshold": eer_threshold(scores, truth.trials.is_target)}


def trial_scores(embeddings_NE: np.ndarray, trials: Trials) -> np.ndarray:
    """(M,) cosines of pairs."""
    unit = embeddings_NE / np.maximum(np.linalg.norm(embeddings_NE, axis=1, keepdims=True), 1e-12)
    return (unit[trials.first] * unit[trials.second]).sum(1)


def eer_over_speakers(scores_M: np.ndarray, trials: Trials, speakers: Sequence[str | None]) -> dict[str, float] | None:
    """`low` and `high` of the EER's 95 % bootstrap interval over the (N,) speakers, of the scores of (M,) trials.

    None where a written list's labels are not those of `speakers`, so that nobody knows whose its trials are.
    """
    names = np.array([str(speaker) for speaker in speakers])
    pairs = np.stack([names[trials.first], names[trials.second]], axis=1)
    if ((pairs[:, 0] == pairs[:, 1]) != trials.is_target).any():
        return None
    low, high = eer_interval(scores_M, trials.is_target, pairs)
    return {"low": low, "high": high}


def _label(name: str, kind: type[str] | type[float]) -> Callable[[Corpus, int], str | float | None]:
    def label(corpus: Corpus, row: int) -> str | float | None:
        value = corpus.labels[row].get(name)
        if value is not None and (kind is str) != isinstance(value, str):
            expected = "a name" if kind is str else "a number"
            raise InputError(f"utterance '{corpus.ids[row]}': its label '{name}' is {value!r}, not {expected}")
        return value

    return label


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "emotion",
            "which emotion, from the label `emotion`; measured by WA and UA (mean recall)",
            CtalForSequenceClassification,
            _label("emotion", str),
            "single_label_classification",
            lambda output: output.logits,
            _emotion,
            "ua",
            higher_is_better=True,
        ),
        Task(
            "sentiment",
            "how positive, -3 to 3, from the label `sentiment`; measured by MAE, correlation, accuracies and F1",
            CtalForSequenceClassification,
            _label("sentiment", float),
            "regression",
            lambda output: output.logits,
            _sentiment,
            "mae",
            higher_is_better=False,
        ),
        Task(
            "verification",
            "the same speaker or not, from the speakers' names; measured by EER and minDCF on a written trial list",
            CtalForXVector,
            lambda corpus, row: corpus.speakers[row],
            "single_label_classification",
            lambda output: output.embeddings,
            _verification,
            "eer",
            higher_is_better=False,
            compares=True,
        ),
    )
}


def get_task(name: str) -> Task:
    """The task called `name`; raises `InputError` naming the nearest known one."""
    if name not in TASKS:
        raise InputError(f"unknown task '{name}'{did_you_mean(name, TASKS)}: choose from {', '.join(TASKS)}")
    return TASKS[name]


class Targets(NamedTuple):
    rows: np.ndarray
    """Labelled rows of the corpus."""
    values: np.ndarray
    """Row of the corpus → class number or score; -1 or NaN where there is none."""
    classes: tuple[str, ...]
    """Names by number; none for a regression."""


def read_targets(task: Task, corpus: Corpus, classes: Sequence[str] | None = None) -> Targets:
    """The labels of a corpus; `classes` are those of a model, by default all that occur, in order of their names.

    Raises `InputError` where nothing is labelled, or a label is not among `classes`.
    """
    labels = [task.label(corpus, row) for row in range(len(corpus))]
    rows = np.flatnonzero([label is not None for label in labels])
    if not len(rows):
        what = "speaker" if task.compares else f"label '{task.name}'"
        raise InputError(f"no utterance of the store has a {what}: prepare a corpus or a manifest that gives it")
    if task.problem_type == "regression":
        return Targets(rows, np.array([np.nan if label is None else label for label in labels], dtype=np.float64), ())
    known = tuple(sorted({str(labels[row]) for row in rows}) if classes is None else classes)
    number = {name: position for position, name in enumerate(known)}
    if not task.compares:
        for one, other in pairwise(sorted(known, key=str.casefold)):
            if one.casefold() == other.casefold():
                raise InputError(f"{task.name} '{one}' and '{other}' differ in capitals alone: spell them alike")
        for row in rows:
            if labels[row] not in number:
                raise InputError(
                    f"utterance '{corpus.ids[row]}': the model knows no {task.name} '{labels[row]}'"
                    f"{did_you_mean(str(labels[row]), known)}; it knows {', '.join(known)}"
                )
    return Targets(rows, np.array([number.get(str(label), -1) for label in labels], dtype=np.int64), known)


def narrowed(targets: Targets, corpus: Corpus, task: Task, train_rows: np.ndarray) -> Targets:
    """For a task that compares: classes are the speakers of the training part alone."""
    if not task.compares:
        return targets
    return read_targets(task, corpus, sorted({str(task.label(corpus, row)) for row in train_rows}))
