"""Recorded passes of pre-training equal those that are issued; what fills a batch up counts nowhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import TinyCorpus, losses
from ctal import CtalConfig, CtalForPreTraining, modeling_ctal
from ctal.errors import InputError
from ctal.packing import PretrainingBatch
from ctal.precision import autocast
from ctal.pretrain import pretrain
from ctal.recipes import PretrainConfig, make_config
from ctal.recording import RecordedPasses

VOCAB, FEATURES, IGNORED = 40, 12, -100
Batch = dict[str, Tensor]


def model_of(device: str = "cpu", **fields: Any) -> CtalForPreTraining:
    """A nano model in training, without dropout unless asked for, whose outputs depend on all that they may."""
    torch.manual_seed(0)
    none = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    sizes = {"vocab_size": VOCAB, "feature_size": FEATURES, "initializer_range": 0.2}
    with torch.device(device):
        return CtalForPreTraining(CtalConfig.of_size("nano", **{**none, **sizes, **fields})).train()


def batch_of(*lengths: tuple[int, int], seed: int = 0, device: str = "cpu") -> Batch:
    """Utterances of so many tokens and frames, as the loader gives them: frames one behind the other."""
    generator = torch.Generator().manual_seed(seed)
    tokens, frames = (torch.tensor(each) for each in zip(*lengths, strict=True))
    is_token, is_frame = (torch.arange(int(each.max())) < each[:, None] for each in (tokens, frames))
    ids = torch.randint(5, VOCAB, is_token.shape, generator=generator)
    is_masked_token = is_token & (torch.rand(is_token.shape, generator=generator) < 0.3)
    is_masked = is_frame & (torch.rand(is_frame.shape, generator=generator) < 0.2)
    features = torch.randn(*is_frame.shape, FEATURES, generator=generator)
    batch = {
        "input_ids": ids.masked_fill(~is_token, 1),
        "attention_mask": is_token.long(),
        "input_features": features[is_frame],
        "feature_attention_mask": is_frame.long(),
        "labels": ids.masked_fill(~is_masked_token, IGNORED),
        "feature_labels": features[is_masked],
        "mask_time_indices": is_masked,
    }
    return {name: values.to(device) for name, values in batch.items()}


SMALL, OTHER, LONG = (
    batch_of((7, 50), (12, 90), (4, 40)),
    batch_of((9, 70), (10, 60), (3, 45), seed=1),
    batch_of((20, 200), (5, 60), (9, 80), seed=2),
)


def outcome(model: CtalForPreTraining, *batches: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Losses of the batches one after the other, and the sum of their gradients."""
    model.zero_grad()
    found = []
    for batch in batches:
        output = model(**batch, token_count=9, frame_count=torch.tensor(40, device=batch["input_ids"].device))
        output.loss.backward()
        found += [output.loss.detach(), output.text_loss.detach(), output.audio_loss.detach()]
    return found, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


# What fills -------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[PretrainingBatch]:
    """Models that record compute what they would record, here; the batches that they get."""
    batches: list[PretrainingBatch] = []

    def call(passes: RecordedPasses, batch: PretrainingBatch, counts_2: Tensor) -> Tensor:
        batches.append(batch)
        return passes._losses(batch, counts_2)

    monkeypatch.setattr(RecordedPasses, "__call__", call)
    monkeypatch.setattr(modeling_ctal, "can_record", lambda device: True)
    return batches


@pytest.mark.parametrize(
    "fields", [{}, {"frame_stack": 4}, {"audio_is_causal": True}, {"audio_sees_text": False}], ids=str
)
def test_what_fills_a_batch_up_changes_no_loss_and_no_gradient(
    fields: dict[str, Any], filled: list[PretrainingBatch]
) -> None:
    plain, recorded = model_of(**fields), model_of(**fields)
    recorded.record_passes()
    for expected, mine in zip(outcome(plain, SMALL, LONG), outcome(recorded, SMALL, LONG), strict=True):
        for each, other in zip(expected, mine, strict=True):
            torch.testing.assert_close(other, each, atol=1e-5, rtol=1e-4)
    assert len(filled) == 2
    assert len(filled[0].text.index) > int(SMALL["attention_mask"].sum())


def test_batches_of_about_the_same_length_have_the_same_sizes(filled: list[PretrainingBatch]) -> None:
    model = model_of()
    model.record_passes()
    for batch in (SMALL, OTHER, LONG):
        model(**batch)
    first, second, third = (
        (
            *(each.text.values.shape, each.text.lengths.offsets.shape, each.text.lengths.longest, each.text.shape),
            *(each.frames.values.shape, each.frames.lengths.longest, each.tokens.ids.shape),
            *(each.to_predict.positions.index.shape, each.to_predict.targets.shape),
        )
        for each in filled
    )
    assert first == second
    assert first != third


