"""What the tasks are measured by: emotion, sentiment, and verification of speakers.

Pure functions of arrays, lists or CPU tensors, in double precision; nothing here imports torch. All accuracies, error
rates and F1 scores are fractions in [0, 1], not percent.

In verification, a trial is a pair of utterances with a score. It is a target trial where both are of one speaker, and
it is accepted where its score is at least the threshold. So trials with the same score are accepted together, and T
trials with K different scores have K + 1 operating points: the lowest accepts everything, the highest nothing.

Shapes: T trials, P = K + 1 operating points, N utterances, E dimensions, S speakers, U utterances of a speaker,
G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import f1_score

from ctal.errors import InputError

P_TARGET = 0.01
"""Prior of a target trial in minDCF, as in VoxCeleb and in NIST SRE 2010."""

GE2E_SPEAKERS = 4
"""Speakers in one draw of the authors' verification protocol."""

GE2E_UTTERANCES = 50
"""Utterances of each of them; the first half enrols, the second is verified."""

GE2E_DRAWS_A_SPEAKER = 10
"""The authors average over ten times as many draws as there are speakers."""

GE2E_THRESHOLDS = 0.01 * np.arange(101)
"""All that the authors try."""


def emotion_metrics(predictions: ArrayLike, labels: ArrayLike, num_labels: int) -> dict[str, float]:
    """Weighted and unweighted accuracy of N predicted classes.

    `predictions` and `labels` are (N,) whole numbers from 0 to `num_labels` − 1. Gives

    - `wa`: the fraction that is right; classes weigh as much as they are frequent;
    - `ua`: the mean over classes of the fraction of their utterances that is right (macro recall). Classes without a
      label do not count; the authors' code gives NaN then, and the same number otherwise.

    Raises `InputError` where there is nothing, where lengths differ, and for anything that is not a class.
    """
    predicted, truth = _paired(predictions, labels, "predictions", "labels")
    for name, values in (("predictions", predicted), ("labels", truth)):
        is_class = (values == np.round(values)) & (values >= 0) & (values < num_labels)
        if not is_class.all():
            raise InputError(
                f"{name}: {values[~is_class][0]:g} is no class; give whole numbers from 0 to {num_labels - 1}"
            )
    is_right = predicted == truth
    classes = truth.astype(np.int64)
    counts = np.bincount(classes)
    recalls = np.bincount(classes, weights=is_right)[counts > 0] / counts[counts > 0]
    return {"wa": float(is_right.mean()), "ua": float(recalls.mean())}


