"""Metrics of emotion, sentiment and speaker verification."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_curve

from ctal.errors import InputError
from ctal.metrics import (
    GE2E_DRAWS_A_SPEAKER,
    bootstrap_interval,
    det_curve,
    eer_interval,
    eer_threshold,
    emotion_metrics,
    ge2e_eer,
    sentiment_metrics,
    verification_metrics,
)
from test_imports import loaded_by

Trials = tuple[np.ndarray, np.ndarray]


@st.composite
def trials(draw: st.DrawFn) -> Trials:
    """Scores, with ties more often than not, and kinds of 2–40 trials, of which both are there."""
    kinds = draw(st.lists(st.booleans(), min_size=2, max_size=40).filter(lambda each: len(set(each)) == 2))
    levels = draw(st.integers(1, 60))
    scores = draw(st.lists(st.integers(-levels, levels), min_size=len(kinds), max_size=len(kinds)))
    return np.array(scores) / 8, np.array(kinds)


def eer(scores: np.ndarray, is_target: np.ndarray) -> float:
    return verification_metrics(scores, is_target)["eer"]


def normal_trials(count: int, distance: float, seed: int = 0) -> Trials:
    """A third are targets, with scores higher by `distance` standard deviations."""
    rng = np.random.default_rng(seed)
    is_target = np.arange(count) % 3 == 0
    return rng.normal(size=count) + distance * is_target, is_target


def speaker_trials(speakers: int, distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[tuple]]:
    """All pairs of different speakers, and ten trials within each; speakers differ in how alike they sound."""
    rng = np.random.default_rng(seed)
    pairs = [(f"s{one}", f"s{other}") for one in range(speakers) for other in range(one)]
    pairs += [(f"s{one}", f"s{one}") for one in range(speakers) for _ in range(10)]
    is_target = np.array([one == other for one, other in pairs])
    ease = dict(zip([f"s{one}" for one in range(speakers)], rng.normal(size=speakers), strict=True))
    scores = rng.normal(size=len(pairs)) + is_target * np.array([distance + ease[one] for one, _ in pairs])
    return scores, is_target, pairs


def test_importing_the_metrics_does_not_load_torch() -> None:
    assert not loaded_by("import ctal.metrics")


# Emotion ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_emotion_accuracies_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predictions, labels = map(list, zip(*pairs, strict=True))
    metrics = emotion_metrics(predictions, labels, 5)
    assert metrics["wa"] == pytest.approx(accuracy_score(labels, predictions), abs=1e-12)
    assert metrics["ua"] == pytest.approx(balanced_accuracy_score(labels, predictions), abs=1e-12)


def test_classes_that_no_label_has_do_not_count_in_unweighted_accuracy() -> None:
    assert emotion_metrics([0, 0, 3, 2], [0, 0, 0, 2], 4) == {"wa": 0.75, "ua": pytest.approx((2 / 3 + 1) / 2)}


def test_lists_arrays_and_tensors_give_the_same_numbers() -> None:
    predictions, labels = [0, 1, 1, 2], [0, 1, 2, 2]
    expected = emotion_metrics(predictions, labels, 3)
    assert emotion_metrics(np.array(predictions, np.int8), np.array(labels), 3) == expected
    assert emotion_metrics(torch.tensor(predictions), torch.tensor(labels), 3) == expected


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], "predictions: empty"),
        ([0, 1], [0], "labels: 1 for 2 predictions"),
        ([0, 3], [0, 1], "predictions: 3 is no class"),
        ([0, 1], [0, -1], "labels: -1 is no class"),
        ([0, 0.5], [0, 1], "predictions: 0.5 is no class"),
        ([0, np.nan], [0, 1], "predictions: 1 of them are NaN"),
        ([[0.2, 0.8, 0.0]], [1], "predictions: 2 dimensions, not 1"),
        (["happy"], ["sad"], "predictions: not an array of numbers"),
        ([[1], [1, 2]], [1, 2], "predictions: not an array of numbers"),
    ],
)
def test_what_is_no_class_is_refused(predictions: list, labels: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        emotion_metrics(predictions, labels, 3)


# Sentiment --------------------------------------------------------------------------------------------------------

THIRDS = st.integers(-9, 9).map(lambda third: third / 3)
"""Labels as in MOSEI: means of three ratings."""


@given(st.lists(st.tuples(st.floats(-4, 4, width=32), THIRDS), min_size=2, max_size=60))
def test_sentiment_metrics_are_those_of_scikit_learn_and_numpy(pairs: list[tuple[float, float]]) -> None:
    predictions, labels = (np.array(each) for each in zip(*pairs, strict=True))
    kept = labels != 0
    if not kept.any():
        return
    metrics = sentiment_metrics(predictions, labels)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["mae"] == pytest.approx(np.abs(predictions - labels).mean())
    for name, predicted, truth in (
        ("nonzero", predictions[kept] > 0, labels[kept] > 0),
        ("nonneg", predictions >= 0, labels >= 0),
    ):
        assert metrics[f"acc2_{name}"] == pytest.approx(accuracy_score(truth, predicted))
        assert metrics[f"f1_{name}"] == pytest.approx(f1_score(truth, predicted, average="weighted"))
    if min(predictions.std(), labels.std()) > 1e-6:
        assert metrics["corr"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1], abs=1e-6)


@pytest.mark.parametrize("constant", [0.1, 0.0, -3.0])
def test_correlation_with_a_constant_is_0(constant: float) -> None:
    values, flat = [-1.0, 0.5, 2.0, 2.5, 0.7, 0.3, 1.1], [constant] * 7
    assert sentiment_metrics(flat, values)["corr"] == 0
    assert sentiment_metrics(values, [0.1] * 7)["corr"] == 0


def test_correlation_does_not_depend_on_scale_or_offset() -> None:
    rng = np.random.default_rng(0)
    predictions, labels = rng.normal(size=(2, 50))
    expected = sentiment_metrics(predictions, labels)["corr"]
    for factor in (1e-200, 1e-3, 1e100):
        assert sentiment_metrics(predictions * factor, labels)["corr"] == pytest.approx(expected)
    assert sentiment_metrics(-predictions + 7, labels)["corr"] == pytest.approx(-expected)
    assert sentiment_metrics(labels, labels)["corr"] == pytest.approx(1)


def test_classes_are_clipped_and_rounded_to_the_nearest_with_halves_to_even() -> None:
    # 0.5 → 0, 1.5 → 2, 2.5 → 2, 3.9 → 3 of seven, and 2 of five.
    metrics = sentiment_metrics([0.5, 1.5, 2.5, 3.9, -3.6, -0.5], [0.0, 2.0, 3.0, 2.7, -2.2, 0.4])
    assert metrics["acc7"] == pytest.approx(4 / 6)
    assert metrics["acc5"] == 1


def test_a_neutral_prediction_is_not_positive_but_is_not_negative() -> None:
    metrics = sentiment_metrics([0.0, 0.0], [1.0, -1.0])
    assert metrics["acc2_nonzero"] == metrics["acc2_nonneg"] == 0.5
    assert sentiment_metrics([0.0], [1.0])["acc2_nonzero"] == 0
    assert sentiment_metrics([0.0], [1.0])["acc2_nonneg"] == 1


def test_sentiment_without_any_label_but_0_is_refused() -> None:
    with pytest.raises(InputError, match="labels: all are 0"):
        sentiment_metrics([0.3, -0.2], [0.0, 0.0])


# Verification -----------------------------------------------------------------------------------------------------


@given(trials())
def test_operating_points_are_those_of_scikit_learn(given_trials: Trials) -> None:
    scores, is_target = given_trials
    curve = det_curve(scores, is_target)
    false_positive, true_positive, thresholds = roc_curve(is_target, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.false_acceptance, false_positive[::-1], atol=1e-12)
    np.testing.assert_allclose(curve.false_rejection, 1 - true_positive[::-1], atol=1e-12)
    np.testing.assert_array_equal(curve.thresholds, thresholds[::-1])
    for threshold, acceptance, rejection in zip(curve.thresholds, *curve[:2], strict=True):
        assert acceptance == pytest.approx((scores[~is_target] >= threshold).mean())
        assert rejection == pytest.approx((scores[is_target] < threshold).mean())


@given(trials())
def test_operating_points_go_from_accepting_all_to_rejecting_all(given_trials: Trials) -> None:
    acceptance, rejection, thresholds = det_curve(*given_trials)
    assert (acceptance[0], rejection[0], acceptance[-1], rejection[-1]) == (1, 0, 0, 1)
    assert (np.diff(acceptance) <= 0).all()
    assert (np.diff(rejection) >= 0).all()
    assert (np.diff(thresholds) > 0).all()


@given(trials())
def test_eer_is_where_the_roc_crosses_the_diagonal(given_trials: Trials) -> None:
    false_positive, true_positive, _ = roc_curve(given_trials[1], given_trials[0], drop_intermediate=False)
    # On the polyline, FPR + TPR rises strictly from 0 to 2, and is 1 where the error rates are equal.
    expected = np.interp(1, false_positive + true_positive, false_positive)
    assert eer(*given_trials) == pytest.approx(expected, abs=1e-12)


@given(trials())
def test_only_the_order_of_scores_matters(given_trials: Trials) -> None:
    scores, is_target = given_trials
    expected = verification_metrics(scores, is_target)
    for transformed in (3 * scores - 100, np.exp(scores), np.arctan(scores)):
        assert verification_metrics(transformed, is_target) == pytest.approx(expected, abs=1e-12)
    shuffled = np.random.default_rng(0).permutation(len(scores))
    assert verification_metrics(scores[shuffled], is_target[shuffled]) == pytest.approx(expected, abs=1e-12)


@given(trials())
def test_swapping_the_kinds_and_the_sign_keeps_the_eer(given_trials: Trials) -> None:
    scores, is_target = given_trials
    assert eer(-scores, ~is_target) == pytest.approx(eer(scores, is_target), abs=1e-12)
    assert eer(-scores, is_target) == pytest.approx(1 - eer(scores, is_target), abs=1e-12)


@given(trials())
def test_metrics_lie_between_0_and_1(given_trials: Trials) -> None:
    assert all(0 <= value <= 1 + 1e-12 for value in verification_metrics(*given_trials).values())


def test_perfectly_separated_trials_have_no_error_and_a_threshold_in_the_gap() -> None:
    scores, is_target = [0.9, 0.1, 0.7, -0.5], [1, 0, 1, 0]
    assert verification_metrics(scores, is_target) == {"eer": 0, "min_dcf": 0}
    assert eer_threshold(scores, is_target) == pytest.approx(0.4)


def test_inverted_scores_are_always_wrong() -> None:
    assert verification_metrics([0.1, 0.9], [True, False]) == {"eer": 1, "min_dcf": 1}


def test_random_scores_are_wrong_half_of_the_time() -> None:
    assert eer(*normal_trials(20_000, 0)) == pytest.approx(0.5, abs=0.015)


def test_eer_of_normal_scores_is_the_known_one() -> None:
    # Two normal distributions at distance 2 cross at 1 standard deviation from either mean.
    assert eer(*normal_trials(60_000, 2)) == pytest.approx(0.1587, abs=0.005)


def test_equal_scores_move_together_whatever_their_order() -> None:
    assert eer(np.zeros(5), np.array([1, 0, 0, 1, 0])) == 0.5
    # By hand: (FAR, FRR) = (1, 0), (1/2, 0), (0, 1/2), (0, 1); the middle line crosses at 1/4.
    scores, is_target = np.array([0, 1, 1, 2]), np.array([0, 1, 0, 1])
    assert eer(scores, is_target) == 0.25
    assert eer(scores[::-1], is_target[::-1]) == 0.25


def test_minimum_cost_by_hand() -> None:
    # 1 of 4 targets lies below all 1,000 non-targets; the rest lie above: 0.01 · 1/4 / 0.01.
    scores, is_target = [-1] + 1000 * [0] + 3 * [1], [1] + 1000 * [0] + 3 * [1]
    assert verification_metrics(scores, is_target)["min_dcf"] == pytest.approx(0.25)
    # One non-target above the targets costs 0.99 / 0.01 / 1,000.
    assert verification_metrics([*scores, 2], [*is_target, 0])["min_dcf"] == pytest.approx(0.25 + 99 / 1001)


@given(trials())
def test_the_threshold_has_the_least_difference_of_error_rates(given_trials: Trials) -> None:
    scores, is_target = given_trials
    threshold = eer_threshold(scores, is_target)
    acceptance = (scores[~is_target] >= threshold).mean()
    rejection = (scores[is_target] < threshold).mean()
    curve = det_curve(scores, is_target)
    assert abs(acceptance - rejection) == pytest.approx(np.abs(curve[0] - curve[1]).min(), abs=1e-12)
    assert min(acceptance, rejection) - 1e-12 <= eer(scores, is_target) <= max(acceptance, rejection) + 1e-12


def test_at_the_threshold_both_error_rates_are_about_the_eer() -> None:
    scores, is_target = normal_trials(3000, 1.5)
    threshold, rate = eer_threshold(scores, is_target), eer(scores, is_target)
    assert (scores[~is_target] >= threshold).mean() == pytest.approx(rate, abs=1e-3)
    assert (scores[is_target] < threshold).mean() == pytest.approx(rate, abs=1e-3)


@pytest.mark.parametrize(
    "scores",
    [[0.0, np.nextafter(0, 1)], [1.0, np.nextafter(1, 2)], [-1.7e308, 1.7e308], [1.6e308, 1.7e308], [-5.0, -5.0]],
)
def test_a_threshold_is_finite_and_accepts_the_higher_score_even_between_extremes(scores: list[float]) -> None:
    threshold = eer_threshold(scores, [False, True])
    assert np.isfinite(threshold)
    assert scores[1] >= threshold
    assert scores[0] < threshold or scores[0] == scores[1]


@pytest.mark.parametrize("function", [verification_metrics, eer_threshold, det_curve])
@pytest.mark.parametrize(
    ("scores", "is_target", "message"),
    [
        ([], [], "scores: empty"),
        ([0.1, 0.2], [True], "is_target: 1 for 2 scores"),
        ([0.1, 0.2], [True, True], "is_target: no non-target trials"),
        ([0.1, 0.2], [False, False], "is_target: no target trials"),
        ([0.1, np.nan], [True, False], "scores: 1 of them are NaN"),
        ([0.1, -np.inf], [True, False], "scores: 1 of them are NaN or infinite"),
        ([0.1, 0.2], [2, 0], "is_target: neither true nor false"),
    ],
)
def test_trials_without_an_error_rate_are_refused(function, scores: list, is_target: list, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        function(scores, is_target)
    assert "\n" not in str(caught.value)


# Intervals --------------------------------------------------------------------------------------------------------


def test_a_bootstrap_that_draws_every_speaker_once_gives_the_plain_eer(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, is_target, pairs = speaker_trials(8, 1)

    def with_ones(statistic, groups: int, **_: int) -> tuple[float, float]:
        value = statistic(np.ones(groups, dtype=int))
        return value, value

    monkeypatch.setattr("ctal.metrics.bootstrap_interval", with_ones)
    assert eer_interval(scores, is_target, pairs)[0] == eer(scores, is_target)


def test_speakers_drawn_twice_weigh_as_if_their_trials_stood_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, is_target, pairs = speaker_trials(6, 1)
    counts = {"s0": 2, "s1": 0, "s2": 1, "s3": 3, "s4": 0, "s5": 0}
    repeats = [counts[one] * (counts[other] if one != other else 1) for one, other in pairs]
    expected = eer(np.repeat(scores, repeats), np.repeat(is_target, repeats))

    def with_counts(statistic, groups: int, **_: int) -> tuple[float, float]:
        assert groups == len(counts)
        value = statistic(np.array(list(counts.values())))
        return value, value

    monkeypatch.setattr("ctal.metrics.bootstrap_interval", with_counts)
    assert eer_interval(scores, is_target, pairs)[0] == pytest.approx(expected, abs=1e-12)


def test_the_interval_holds_the_eer_narrows_with_speakers_and_is_repeatable() -> None:
    widths = []
    for speakers in (8, 50):
        scores, is_target, pairs = speaker_trials(speakers, 2)
        low, high = eer_interval(scores, is_target, pairs, seed=3)
        assert 0 <= low < eer(scores, is_target) < high <= 1
        assert eer_interval(scores, is_target, pairs, seed=3) == (low, high)
        assert eer_interval(scores, is_target, pairs, seed=4) != (low, high)
        widths.append(high - low)
    assert widths[1] < widths[0] / 1.5


def test_a_thousand_draws_of_five_thousand_trials_take_under_2_seconds() -> None:
    scores, is_target, pairs = speaker_trials(91, 2)
    assert len(scores) > 4950
    start = time.perf_counter()
    eer_interval(scores, is_target, pairs)
    assert time.perf_counter() - start < 2


def test_two_speakers_have_an_interval_though_half_of_the_draws_have_no_eer() -> None:
    low, high = eer_interval([0.1, 0.9, 0.4, 0.5], [0, 1, 1, 0], [("a", "b"), ("a", "a"), ("b", "b"), ("b", "a")])
    assert 0 <= low <= high <= 1


def test_speakers_that_contradict_the_kind_of_a_trial_are_refused() -> None:
    with pytest.raises(InputError, match="target trial 1 is of a and b"):
        eer_interval([0.1, 0.2], [False, True], [("a", "b"), ("a", "b")])
    with pytest.raises(InputError, match=r"speaker_pairs: not of shape \(2, 2\)"):
        eer_interval([0.1, 0.2], [False, True], [("a", "b")])
    with pytest.raises(InputError, match="speaker_pairs: not of shape"):
        eer_interval([0.1, 0.2], [False, True], [("a", "b"), ("a",)])


def test_the_bootstrap_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(lambda counts: float(counts @ values / counts.sum()), 400, draws=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_a_bootstrap_without_groups_draws_or_values_is_refused() -> None:
    with pytest.raises(InputError, match="groups: 0"):
        bootstrap_interval(lambda counts: 0.0, 0)
    with pytest.raises(InputError, match="draws: 0"):
        bootstrap_interval(lambda counts: 0.0, 3, draws=0)
    with pytest.raises(InputError, match="draws: none of 10"):
        bootstrap_interval(lambda counts: float("nan"), 3, draws=10)


# The authors' protocol --------------------------------------------------------------------------------------------


def embeddings_of(speakers: int, distance: float, utterances: int = 30) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    names = [f"s{number}" for number in range(speakers) for _ in range(utterances)]
    centres = distance * rng.normal(size=(speakers, 24)).repeat(utterances, 0)
    return rng.normal(size=centres.shape) + centres, names


def test_ge2e_follows_the_loops_of_the_protocol() -> None:
    embeddings, names = embeddings_of(4, 0.3, utterances=20)
    rng = np.random.default_rng(5)
    order = rng.choice(4, 4, replace=False)
    drawn = [embeddings[rng.choice(np.arange(20) + 20 * number, 50)] for number in order]

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other))) + 1e-6

    own, others = [], []
    for speaker, utterances in enumerate(drawn):
        for number in range(25, 50):
            rest = [utterances[each] for each in range(25, 50) if each != number]
            own.append(cosine(utterances[number], np.mean(rest, axis=0)))
            others += [cosine(utterances[number], drawn[each][:25].mean(0)) for each in range(4) if each != speaker]
    best, expected = 1.0, 0.0
    for threshold in [0.01 * step for step in range(101)]:
        acceptance, rejection = np.mean(np.array(others) > threshold), np.mean(np.array(own) <= threshold)
        if abs(acceptance - rejection) < best:
            best, expected = abs(acceptance - rejection), (acceptance + rejection) / 2
    assert 0.05 < expected < 0.5
    assert ge2e_eer(embeddings, names, seed=5, draws=1) == pytest.approx(expected, abs=1e-6)


def test_ge2e_is_repeatable_and_falls_as_speakers_move_apart() -> None:
    close, far = embeddings_of(8, 0.2), embeddings_of(8, 5)
    assert ge2e_eer(*close, seed=0) == ge2e_eer(*close, seed=0) != ge2e_eer(*close, seed=1)
    assert ge2e_eer(*far, seed=0) < 0.01 < ge2e_eer(*close, seed=0)


def test_ge2e_averages_ten_draws_a_speaker_unless_told() -> None:
    embeddings, names = embeddings_of(5, 0.3)
    assert ge2e_eer(embeddings, names, 0) == ge2e_eer(embeddings, names, 0, draws=5 * GE2E_DRAWS_A_SPEAKER)
    assert ge2e_eer(embeddings, names, 0) != ge2e_eer(embeddings, names, 0, draws=1)


def test_ge2e_takes_names_as_strings_numbers_or_tensors() -> None:
    embeddings, names = embeddings_of(5, 0.3)
    numbers = [int(name[1:]) for name in names]
    expected = ge2e_eer(embeddings, names, 0)
    assert ge2e_eer(torch.from_numpy(embeddings), numbers, 0) == expected
    assert ge2e_eer(embeddings, torch.tensor(numbers), 0) == expected


def test_ge2e_calls_embeddings_that_are_all_alike_perfect_as_the_authors_code_does() -> None:
    _, names = embeddings_of(5, 0)
    assert ge2e_eer(np.ones((len(names), 3)), names, 0) == 0


def test_ge2e_refuses_what_it_cannot_draw_from() -> None:
    embeddings, names = embeddings_of(4, 1)
    with pytest.raises(InputError, match="speakers: 3 are too few"):
        ge2e_eer(embeddings[:90], names[:90], 0)
    with pytest.raises(InputError, match=r"speakers: not of shape \(120,\)"):
        ge2e_eer(embeddings, names[1:], 0)
    with pytest.raises(InputError, match="draws: 0 is too few"):
        ge2e_eer(embeddings, names, 0, draws=0)
    with pytest.raises(InputError, match="embeddings: 1 dimensions"):
        ge2e_eer(embeddings[0], names, 0)
    with pytest.raises(InputError, match="embeddings: 1 of them are NaN"):
        ge2e_eer(np.where(np.arange(embeddings.size).reshape(embeddings.shape) == 7, np.nan, embeddings), names, 0)
