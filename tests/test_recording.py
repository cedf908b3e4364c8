"""Recorded passes of pre-training equal those that are issued; what fills a batch up counts nowhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import TinyCorpus, losses
from ctal import CtalConfig, CtalForPreTraining, modeling_ctal, recording
from ctal.attention import Lengths
from ctal.checkpoint import list_checkpoints
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


def test_a_model_with_attention_dropout_cannot_be_recorded() -> None:
    with pytest.raises(InputError, match=r"attention_probs_dropout_prob=0.1 of the text encoder cannot be recorded"):
        model_of(attention_probs_dropout_prob=0.1).record_passes()


# What is kept of a recording, with a stub in the place of CUDA graphs ---------------------------------------------


class LiveLengths(Lengths):
    """Whose sizes are read from the offsets whenever they are used, as kernels do."""

    @property
    def sizes(self) -> list[int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.offsets.diff().tolist()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Passes are computed anew when a recording runs; one entry for each that was made."""
    made: list[None] = []

    class Stub:
        def __init__(self, replay: Callable[[], None]) -> None:
            self.replay = replay

    def capture(passes: RecordedPasses, losses: Callable[[], Tensor]) -> tuple[Stub, Stub, Tensor, Tensor]:
        made.append(None)
        held, gradient, computed = torch.zeros(2), torch.ones(2), []

        def forward() -> None:
            with torch.enable_grad():
                computed[:] = [losses()]
            held.copy_(computed[0].detach())

        return Stub(forward), Stub(lambda: torch.autograd.backward(computed[0], gradient)), held, gradient

    def at(lengths: Lengths, offsets: Tensor) -> Lengths:
        live = object.__new__(LiveLengths)
        for name, value in {"device": lengths.device, "longest": lengths.longest, "offsets": offsets}.items():
            object.__setattr__(live, name, value)
        return live

    monkeypatch.setattr(RecordedPasses, "_capture", capture)
    monkeypatch.setattr(Lengths, "at", at)
    monkeypatch.setattr(modeling_ctal, "can_record", lambda device: True)
    return made


def test_recordings_are_made_once_for_a_set_of_sizes_and_add_gradients_where_they_belong(captures: list[None]) -> None:
    plain, recorded = model_of(), model_of()
    recorded.record_passes()
    for batches in ((SMALL,), (OTHER, LONG, SMALL), (LONG, LONG)):
        for expected, mine in zip(outcome(plain, *batches), outcome(recorded, *batches), strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)
    assert len(captures) == 2


def test_gradients_are_added_to_those_that_a_caller_has_set(captures: list[None]) -> None:
    model = model_of()
    model.record_passes()
    _, once = outcome(model, SMALL)
    model.zero_grad(set_to_none=False)
    model(**SMALL, token_count=9, frame_count=40).loss.backward()
    for parameter, expected in zip(model.parameters(), once, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-5)
        parameter.grad = torch.ones_like(parameter)
    model(**SMALL, token_count=9, frame_count=40).loss.backward()
    for parameter, expected in zip(model.parameters(), once, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected + 1, atol=1e-6, rtol=1e-5)


def test_the_recording_that_was_used_longest_ago_is_let_go(
    captures: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "KEPT", 2)
    model = model_of()
    model.record_passes()
    longest = batch_of((20, 600))
    for batch, made in ((SMALL, 1), (LONG, 2), (SMALL, 2), (longest, 3), (SMALL, 3), (LONG, 4)):
        outcome(model, batch)
        assert len(captures) == made


def test_counts_of_another_type_are_not_rounded(captures: list[None]) -> None:
    model = model_of()
    model.record_passes()
    whole, half = (
        model(**SMALL, token_count=torch.tensor(count), frame_count=torch.tensor(count)).loss for count in (1, 1.5)
    )
    torch.testing.assert_close(half, whole / 1.5)


def test_a_call_has_one_backward_pass_before_the_next_call(captures: list[None]) -> None:
    model = model_of()
    model.record_passes()
    first, second = (model(**SMALL).loss for _ in range(2))
    with pytest.raises(RuntimeError, match="no backward pass is left of this call"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no backward pass is left of this call"):
        second.backward()


EDGES = {
    "no masked token": {"labels": torch.full_like(SMALL["labels"], IGNORED)},
    "no masked frame": {
        "mask_time_indices": torch.zeros_like(SMALL["mask_time_indices"]),
        "feature_labels": SMALL["feature_labels"][:0],
    },
}


@pytest.mark.parametrize("changed", EDGES.values(), ids=EDGES)
def test_a_batch_in_which_one_kind_is_not_masked_is_recorded_like_any(changed: Batch, captures: list[None]) -> None:
    plain, recorded = model_of(), model_of()
    recorded.record_passes()
    batch = {**SMALL, **changed}
    for expected, mine in zip(outcome(plain, batch), outcome(recorded, batch), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)
    assert len(captures) == 1


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
def test_draws_follow_from_the_seed_whether_something_is_recorded_or_run_again() -> None:
    model = model_of("cuda", hidden_dropout_prob=0.3)
    model.record_passes()
    batch, found = on_gpu(SMALL), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(outcome(model, batch, batch))
    (first, gradients), (again, other_gradients), (other, _) = found
    assert all(torch.equal(*each) for each in zip(first, again, strict=True))
    torch.testing.assert_close(other_gradients, gradients, atol=1e-5, rtol=1e-4)
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
    with pytest.raises(RuntimeError, match="no backward pass is left of this call"):
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
    first, *later = list_checkpoints(tmp_path / "resumed" / "checkpoints")
    assert first.name == "step-00000004"
    for each in later:
        shutil.rmtree(each)
    run(tmp_path / "resumed")
    whole, resumed = (losses(tmp_path / name) for name in ("whole", "resumed"))
    assert len(whole) == 12
    # Sums over blocks have no fixed order on a GPU; another draw of dropout would change per cents.
    assert resumed == {step: pytest.approx(each, rel=1e-4) for step, each in whole.items()}
