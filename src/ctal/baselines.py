"""Simple models that stand beside every result: what words alone, or averages of the spectrum alone, already tell.

They see what a model of ours sees, are fitted on the training part of the same protocol, and are judged by the same
measures on the same test part:

- "most frequent" or "median": the best constant answer of the training part (emotion; sentiment);
- "bag of words": TF-IDF of the words and pairs of neighbouring words of the normalised transcripts;
- "MFCC statistics": mean and standard deviation over time of 20 mel-frequency cepstral coefficients (Davis and
  Mermelstein, 1980; here the orthonormal DCT-II of our log-mel frames, c0 included) and of their deltas;
- "both": the two side by side;
- for verification, the cosine of "MFCC statistics", standardised by the training part, and of the bare ones.

Emotions are told by logistic regression with balanced classes, since the mean recall (UA) is what chooses. Sentiment is
measured by its mean absolute error, which a conditional median minimises: with at most 15 different labels (a scale,
as in the demo corpus) it is the median of a multinomial logistic regression over them; with more, a linear support
vector regression with epsilon 0, which minimises the absolute error itself, in a second for 12,000 utterances. The
strength of regularisation is the only choice, made on the validation part.

On one core, 68 minutes of audio take 12 s, and the fits of one fold of 1,400 utterances 10 s.

Shape suffixes: N utterances, T frames, C mel channels, M cepstral coefficients, F features, K classes
(1 of a regression).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
import torch
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVR

from ctal.audio import load_audio
from ctal.batching import Corpus
from ctal.corpora.demo.card import demo_ceilings
from ctal.diagnostics import Interval
from ctal.errors import InputError
from ctal.features import deltas, log_mel
from ctal.finetune import GE2E_SEED, Evaluation, truth_of
from ctal.metrics import ge2e_eer
from ctal.objective import environment, open_corpus
from ctal.protocols import Fold, Protocol, make_protocol
from ctal.recipes import FinetuneConfig, make_config
from ctal.store import Store
from ctal.tasks import Metrics, Targets, Task, Truth, eer_over_speakers, get_task, read_targets, trial_scores
from ctal.text import normalize_transcript

NUM_MFCC = 20

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Weights of the data against the penalty (scikit-learn's C) to choose from."""

DEFAULT_STRENGTH = 10.0
"""Where no validation part chooses."""

FEW_VALUES = 15
"""With at most so many different scores, they are classes."""

READERS = 4
"""Threads that decode and analyse: libsndfile and torch release Python's lock."""

Matrix = np.ndarray | sparse.csr_matrix

_Model = Callable[[Matrix], np.ndarray]
"""(N, F) features → (N, K) outputs, as of a model of ours."""


class _Answer(NamedTuple):
    """What a baseline says of the test part of a fold."""

    outputs: np.ndarray
    """(N, K) class probabilities or scores, or (N, F) embeddings."""
    strength: float | None = None


class _Known(NamedTuple):
    """What is known of each row of a corpus; nothing of rows that no fold has."""

    transcripts: list[str]
    """Normalised; empty without one."""
    statistics_NF: np.ndarray


