"""What pre-training has learned: the arithmetic of the comparisons, and their references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from conftest import TinyCorpus
from ctal import CtalForPreTraining
from ctal.batching import Corpus, PretrainingDataset
from ctal.diagnostics import (
    DRAWS,
    Comparison,
    Interval,
    _partner,
    diagnose,
    interpolated,
    listening_test,
    training_medians,
    unigram_log_probabilities,
)
from ctal.feature_extraction_ctal import CtalFeatureExtractor
from ctal.masking import IGNORED
from ctal.pretrain import load_tokenizer, make_dataset, new_model
from ctal.processing_ctal import CtalProcessor
from ctal.recipes import PretrainConfig, make_config
from ctal.store import Store

ROWS = np.arange(24)


@pytest.fixture(scope="module")
def processor(tiny: TinyCorpus) -> CtalProcessor:
    return CtalProcessor(CtalFeatureExtractor(), load_tokenizer(tiny.tokenizer))


@pytest.fixture(scope="module")
def dataset(tiny: TinyCorpus, processor: CtalProcessor) -> PretrainingDataset:
    corpus = Corpus([Store(tiny.store)])
    return make_dataset(corpus, processor, make_config(PretrainConfig), max_frames=3000, seed=0)


@pytest.fixture(scope="module")
def model(processor: CtalProcessor) -> CtalForPreTraining:
    torch.manual_seed(0)
    return new_model("nano", processor, {"frame_stack": 2})


# Arithmetic -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_an_interval_is_scipy_s_t_interval(values: list[float]) -> None:
    array = np.array(values)
    interval = Interval.of(np.append(array, np.nan))
    assert interval.mean == pytest.approx(array.mean())
    low, high = stats.t.interval(0.95, len(array) - 1, loc=array.mean(), scale=max(stats.sem(array), 1e-300))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-9)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    one = Interval.of(np.array([2.0, np.nan]))
    assert one.mean == 2
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(Interval.of(np.array([np.nan])).mean)


def test_a_comparison_is_paired_and_a_gain_is_the_reference_s_loss_minus_the_model_s() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(10, 5, 40)
    model = reference - 0.5 + rng.normal(0, 0.01, 40)
    model[3], reference[7] = np.nan, np.nan
    compared = Comparison.of("a name", "L1", model, reference)
    both = ~np.isnan(model) & ~np.isnan(reference)
    assert compared.utterances == 38
    assert compared.gain.mean == pytest.approx(0.5, abs=0.01)
    assert 0 < compared.gain.low < compared.gain.high, "unpaired, the spread of utterances would hide it"
    paired = stats.ttest_rel(reference[both], model[both]).confidence_interval()
    assert (compared.gain.low, compared.gain.high) == pytest.approx(tuple(paired))
    assert compared.model.mean == pytest.approx(model[both].mean())


def test_a_line_joins_the_known_frames_beside_a_gap_and_is_constant_at_the_ends() -> None:
    features = torch.tensor([[9.0, 0.0], [1.0, 10.0], [9.0, 0.0], [9.0, 0.0], [4.0, 40.0], [9.0, 0.0]])
    is_known = torch.tensor([False, True, False, False, True, False])
    expected = torch.tensor([[1.0, 10], [1, 10], [2, 20], [3, 30], [4, 40], [4, 40]])
    assert torch.allclose(interpolated(features, is_known), expected)
    assert torch.equal(interpolated(features, torch.ones(6, dtype=torch.bool)), features)
    assert not interpolated(features, torch.zeros(6, dtype=torch.bool)).any()


# References -------------------------------------------------------------------------------------------------------


def test_unigram_probabilities_sum_to_1_leave_special_tokens_out_and_follow_the_counts(
    dataset: PretrainingDataset, processor: CtalProcessor
) -> None:
    log_probabilities = unigram_log_probabilities(dataset, ROWS)
    assert log_probabilities.exp().sum().item() == pytest.approx(1)
    assert (log_probabilities[: dataset.special_ids] == -torch.inf).all()
    counts = np.zeros(dataset.vocab_size)
    for row in ROWS.tolist():
        for token in dataset.encode(dataset.corpus.read(row).text)[1:-1]:
            counts[token] += 1
    assert int(log_probabilities.argmax()) == int(counts.argmax())
    words = slice(dataset.special_ids, None)
    smoothed = (counts[words] + 0.1) / (counts[words] + 0.1).sum()
    assert log_probabilities[words].exp().numpy() == pytest.approx(smoothed)


def test_medians_are_those_of_the_training_frames(dataset: PretrainingDataset) -> None:
    frames = torch.cat([dataset.utterance(row, 0)["feature_labels"] for row in range(6)])
    medians = training_medians(dataset, ROWS[:6])
    assert medians.shape == (160,)
    assert torch.allclose(medians, frames.float().median(0).values)


@given(st.lists(st.lists(st.integers(5, 8), max_size=6).map(lambda words: (0, *words, 2)), min_size=1, max_size=12))
def test_a_partner_s_transcript_is_another_one_as_long_give_or_take_a_token(texts: list[tuple[int, ...]]) -> None:
    for number, own in enumerate(texts):
        fitting = [
            text for text in texts if text != own and min(len(text), len(own)) > 2 and abs(len(text) - len(own)) <= 1
        ]
        partner = _partner(texts, number)
        if partner is None:
            assert not fitting
        else:
            assert texts[partner] in fitting


# All together -----------------------------------------------------------------------------------------------------


PARTS = {"static": slice(0, 80), "delta": slice(80, 160)}


def test_every_question_is_answered_and_the_same_twice(dataset: PretrainingDataset, model: CtalForPreTraining) -> None:
    compared = diagnose(model, dataset, ROWS[:12], ROWS[12:], parts=PARTS)
    assert [each.name.split(":")[0] for each in compared] == [
        *("zeroed frames, all dimensions", "zeroed frames, static dimensions", "zeroed frames, delta dimensions"),
        *("zeroed frames, all dimensions", "zeroed frames, static dimensions", "zeroed frames, delta dimensions"),
        "masked tokens",
        "masked frames",
    ]
    for each in compared:
        assert 2 <= each.utterances <= 12
        assert math.isfinite(each.gain.mean)
        assert each.gain.low < each.gain.mean < each.gain.high
    everything, static, delta = compared[:3]
    assert everything.model.mean == pytest.approx((static.model.mean + delta.model.mean) / 2, rel=1e-4)
    assert not model.training
    assert diagnose(model, dataset, ROWS[:12], ROWS[12:], parts=PARTS) == compared


def test_an_untrained_model_guesses_tokens_worse_than_their_frequencies(
    dataset: PretrainingDataset, model: CtalForPreTraining
) -> None:
    tokens = next(each for each in diagnose(model, dataset, ROWS[:12], ROWS[12:], parts=PARTS) if each.unit == "nats")
    assert tokens.model.mean == pytest.approx(math.log(dataset.vocab_size), rel=0.1)
    assert tokens.gain.high < 0


def test_a_model_that_ignores_the_text_gains_nothing_from_the_own_transcript(
    dataset: PretrainingDataset, processor: CtalProcessor
) -> None:
    torch.manual_seed(0)
    deaf = new_model("nano", processor, {"frame_stack": 2})
    with torch.no_grad():
        for layer in deaf.ctal.audio_encoder.layers:
            layer.cross_attention.output.dense.weight.zero_()  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]
    deaf.eval()
    listening = listening_test(deaf, dataset, ROWS.tolist())
    assert listening is not None
    assert listening.gain.mean == pytest.approx(0, abs=1e-6)
    assert listening.utterances <= 18, "those without a transcript have no partner"


def test_without_transcripts_there_is_no_listening_test(dataset: PretrainingDataset, model: CtalForPreTraining) -> None:
    assert listening_test(model, dataset, ROWS[18:].tolist()) is None


def test_masks_of_the_draws_differ_from_each_other_and_from_those_of_training(dataset: PretrainingDataset) -> None:
    epochs = [0, *range(-DRAWS, 0)]
    masks = [dataset.utterance(20, epoch)["mask_time_indices"] for epoch in epochs]
    for number, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:number])
    labels = torch.cat([dataset.utterance(row, -1)["labels"] for row in range(18)])
    assert (labels != IGNORED).any()