def sentiment_metrics(predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Errors of N predicted sentiments, from −3 (very negative) to 3 (very positive).

    `predictions` and `labels` are (N,) numbers. Gives

    - `mae`: mean absolute error, in the unit of the labels;
    - `corr`: Pearson's correlation; 0 where either side is constant, for then nothing is known of it;
    - `acc2_nonzero`, `f1_nonzero`: accuracy and F1 (weighted by the frequency of each class in the labels) of
      positive (> 0) against the rest (≤ 0), over the utterances whose label is not 0. These are the authors'
      `acc_2class` and `f1_2class`;
    - `acc2_nonneg`, `f1_nonneg`: the same of non-negative (≥ 0) against negative (< 0), over all utterances;
    - `acc7`, `acc5`: both sides clipped to ±3 or ±2 and rounded to the nearest whole number, .5 to the even one
      (0.5 → 0, 1.5 → 2): the fraction that agrees.

    The conventions for two, five and seven classes are those of Tsai et al., "Multimodal Transformer", ACL 2019, and
    of the authors' code.

    Raises `InputError` where there is nothing, where lengths differ, for NaN or infinity, and where all labels are 0.
    """
    predicted, truth = _paired(predictions, labels, "predictions", "labels")
    is_nonzero = truth != 0
    if not is_nonzero.any():
        raise InputError("labels: all are 0, which leaves acc2_nonzero undefined; give some that are not")
    positive = predicted[is_nonzero] > 0, truth[is_nonzero] > 0
    nonneg = predicted >= 0, truth >= 0
    return {
        "mae": float(np.abs(predicted - truth).mean()),
        "corr": _pearson(predicted, truth),
        "acc2_nonzero": float((positive[0] == positive[1]).mean()),
        "f1_nonzero": _weighted_f1(*positive),
        "acc2_nonneg": float((nonneg[0] == nonneg[1]).mean()),
        "f1_nonneg": _weighted_f1(*nonneg),
        "acc7": _rounded_accuracy(predicted, truth, 3),
        "acc5": _rounded_accuracy(predicted, truth, 2),
    }


def verification_metrics(scores: ArrayLike, is_target: ArrayLike) -> dict[str, float]:
    """Equal error rate and minimum detection cost of T trials.

    `scores` (T,) are higher for pairs that sound more alike, in any unit; `is_target` (T,) is true or 1 where both
    utterances are of one speaker. Gives

    - `eer`: the rate at which false acceptances and false rejections are equally frequent. It is exact: the crossing of
      the diagonal with the ROC, whose operating points are joined by straight lines. This is the plain ROC, not its
      convex hull, which would flatter small lists;
    - `min_dcf`: the least cost p · FRR + (1 − p) · FAR over all operating points, divided by that of the better of
      accepting or rejecting everything, min(p, 1 − p), with p = `P_TARGET` and both errors at cost 1 (NIST SRE;
      VoxCeleb). At most 1.

    Raises `InputError` where there is nothing, where lengths differ, for NaN or infinity, and where target or
    non-target trials are lacking.
    """
    curve = det_curve(scores, is_target)
    costs = P_TARGET * curve.false_rejection + (1 - P_TARGET) * curve.false_acceptance
    return {
        "eer": _eer(curve.false_acceptance, curve.false_rejection),
        "min_dcf": float(costs.min() / min(P_TARGET, 1 - P_TARGET)),
    }


def eer_threshold(scores: ArrayLike, is_target: ArrayLike) -> float:
    """The threshold, in the unit of `scores`, at which a model decides: a pair is accepted where score ≥ threshold.

    Of all operating points it is the one at which false acceptances and false rejections differ least (of two, the one
    that accepts more), so that each is about the `eer` of `verification_metrics`. The threshold lies halfway between
    the two scores that it separates; where all scores are equal, it is that score. Takes and raises the same as
    `verification_metrics`.
    """
    curve = det_curve(scores, is_target)
    point = int(np.abs(curve.false_acceptance - curve.false_rejection).argmin())
    accepted = float(curve.thresholds[point])
    if point == 0:
        return accepted
    rejected = float(curve.thresholds[point - 1])
    middle = (rejected + accepted) / 2
    # Neighbouring floats have no middle, and the sum of huge ones overflows.
    return middle if rejected < middle <= accepted else accepted


class DetCurve(NamedTuple):
    """The P operating points of a list of trials, from accepting everything to accepting nothing."""

    false_acceptance: np.ndarray
    """(P,) fraction of non-target trials with score ≥ threshold; falls from 1 to 0."""
    false_rejection: np.ndarray
    """(P,) fraction of target trials with score < threshold; rises from 0 to 1."""
    thresholds: np.ndarray
    """(P,) the different scores in ascending order, then infinity."""


def det_curve(scores: ArrayLike, is_target: ArrayLike) -> DetCurve:
    """All operating points, for a DET or ROC plot: exact, none is left out. Takes and raises as `verification_metrics`.

    Source: Martin et al., "The DET curve in assessment of detection task performance", Eurospeech 1997, who draw it on
    normal deviates (`scipy.stats.norm.ppf`).
    """
    values, target = _trials(scores, is_target)
    ranking = _rank(values)
    false_acceptance, false_rejection = _error_rates(ranking, target, np.ones(len(values)))
    return DetCurve(false_acceptance, false_rejection, np.append(values[ranking.order][ranking.last], np.inf))


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], groups: int, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic, (low, high), when `groups` groups are drawn again with replacement.

    Groups are what is independent, such as speakers: resampling their utterances or trials one by one would give
    intervals that are too narrow. `statistic` gets (G,) whole numbers, how often each group was drawn (in all G times),
    and gives the statistic of the data weighted so, or NaN where that draw has none; such draws are left out.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Raises `InputError` for less than 1 group or draw, and where no draw has a value.
    """
    for name, value in (("groups", groups), ("draws", draws)):
        if value < 1:
            raise InputError(f"{name}: {value} is too few; give at least 1")
    rng = np.random.default_rng(seed)
    counts_DG = rng.multinomial(groups, np.full(groups, 1 / groups), size=draws)
    values = np.array([statistic(counts_G) for counts_G in counts_DG], dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        raise InputError(f"draws: none of {draws} has a value of the statistic; give more groups or draws")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def eer_interval(
    scores: ArrayLike,
    is_target: ArrayLike,
    speaker_pairs: ArrayLike,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % bootstrap interval of the EER over speakers, (low, high).

    `speaker_pairs` (T, 2) names the two speakers of each trial, by strings or numbers. In each draw of speakers, a
    trial of two speakers weighs the product of how often they were drawn, a trial within one speaker as much as that
    speaker was drawn. Draws without a target or without a non-target trial have no EER and are left out; where each of
    5 speakers has target trials, that is 1 in 600. 1,000 draws of 5,450 trials take 0.1 s.

    Raises as `verification_metrics` and `bootstrap_interval`, and where `is_target` and `speaker_pairs` contradict each
    other.
    """
    values, target = _trials(scores, is_target)
    names, numbers = _names(speaker_pairs, "speaker_pairs", (len(values), 2))
    first, second = numbers.T
    is_within = first == second
    if (is_within != target).any():
        trial = int((is_within != target).argmax())
        kind = "target" if target[trial] else "non-target"
        one, other = names[numbers[trial]]
        raise InputError(f"speaker_pairs: {kind} trial {trial} is of {one} and {other}; mend it or is_target")
    ranking = _rank(values)

    def weighted_eer(counts_G: np.ndarray) -> float:
        weights = np.where(is_within, counts_G[first], counts_G[first] * counts_G[second])
        if not weights[target].any() or not weights[~target].any():
            return float("nan")
        return _eer(*_error_rates(ranking, target, weights))

    return bootstrap_interval(weighted_eer, len(names), draws=draws, seed=seed)


def ge2e_eer(embeddings: ArrayLike, speakers: ArrayLike, seed: int, draws: int | None = None) -> float:
    """The EER of the authors' verification protocol, for comparison with their number only.

    `embeddings` is (N, E), `speakers` (N,) names the speaker of each, by strings or numbers. In each draw, 4 speakers
    are drawn without, and 50 utterances of each *with* replacement; 25 enrol and 25 are verified. An utterance is
    compared, by cosine + 1e-6, with the centroid of each other speaker's enrolled utterances, but with its own
    speaker's centroid over the other 24 *verified* ones, among which it may be again. Of the thresholds 0, 0.01, … 1,
    the first at which false acceptance and false rejection differ least gives (FAR + FRR) / 2, or 0 where at every
    threshold one of them is 1 and the other 0: so embeddings that are all alike have an EER of 0. The result is the
    mean over `draws`; the authors take 10 times as many as there are speakers, and so does None.

    These faults favour the model, and draws of 4 speakers vary a lot; `verification_metrics` is what to report.
    Source: the authors' code, after PyTorch_Speaker_Verification (GE2E: Wan et al., ICASSP 2018); theirs is not seeded,
    so it agrees in distribution, not draw by draw.

    Raises `InputError` where there is nothing, where lengths differ, for NaN or infinity, for fewer than 4 speakers and
    less than 1 draw.
    """
    embeddings_NE = _numbers(embeddings, "embeddings", dimensions=2)
    names, numbers = _names(speakers, "speakers", (len(embeddings_NE),))
    if len(names) < GE2E_SPEAKERS:
        raise InputError(f"speakers: {len(names)} are too few for this protocol; give at least {GE2E_SPEAKERS}")
    if draws is None:
        draws = GE2E_DRAWS_A_SPEAKER * len(names)
    if draws < 1:
        raise InputError(f"draws: {draws} is too few; give at least 1")
    rng = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(numbers == number) for number in range(len(names))]
    rates = []
    for _ in range(draws):
        chosen = rng.choice(len(rows_of), GE2E_SPEAKERS, replace=False)
        drawn_SU = np.stack([rng.choice(rows_of[number], GE2E_UTTERANCES) for number in chosen])
        rates.append(_ge2e_rate(embeddings_NE[drawn_SU]))
    return float(np.mean(rates))


def _ge2e_rate(drawn_SUE: np.ndarray) -> float:
    """The EER of one draw of S speakers by the authors' protocol; see `ge2e_eer`."""
    speakers, half = len(drawn_SUE), drawn_SUE.shape[1] // 2
    enrolled_SUE, verified_SUE = drawn_SUE[:, :half], drawn_SUE[:, half:]
    own_SUE = (verified_SUE.sum(1, keepdims=True) - verified_SUE) / (half - 1)
    directions_SUE = _unit(verified_SUE)
    own_scores_SU = (directions_SUE * _unit(own_SUE)).sum(-1) + 1e-6
    other_scores_SUS = directions_SUE @ _unit(enrolled_SUE.mean(1)).T + 1e-6
    other_scores = np.sort(other_scores_SUS[~np.eye(speakers, dtype=bool)[:, None].repeat(half, 1)])
    false_acceptances = len(other_scores) - np.searchsorted(other_scores, GE2E_THRESHOLDS, side="right")
    false_rejections = np.searchsorted(np.sort(own_scores_SU.ravel()), GE2E_THRESHOLDS, side="right")
    # In single precision and this order, for rounding decides which of two equal differences comes out as the smaller.
    single = np.float32
    far = false_acceptances.astype(single) / single(speakers - 1) / single(half) / single(speakers)
    frr = false_rejections.astype(single) / single(half) / single(speakers)
    differences = np.abs(far - frr)
    best = differences.argmin()
    return float((far[best] + frr[best]) / 2) if differences[best] < 1 else 0.0


def _unit(vectors: np.ndarray) -> np.ndarray:
    """(…, E) scaled to length 1; zero stays zero, as in torch's `cosine_similarity`."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-8)


class _Ranking(NamedTuple):
    order: np.ndarray
    """(T,) trials by ascending score."""
    last: np.ndarray
    """(K,) where in that order each different score ends."""


def _rank(scores: np.ndarray) -> _Ranking:
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    is_last = np.append(ordered[1:] != ordered[:-1], True)
    return _Ranking(order, np.flatnonzero(is_last))


def _error_rates(ranking: _Ranking, is_target: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P,) false acceptance and false rejection of weighted trials; both kinds must weigh something.

    Whole weights are summed without rounding, so that rates are exactly 0 and 1 at the ends.
    """
    below_nontarget, below_target = (
        np.append(0, np.cumsum((weights * is_kind)[ranking.order])[ranking.last]) for is_kind in (~is_target, is_target)
    )
    return (below_nontarget[-1] - below_nontarget) / below_nontarget[-1], below_target / below_target[-1]


def _eer(false_acceptance: np.ndarray, false_rejection: np.ndarray) -> float:
    """Where the straight lines between operating points cross FAR = FRR."""
    difference = false_acceptance - false_rejection  # falls from 1 to −1
    after = int((difference <= 0).argmax())
    before = after - 1
    share = difference[before] / (difference[before] - difference[after])
    return float(false_rejection[before] + share * (false_rejection[after] - false_rejection[before]))


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation of two (N,) arrays; 0 where either is constant."""
    scaled = []
    for values in (one, other):
        # The mean of equal numbers may be off by rounding; their differences from the first are not.
        shifted = values - values[0]
        centred = shifted - shifted.mean()
        peak = np.abs(centred).max()
        if peak == 0:
            return 0.0
        scaled.append(centred / peak)  # lest squares of tiny numbers vanish
    product = scaled[0] @ scaled[1] / np.sqrt((scaled[0] @ scaled[0]) * (scaled[1] @ scaled[1]))
    return float(np.clip(product, -1, 1))


def _weighted_f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float(f1_score(truth, predicted, average="weighted"))


def _rounded_accuracy(predicted: np.ndarray, truth: np.ndarray, limit: int) -> float:
    return float((np.round(predicted.clip(-limit, limit)) == np.round(truth.clip(-limit, limit))).mean())


def _numbers(values: ArrayLike, name: str, dimensions: int = 1) -> np.ndarray:
    """`values` in double precision, which are finite, in so many dimensions, and not empty."""
    try:
        numbers = np.asarray(values).astype(np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}: not an array of numbers; give lists, arrays or CPU tensors of equal rows") from None
    if numbers.ndim != dimensions:
        raise InputError(f"{name}: {numbers.ndim} dimensions, not {dimensions}; its shape is {numbers.shape}")
    if not numbers.size:
        raise InputError(f"{name}: empty; give at least one")
    if not np.isfinite(numbers).all():
        raise InputError(f"{name}: {(~np.isfinite(numbers)).sum()} of them are NaN or infinite; leave those out")
    return numbers


def _names(values: ArrayLike, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The different names in order, and the number of each of `values` among them, of this shape."""
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.empty(0)
    if array.shape != shape:
        raise InputError(f"{name}: not of shape {shape}; give {'a pair' if len(shape) > 1 else 'one name'} for each")
    names, numbers = np.unique(array, return_inverse=True)
    return names, numbers.reshape(shape)


def _paired(one: ArrayLike, other: ArrayLike, name: str, other_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Both as (N,) numbers of one length."""
    values, others = _numbers(one, name), _numbers(other, other_name)
    if len(values) != len(others):
        raise InputError(f"{other_name}: {len(others)} for {len(values)} {name}; give as many")
    return values, others


def _trials(scores: ArrayLike, is_target: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(T,) scores and bool, with both kinds of trials among them."""
    values, kinds = _paired(scores, is_target, "scores", "is_target")
    if not np.isin(kinds, (0, 1)).all():
        raise InputError("is_target: neither true nor false in places; give booleans, or 0 and 1")
    target = kinds == 1
    if target.all() or not target.any():
        raise InputError(f"is_target: no {'non-target' if target.all() else 'target'} trials; give some of both kinds")
    return values, target