def measure_baselines(
    task_name: str,
    stores: Sequence[Path],
    protocol: str = "auto",
    *,
    train_on: Sequence[Path] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Fits every baseline of a task on each fold of a protocol and measures it there.

    Args:
        task_name: A name of `ctal.tasks.TASKS`.
        protocol: One of `ctal.protocols.PROTOCOLS`; folds and checksum are those of a fine-tuning with it.
        train_on: Other stores to fit on instead; then the published test part of `stores`, or all of them, is measured.
        progress: Called with (utterances read, all).

    Returns:
        `baselines`: name → `metrics` (means over folds), `over_folds` with their 95 % intervals, `folds`,
        `pooled_metrics` (all test utterances as one set) and `strengths` (regularisation, by fold). Beside it protocol,
        data and versions as in `evaluation.json`, `notes` for people and, on the demo corpus, its `ceilings`.

    Raises:
        InputError: As `ctal.protocols.make_protocol` and `ctal.tasks.read_targets`; a protocol that measures nothing, a
            training part with one label, a test part without pairs of both kinds.
    """
    task = get_task(task_name)
    if train_on and protocol != "auto":
        raise InputError(f"--protocol {protocol}: --train-on says who trains and who is tested; drop one of the two")
    corpus = _Across(train_on, stores) if train_on else open_corpus(stores)
    for each in (train_on, stores) if train_on else ():  # lest one be labelled and the other not
        read_targets(task, open_corpus(each))
    targets = read_targets(task, corpus)
    share = make_config(FinetuneConfig).validation_share
    made = make_protocol("split" if train_on else protocol, corpus, targets.rows, share, in_pairs=task.compares)
    if isinstance(corpus, _Across):
        made = replace(made, name="train-on", description=corpus.said(made.description))
    if not all(len(fold.test) for fold in made.folds):
        raise InputError(f"protocol={protocol}: measures nothing, so there is nothing for a baseline to stand beside")
    truths = [truth_of(task, corpus, targets, fold.test) for fold in made.folds]
    for fold, truth in zip(made.folds, truths, strict=True):
        _check_fold(task, targets, fold, truth)
    parts = [part for fold in made.folds for part in (fold.train, fold.validation, fold.test)]
    known = _listen(corpus, np.unique(np.concatenate(parts)), progress)
    notes = []
    has_words = all(any(known.transcripts[row] for row in fold.train) for fold in made.folds)
    if not has_words and not task.compares:
        notes.append("no transcripts to train on: the bag of words and both are left out")

    answers: dict[str, list[_Answer]] = {}
    for fold in made.folds:
        said = _compared(fold, known) if task.compares else _learned(task, corpus, fold, targets, known, has_words)
        for name, answer in said:
            answers.setdefault(name, []).append(answer)
    judged = {name: _judged(task, corpus, made, truths, each) for name, each in answers.items()}
    ceilings = _ceilings(stores, next(iter(judged.values()))["metrics"])
    return {
        "task": task.name,
        "protocol": made.facts(),
        "corpus": [store.corpus for store in corpus.stores],
        "data_hash": corpus.content_hash,
        "utterances": sum(len(fold.test) for fold in made.folds),
        "baselines": judged,
        **({"ceilings": ceilings} if ceilings else {}),
        "notes": notes,
        **environment(),
    }


class _Across(Corpus):
    """Stores to train on and stores to test, as one corpus with a split of its own."""

    def __init__(self, train_on: Sequence[Path], tested: Sequence[Path]) -> None:
        self._training, self._tested = open_corpus(train_on).stores, open_corpus(tested).stores
        for store in self._training:
            if store.content_hash in {other.content_hash for other in self._tested}:
                raise InputError(f"--train-on {store.path}: is tested too; name another store, or leave it out")
        super().__init__([*self._training, *self._tested])

    @cached_property
    def splits(self) -> list[str | None]:
        """Of the training stores, the validation part stays one; of the tested ones, a test part alone counts."""
        fitted = ["validation" if name == "validation" else "train" for name in _splits(self._training)]
        tested = _splits(self._tested)
        return [*fitted, *("unused" if "test" in tested and name != "test" else "test" for name in tested)]

    def said(self, description: str) -> str:
        """The description of the protocol `split`, of what this split is."""
        training, tested = (", ".join(str(store.path) for store in part) for part in (self._training, self._tested))
        which = "the test part" if "test" in _splits(self._tested) else "all"
        start = f"fitted on {training}, measured on {which} of {tested}"
        rest = description.removeprefix("the corpus's own split")
        return start + rest.replace("the epoch is chosen", "what is to be chosen is chosen")


def _splits(stores: Sequence[Store]) -> list[str | None]:
    return [name for store in stores for name in store.index.splits]


def _check_fold(task: Task, targets: Targets, fold: Fold, truth: Truth) -> None:
    if truth.trials is not None:
        if not truth.trials.is_target.any():
            raise InputError(f"{fold.called}: no speaker has two utterances to compare; add some to the store")
        if truth.trials.is_target.all():
            raise InputError(
                f"{fold.called}: one speaker alone, so no two voices to compare; use --protocol 5-fold with at least "
                "ten speakers, or --train-on ANOTHER_STORE to test everyone of this one"
            )
    elif len(np.unique(targets.values[fold.train])) < 2:
        raise InputError(
            f"{fold.called}: every utterance to train on has the same {task.name}: there is nothing to tell apart"
        )


def _listen(corpus: Corpus, rows: np.ndarray, progress: Callable[[int, int], None] | None) -> _Known:
    transcripts = [""] * len(corpus)
    statistics_NF = np.zeros((len(corpus), 4 * NUM_MFCC), dtype=np.float32)

    def read(row: int) -> tuple[str, np.ndarray]:
        stored = corpus.read(row)
        return normalize_transcript(stored.text or ""), mfcc_statistics(load_audio(stored.audio, stored.id))

    with ThreadPoolExecutor(READERS) as readers:
        for done, (row, known) in enumerate(zip(rows.tolist(), readers.map(read, rows.tolist()), strict=True), 1):
            transcripts[row], statistics_NF[row] = known
            if progress:
                progress(done, len(rows))
    return _Known(transcripts, statistics_NF)


def mfcc_statistics(wave: np.ndarray) -> np.ndarray:
    """(80,) of an utterance (num_samples,) at 16 kHz: means, then standard deviations, of 20 MFCC and 20 deltas.

    Not normalised in any way, so level and channel are in them.
    """
    mel_TC = log_mel([torch.from_numpy(wave)]).numpy()
    cepstra_TM = np.asarray(scipy.fft.dct(mel_TC, type=2, norm="ortho"))[:, :NUM_MFCC]
    deltas_TM = deltas(torch.from_numpy(cepstra_TM)[None], torch.tensor([len(cepstra_TM)]), 1)[0].numpy()
    frames_TF = np.concatenate([cepstra_TM, deltas_TM], axis=1)
    return np.concatenate([frames_TF.mean(0), frames_TF.std(0)])


def _compared(fold: Fold, known: _Known) -> Iterator[tuple[str, _Answer]]:
    """Embeddings for verification."""
    # Nothing is chosen on the validation part, so it is fitted on too, unless it is what is reported.
    fitted = np.setdiff1d(np.union1d(fold.train, fold.validation), fold.test)
    scaler = StandardScaler().fit(known.statistics_NF[fitted])
    tested_NF = known.statistics_NF[fold.test]
    yield "MFCC statistics", _Answer(np.asarray(scaler.transform(tested_NF)))
    yield "MFCC statistics, unscaled", _Answer(tested_NF)


def _learned(
    task: Task, corpus: Corpus, fold: Fold, targets: Targets, known: _Known, has_words: bool
) -> Iterator[tuple[str, _Answer]]:
    """Answers for emotion and sentiment, from what is fitted on `fold.train`."""
    labels_N, num_labels = targets.values[fold.train], len(targets.classes)
    is_regression = task.problem_type == "regression"
    constant = np.array([np.median(labels_N)]) if is_regression else np.eye(num_labels)[np.bincount(labels_N).argmax()]
    yield "median" if is_regression else "most frequent", _Answer(np.tile(constant, (len(fold.test), 1)))

    validation = truth_of(task, corpus, targets, fold.validation) if len(fold.validation) else None
    for name, features_NF in _views(fold, known, has_words).items():
        best: tuple[float, float, _Model] | None = None
        for strength in STRENGTHS if validation else (DEFAULT_STRENGTH,):
            model = _fit(features_NF[fold.train], labels_N, num_labels, strength, is_regression)
            score = task.score(task.measure(model(features_NF[fold.validation]), validation)) if validation else 0.0
            if best is None or score < best[0]:  # of equals, the one that is penalised most
                best = score, strength, model
        assert best
        yield name, _Answer(best[2](features_NF[fold.test]), best[1])


def _views(fold: Fold, known: _Known, has_words: bool) -> dict[str, Matrix]:
    """Baseline → features (N, F) of all rows. Words and sound both have a mean square norm of about 1."""
    scaler = StandardScaler().fit(known.statistics_NF[fold.train])
    sound_NF = np.asarray(scaler.transform(known.statistics_NF)) / np.sqrt(known.statistics_NF.shape[1])
    if not has_words:
        return {"MFCC statistics": sound_NF}
    # scikit-learn's own pattern would drop apostrophes and words of one letter.
    bag = TfidfVectorizer(ngram_range=(1, 2), lowercase=False, token_pattern=r"\S+", sublinear_tf=True)
    bag.fit([known.transcripts[row] for row in fold.train])
    words_NF = sparse.csr_matrix(bag.transform(known.transcripts))
    both_NF = sparse.csr_matrix(sparse.hstack([words_NF, sparse.csr_matrix(sound_NF)]))
    return {"bag of words": words_NF, "MFCC statistics": sound_NF, "both": both_NF}


def _fit(features_NF: Matrix, labels_N: np.ndarray, num_labels: int, strength: float, is_regression: bool) -> _Model:
    """From (N, F) features and class numbers or scores, at least two different ones."""
    values_K, numbers_N = np.unique(labels_N, return_inverse=True)
    if is_regression and len(values_K) > FEW_VALUES:
        regressor = LinearSVR(epsilon=0, C=strength, max_iter=10_000, random_state=0)
        with warnings.catch_warnings():
            # A weak penalty takes long to converge to the last digit; the validation part judges what comes of it.
            warnings.simplefilter("ignore", ConvergenceWarning)
            regressor.fit(features_NF, labels_N)
        return lambda tested_NF: np.clip(regressor.predict(tested_NF), values_K[0], values_K[-1]).reshape(-1, 1)
    balance = None if is_regression else "balanced"
    classifier = LogisticRegression(C=strength, class_weight=balance, max_iter=5_000).fit(features_NF, numbers_N)

    def median(tested_NF: Matrix) -> np.ndarray:
        reached_NK = np.cumsum(classifier.predict_proba(tested_NF), axis=1)
        return values_K[(reached_NK >= 0.5).argmax(1)][:, None]

    def chances(tested_NF: Matrix) -> np.ndarray:
        known = np.asarray(classifier.predict_proba(tested_NF))
        outputs_NK = np.zeros((len(known), num_labels))
        outputs_NK[:, values_K] = known  # a class may be missing from the training part
        return outputs_NK

    return median if is_regression else chances


def _judged(
    task: Task, corpus: Corpus, protocol: Protocol, truths: Sequence[Truth], answers: Sequence[_Answer]
) -> dict[str, Any]:
    each: list[Metrics] = []
    for fold, truth, answer in zip(protocol.folds, truths, answers, strict=True):
        metrics = dict(task.measure(answer.outputs, truth))
        if task.compares:
            metrics.pop("threshold")  # of the test part itself: it must not be used
            if protocol.name == "ge2e":
                speakers = [str(corpus.speakers[row]) for row in fold.test]
                metrics["ge2e_eer"] = ge2e_eer(answer.outputs, speakers, GE2E_SEED)
        each.append(metrics)
    names = [fold.name for fold in protocol.folds]
    columns = {metric: np.array([metrics[metric] for metrics in each]) for metric in each[0]}
    judged: dict[str, Any] = {"metrics": {metric: float(values.mean()) for metric, values in columns.items()}}
    if task.compares and len(each) == 1 and (trials := truths[0].trials):
        speakers = [corpus.speakers[row] for row in protocol.folds[0].test]
        scores = trial_scores(answers[0].outputs, trials)
        judged["over_speakers"] = {"eer": eer_over_speakers(scores, trials, speakers)}
    if len(each) > 1:
        judged["over_folds"] = {metric: asdict(Interval.of(values)) for metric, values in columns.items()}
        judged["folds"] = dict(zip(names, each, strict=True))
        if not task.compares:
            together = Truth(np.concatenate([truth.targets for truth in truths]), truths[0].num_labels, None)
            judged["pooled_metrics"] = task.measure(np.concatenate([answer.outputs for answer in answers]), together)
    if answers[0].strength is not None:
        judged["strengths"] = {name: answer.strength for name, answer in zip(names, answers, strict=True)}
    return judged


def _ceilings(stores: Sequence[Path], metrics: Metrics) -> dict[str, Metrics]:
    """What is known → the best possible values of those of `metrics` that have one; nothing but for the demo corpus."""
    if any(store.corpus != "demo" for store in open_corpus(stores).stores):
        return {}
    best = {view: {name: each[name] for name in each if name in metrics} for view, each in demo_ceilings().items()}
    return best if all(best.values()) else {}
