"""Invariants of the heads of tasks, at nano size and without dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import (
    AutoModelForAudioXVector,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from conftest import BEYOND_THE_PAPER
from ctal import CtalForSequenceClassification, CtalForXVector
from ctal.errors import InputError
from ctal.fusion import FUSIONS, Pools, PoolStandardisation
from ctal.modeling_ctal import SCORES, WeightedLayerSum
from test_modeling_ctal import UTTERANCES, Batch, collate, frames_alone, inputs_of, nano, pretraining_model

LABELS = torch.tensor([0, 2, 1, 2])

Model = CtalForSequenceClassification | CtalForXVector


def task_model(
    kind: type[Model] = CtalForSequenceClassification,
    labels: int = 3,
    problem_type: Literal["regression"] | None = None,
    **fields: Any,
) -> Model:
    config = nano(initializer_range=0.2, head_dropout_prob=0.0, **fields)
    config.num_labels, config.problem_type = labels, problem_type
    torch.manual_seed(0)
    return kind(config).eval()


def batch_of(numbers: list[int], padding: int = 0) -> Batch:
    return inputs_of(collate([UTTERANCES[number] for number in numbers], padding))


BATCH = batch_of([0, 1, 2, 3])


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("stack", [1, 2])
def test_padding_and_the_other_utterances_of_a_batch_change_nothing(fusion: str, stack: int) -> None:
    model = task_model(fusion=fusion, frame_stack=stack)
    together = model(**batch_of([0, 1, 2, 3], padding=5), labels=LABELS)

    for number in range(4):
        alone = model(**batch_of([number]))
        torch.testing.assert_close(alone.embeddings[0], together.embeddings[number], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.logits[0], together.logits[number], atol=1e-5, rtol=0)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("stack", [1, 2])
def test_frames_without_padding_give_the_same_with_an_utterance_that_has_none_between_others(
    fusion: str, stack: int
) -> None:
    model = task_model(fusion=fusion, frame_stack=stack)
    padded = dict(BATCH)
    padded["feature_attention_mask"] = BATCH["feature_attention_mask"].clone()
    padded["feature_attention_mask"][1] = 0

    expected = model(**padded)
    found = model(**padded | {"input_features": frames_alone(padded)})

    torch.testing.assert_close(found.embeddings, expected.embeddings)
    torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_microbatches_with_the_count_of_the_step_add_up_to_the_whole_batch(fusion: str) -> None:
    model = task_model(fusion=fusion)
    whole = model(**BATCH, labels=LABELS)

    parts = [model(**batch_of(numbers), labels=LABELS[numbers], utterance_count=4) for numbers in ([0], [1, 3], [2])]

    for name in ("loss", "task_loss", "orthogonality_loss"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name != "audio"])
def test_an_utterance_without_a_recording_gives_what_its_text_alone_gives(fusion: str) -> None:
    model = task_model(fusion=fusion)
    mask = BATCH["feature_attention_mask"].clone()
    mask[1] = 0

    mixed = model(**BATCH | {"feature_attention_mask": mask}, labels=LABELS)
    text_alone = model(**{name: value[[1]] for name, value in BATCH.items() if "feature" not in name})

    torch.testing.assert_close(mixed.embeddings[1], text_alone.embeddings[0])
    assert mixed.loss.isfinite()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("pooling", ["max", "prosody"])
def test_with_prosody_or_without_every_parameter_that_there_is_has_a_gradient(fusion: str, pooling: str) -> None:
    # DDP waits for all of them; of an encoder or a layer that the fusion does not look at there is none to wait for.
    model = task_model(fusion=fusion, pitch=True, audio_pooling=pooling)
    model(**BATCH, labels=LABELS).loss.backward()

    assert all(parameter.grad is not None for parameter in model.head.parameters())


@pytest.mark.parametrize("head", [{}, {"fusion": "tensor", "pitch": True, "audio_pooling": "prosody"}])
def test_without_any_recording_every_parameter_still_has_a_gradient(head: dict[str, Any]) -> None:
    # DDP waits for all of them.
    model = task_model(**head)
    model(**BATCH | {"feature_attention_mask": 0 * BATCH["feature_attention_mask"]}, labels=LABELS).loss.backward()

    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_audio_pools_alone_need_a_recording() -> None:
    with pytest.raises(InputError, match="fusion='audio' needs a recording"):
        task_model(fusion="audio")(input_ids=BATCH["input_ids"])


def test_the_loss_is_the_tasks_and_the_weighted_orthogonality() -> None:
    output = task_model(orthogonality_weight=0.25)(**BATCH, labels=LABELS)

    assert 0 < output.orthogonality_loss <= 2
    torch.testing.assert_close(output.loss, output.task_loss + 0.25 * output.orthogonality_loss)
    torch.testing.assert_close(output.task_loss, torch.nn.functional.cross_entropy(output.logits, LABELS))


def test_weights_of_labels_scale_the_loss_of_their_utterances() -> None:
    model = task_model(fusion="concat")
    weights = torch.tensor([1.0, 2.0, 0.0])

    output = model(**BATCH, labels=LABELS, class_weights=weights)

    each = torch.nn.functional.cross_entropy(output.logits, LABELS, reduction="none")
    torch.testing.assert_close(output.loss, (each * weights[LABELS]).mean())


def test_labels_are_smoothed_in_training_alone() -> None:
    plain, smoothed = (task_model(fusion="concat", label_smoothing=share) for share in (0.0, 0.3))

    torch.testing.assert_close(smoothed(**BATCH, labels=LABELS).loss, plain(**BATCH, labels=LABELS).loss)

    output = smoothed.train()(**BATCH, labels=LABELS)
    expected = torch.nn.functional.cross_entropy(output.logits, LABELS, label_smoothing=0.3)
    torch.testing.assert_close(output.loss, expected)


def test_a_histogram_of_scores_is_learned_by_its_shares_and_answers_with_its_median() -> None:
    model = task_model(labels=1, problem_type="regression", fusion="concat", regression_loss="histogram")
    heights: list[Any] = []
    model.classifier.register_forward_hook(lambda _, __, output: heights.append(output))
    labels = torch.tensor([-3.0, 0.125, 1.0, 3.0])

    output = model(**BATCH, labels=labels)

    shares = torch.zeros(4, len(SCORES))
    shares[0, 0] = shares[2, SCORES.index(1.0)] = shares[3, -1] = 1.0
    shares[1, SCORES.index(0.0)], shares[1, SCORES.index(0.5)] = 0.75, 0.25
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(heights[0], shares))
    whole = torch.tensor([-3, 0, 1, 3])
    assert model(**BATCH, labels=whole).loss == model(**BATCH, labels=whole.float()).loss
    assert output[0] is output.loss
    assert output.logits.shape == (4, 1)
    for chances, score in zip(heights[0].softmax(1), output.logits[:, 0].tolist(), strict=True):
        place = SCORES.index(score)
        assert chances[:place].sum() < 0.5 <= chances[: place + 1].sum() + 1e-6


@pytest.mark.parametrize(("loss", "power"), [("l1", 1), ("mse", 2)])
def test_a_regression_is_judged_by_what_is_asked_for(loss: str, power: int) -> None:
    model = task_model(labels=1, problem_type="regression", fusion="concat", regression_loss=loss)
    scores = torch.tensor([-3.0, 0.5, 1.0, 3.0])

    output = model(**BATCH, labels=scores)

    assert output.logits.shape == (4, 1)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - scores).abs().pow(power).mean())


def test_a_margin_makes_the_right_speaker_harder_in_training_alone() -> None:
    model = task_model(CtalForXVector, speaker_loss="aam", speaker_margin=0.3, speaker_scale=10.0)

    evaluated = model(**BATCH, labels=LABELS).logits
    trained = model.train()(**BATCH, labels=LABELS).logits

    right = torch.zeros_like(evaluated, dtype=torch.bool).scatter(1, LABELS[:, None], True)
    torch.testing.assert_close(trained[~right], evaluated[~right])
    angles = [(logits[right] / 10).clamp(-1, 1).acos() for logits in (evaluated, trained)]
    torch.testing.assert_close(angles[1], angles[0] + 0.3, atol=1e-3, rtol=0)
    assert evaluated.abs().max() <= 10


@pytest.mark.parametrize("kind", [CtalForSequenceClassification, CtalForXVector])
def test_a_saved_model_comes_back_equal_and_auto_classes_find_it(kind: type[Model], tmp_path: Path) -> None:
    model = task_model(kind, decision_threshold=0.5)
    model.save_pretrained(tmp_path)
    auto = AutoModelForAudioXVector if kind is CtalForXVector else AutoModelForSequenceClassification

    for loaded in (kind.from_pretrained(tmp_path), auto.from_pretrained(tmp_path)):
        assert isinstance(loaded, kind)
        assert loaded.config.decision_threshold == 0.5
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        # Where weights lie in memory decides how some processors round.
        torch.testing.assert_close(loaded.eval()(**BATCH).logits, model(**BATCH).logits)


def test_a_task_starts_from_the_encoders_of_a_pretrained_model(tmp_path: Path) -> None:
    pretrained = pretraining_model()
    pretrained.save_pretrained(tmp_path)

    model = CtalForSequenceClassification.from_pretrained(tmp_path, num_labels=3)

    for name, value in pretrained.ctal.state_dict().items():
        assert torch.equal(model.ctal.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"fusion": "orthogonl"}, "did you mean 'orthogonal'"),
        ({"orthogonal_norm": "other"}, "use cosine, reference"),
        ({"speaker_loss": "aamm"}, "did you mean 'aam'"),
        ({"regression_loss": "l2"}, "use l1, mse, histogram"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0: must be at least 0 and below 1"),
        ({"audio_pooling": "prosody"}, "for a model whose features have pitch"),
        ({"head_dropout_prob": 1.0}, "head_dropout_prob"),
        ({"orthogonality_weight": -1.0}, "orthogonality_weight"),
    ],
)
def test_a_head_that_there_is_not_is_refused_in_one_line(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        nano(**fields)
    assert "\n" not in str(error.value)


class Labelled(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**inputs_of(UTTERANCES[number % 4]), "labels": LABELS[[number % 4]]}


def collate_labelled(rows: list[Batch]) -> Batch:
    labels = torch.cat([row.pop("labels") for row in rows])
    return {**collate(rows), "labels": labels}


def test_the_trainer_of_transformers_trains_and_evaluates(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=4, report_to=[], use_cpu=True, learning_rate=1e-2
    )
    trainer = Trainer(
        task_model(), arguments, data_collator=collate_labelled, train_dataset=Labelled(), eval_dataset=Labelled()
    )

    before = trainer.evaluate()["eval_loss"]
    trainer.train()

    assert trainer.evaluate()["eval_loss"] < before


def pools_of(model: Model, batch: Batch) -> Pools:
    """As they are, before they are standardised."""
    packed = model.ctal.pack_inputs(**batch)
    return model._pools(*packed, model._functionals(*packed, None))


def beyond_the_paper(model: Model) -> tuple[PoolStandardisation, WeightedLayerSum, WeightedLayerSum]:
    """What the head of such a model has beside the paper's."""
    head = model.head
    assert head.standardisation
    assert head.text_layers
    assert head.audio_layers
    return head.standardisation, head.text_layers, head.audio_layers