def test_a_large_batch_is_filled_by_few_per_cent(filled: list[PretrainingBatch]) -> None:
    model = model_of()
    model.record_passes()
    model(**batch_of(*[(40, 1_000)] * 9))
    assert 9_000 < len(filled[0].frames.index) < 1.065 * 9_000


def test_evaluation_does_not_record(filled: list[PretrainingBatch]) -> None:
    model = model_of()
    model.record_passes()
    with torch.no_grad():
        model(**SMALL)
    model.eval()(**SMALL)
    model.train()(**SMALL, output_hidden_states=True)
    assert not filled


def test_a_run_that_cannot_be_recorded_says_why(tiny: TinyCorpus, tmp_path: Path) -> None:
    reasons: dict[str, dict[str, Any]] = {
        "cuda_graphs=true and gradient_checkpointing=true do not go together": {"gradient_checkpointing": True}
    }
    if not torch.cuda.is_available():
        reasons["cuda_graphs=true is for a GPU"] = {}
    for reason, fields in reasons.items():
        config = make_config(PretrainConfig, {"cuda_graphs": True, **fields})
        with pytest.raises(InputError, match=reason):
            pretrain([tiny.store], tmp_path / "run", config, size="nano", tokenizer=tiny.tokenizer)
        assert not (tmp_path / "run").exists()


# On a GPU ---------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can be recorded")


def on_gpu(batch: Batch) -> Batch:
    return {name: values.cuda() for name, values in batch.items()}


@needs_cuda
@pytest.mark.parametrize("fields", [{}, {"frame_stack": 4}, {"audio_is_causal": True}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_passes_give_the_losses_and_gradients_of_issued_ones(fields: dict[str, Any], precision: str) -> None:
    plain, recorded = (model_of("cuda", **fields) for _ in range(2))
    recorded.record_passes()
    batches = [on_gpu(each) for each in (SMALL, LONG, OTHER, SMALL)]  # recorded twice, and run again twice
    limit = 1e-4 if precision == "fp32" else 5e-2
    with autocast(torch.device("cuda"), precision):
        expected, mine = outcome(plain, *batches), outcome(recorded, *batches)
        # Gradients of before are not added to, whether they were removed or overwritten.
        again = outcome(recorded, *batches)
    for each, other, third in zip(expected[0], mine[0], again[0], strict=True):
        torch.testing.assert_close(other, each, atol=0, rtol=limit)
        torch.testing.assert_close(third, each, atol=0, rtol=limit)
    for each, other, third in zip(expected[1], mine[1], again[1], strict=True):
        assert (other - each).norm() < limit * each.norm() + 1e-5
        assert (third - other).norm() < 1e-4 * each.norm() + 1e-5


@needs_cuda
@pytest.mark.parametrize("attention_dropout", [0.0, 0.2])
def test_draws_follow_from_the_seed_whether_something_is_recorded_or_run_again(attention_dropout: float) -> None:
    model = model_of("cuda", hidden_dropout_prob=0.3, attention_probs_dropout_prob=attention_dropout)
    model.record_passes()
    batch, found = on_gpu(SMALL), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(outcome(model, batch, batch)[0])
    first, again, other = found
    assert all(torch.equal(*each) for each in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[3]), "the second call of a step draws anew"


@needs_cuda
def test_a_weight_that_changes_is_read_anew() -> None:
    model = model_of("cuda")
    model.record_passes()
    batch = on_gpu(SMALL)
    with autocast(torch.device("cuda"), "bf16"):
        before = outcome(model, batch)[0][0]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        after = outcome(model, batch)[0][0]
    assert abs(after - before) > 1e-2


@needs_cuda
def test_a_call_whose_activations_are_gone_has_no_backward_pass() -> None:
    model, batch = model_of("cuda"), on_gpu(SMALL)
    model.record_passes()
    first, second = (model(**batch).loss for _ in range(2))
    with pytest.raises(RuntimeError, match="called again before the backward pass"):
        first.backward()
    second.backward()


@needs_cuda
def test_a_resumed_recorded_run_ends_as_an_uninterrupted_one(tiny: TinyCorpus, tmp_path: Path) -> None:
    fields = {
        "cuda_graphs": True,
        "steps": 12,
        "batch_frames": 600,
        "checkpoint_every": 4,
        "log_every": 1,
        "precision": "bf16",
    }

    def run(out: Path, **changed: Any) -> None:
        config = make_config(PretrainConfig, {**fields, **changed})
        pretrain([tiny.store], out, config, size="nano", tokenizer=tiny.tokenizer, resume=out.exists(), diagnosed=False)

    run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for later in ("step-00000008", "step-00000012"):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / later, ignore_errors=True)
    run(tmp_path / "resumed")
    whole, resumed = (losses(tmp_path / name) for name in ("whole", "resumed"))
    assert len(whole) == 12
    # Flash attention's sums over blocks have no fixed order; another draw of dropout would change per cents.
    assert resumed == {step: pytest.approx(each, rel=1e-4) for step, each in whole.items()}