@pytest.mark.parametrize("fusion", FUSIONS)
def test_with_all_layers_and_standardised_pools_the_batch_changes_nothing(fusion: str) -> None:
    model = task_model(fusion=fusion, **BEYOND_THE_PAPER)
    model.measure_pools([batch_of([0, 1]), batch_of([2, 3])])
    together = model(**batch_of([0, 1, 2, 3], padding=5))

    for number in range(4):
        alone = model(**batch_of([number]))
        torch.testing.assert_close(alone.embeddings[0], together.embeddings[number], atol=1e-4, rtol=0)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("stack", [1, 4])
def test_with_prosody_neither_padding_nor_the_batch_changes_anything(fusion: str, stack: int) -> None:
    model = task_model(fusion=fusion, frame_stack=stack, pitch=True, audio_pooling="prosody", standardise_pools=True)
    if model.head.prosody is not None:
        model.head.prosody.count_letters([token % 5 for token in range(model.config.text.vocab_size)], [True])
    model.measure_pools([batch_of([0, 1]), batch_of([2, 3])])
    together = model(**batch_of([0, 1, 2, 3], padding=5))

    for number in range(4):
        alone = model(**batch_of([number]))
        torch.testing.assert_close(alone.embeddings[0], together.embeddings[number], atol=1e-4, rtol=0)


def test_prosody_is_heard_where_it_stands_in_the_place_of_the_maximum() -> None:
    model = task_model(fusion="audio", pitch=True, audio_pooling="prosody")
    model.measure_pools([BATCH])
    higher = {**BATCH, "input_features": BATCH["input_features"].clone()}
    higher["input_features"][..., -3] += 1.0
    before, after = (pools_of(model, batch).audio_max for batch in (BATCH, higher))

    assert not torch.allclose(before, after)
    assert (before.abs() < 1).all()


def test_a_new_weighted_sum_is_the_mean_of_the_layers_and_with_all_weight_on_the_last_the_papers_head() -> None:
    plain, summed = task_model(), task_model(**{**BEYOND_THE_PAPER, "audio_pooling": "max"})
    summed.load_state_dict(plain.state_dict(), strict=False)
    _, *each = beyond_the_paper(summed)
    states = torch.randn(2, 5, 64)
    torch.testing.assert_close(each[0](states.unbind()), states.mean(0))

    assert not torch.allclose(summed(**BATCH).logits, plain(**BATCH).logits)
    for layers in each:
        layers.weight.data[-1] = 100.0
    torch.testing.assert_close(summed(**BATCH).logits, plain(**BATCH).logits)


def test_measured_pools_have_mean_0_and_variance_1_over_the_utterances_that_have_them() -> None:
    model = task_model(**BEYOND_THE_PAPER)
    text_alone = {name: batch_of([1])[name] for name in ("input_ids", "attention_mask")}
    model.measure_pools([batch_of([0]), batch_of([2, 3]), text_alone])

    constants, *_ = beyond_the_paper(model)
    with torch.no_grad():
        text, audio = pools_of(model, BATCH)[:2], pools_of(model, batch_of([0, 2, 3]))[2:4]
    for place, pool in enumerate((*text, *audio)):
        scaled = (pool - constants.mean_4D[place]) / constants.deviation_4D[place]
        torch.testing.assert_close(scaled.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
        torch.testing.assert_close(scaled.var(0), torch.ones(64), atol=1e-3, rtol=0)


def test_standardised_pools_of_a_missing_recording_are_0_and_what_does_not_vary_keeps_its_scale() -> None:
    model = task_model(**BEYOND_THE_PAPER)
    text = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    model.measure_pools([{name: values[:1].expand(3, -1) for name, values in text.items()}])

    standardisation, *_ = beyond_the_paper(model)
    torch.testing.assert_close(standardisation.deviation_4D.data, torch.ones(4, 64))
    torch.testing.assert_close(standardisation.mean_4D.data[2:], torch.zeros(2, 64))
    pools = standardisation(pools_of(model, text))
    assert not pools.audio_attended.any()
    assert not pools.audio_max.any()


def test_constants_of_pools_are_saved_and_not_trained(tmp_path: Path) -> None:
    model = task_model(**BEYOND_THE_PAPER)
    model.measure_pools([BATCH])
    model.save_pretrained(tmp_path)
    again = CtalForSequenceClassification.from_pretrained(tmp_path).eval()

    torch.testing.assert_close(again(**BATCH).logits, model(**BATCH).logits)
    again.train()(**BATCH, labels=LABELS).loss.backward()
    torch.optim.AdamW(again.parameters(), lr=1.0, weight_decay=0.1).step()
    (before, *_), (after, *layers) = beyond_the_paper(model), beyond_the_paper(again)
    assert torch.equal(after.mean_4D, before.mean_4D)
    assert torch.equal(after.deviation_4D, before.deviation_4D)
    assert all(each.weight.grad is not None for each in layers)
