"""The heads of the tasks give what the authors' heads gave for the same weights and inputs: 12 recorded cases."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import REFERENCE, needs_reference
from ctal import CtalForSequenceClassification, CtalForXVector
from ctal.convert_original import load_original_head, model_from_original, read_original_checkpoint

pytestmark = needs_reference

CASES = [
    f"{kind}-{outputs}"
    for kind in ("both-orthogonal", "both-plain", "acoustic-plain", "semantic-plain")
    for outputs in (1, 4, 10)
]
FUSION = {"both-orthogonal": "orthogonal", "both-plain": "concat", "acoustic-plain": "audio", "semantic-plain": "text"}


def head_of(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head's weights by their own names."""
    return {name.removeprefix("head."): value for name, value in recorded.items() if name.startswith("head.")}


def recorded_and_ours(case: str) -> tuple[dict[str, Tensor], CtalForSequenceClassification | CtalForXVector]:
    kind, _, outputs = case.rpartition("-")
    recorded = load_file(REFERENCE / f"downstream-{case}.safetensors")
    pretrained = model_from_original(read_original_checkpoint(REFERENCE / "states-4.ckpt"))
    config = pretrained.config
    config.fusion, config.orthogonal_norm, config.num_labels = FUSION[kind], "reference", int(outputs)
    config.problem_type = "regression" if outputs == "1" else None
    # 10 outputs stand for the training speakers of verification.
    model = (CtalForXVector if outputs == "10" else CtalForSequenceClassification)(config)
    model.ctal.load_state_dict(pretrained.ctal.state_dict())
    load_original_head(model, head_of(recorded))
    return recorded, model.eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_embeddings_and_losses_are_the_recorded_ones(case: str) -> None:
    recorded, model = recorded_and_ours(case)
    recorded_losses = {each["name"]: each for each in json.loads((REFERENCE / "downstream.json").read_text())}
    losses = recorded_losses[f"downstream-{case}"]

    output = model(
        recorded["input_ids"],
        recorded["text_attention_mask"],
        recorded["audio_inputs"],
        recorded["audio_attention_mask"],
        labels=recorded["labels"],
    )

    assert output.loss is not None
    torch.testing.assert_close(output.embeddings, recorded["fused"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.logits, recorded["logits"].reshape(output.logits.shape), atol=1e-4, rtol=0)
    assert output.task_loss.item() == pytest.approx(losses["task_loss"], abs=1e-4)
    assert output.loss.item() == pytest.approx(losses["total_loss"], abs=1e-4)


def test_a_head_with_a_missing_a_left_over_or_a_misshapen_weight_is_refused() -> None:
    recorded, model = recorded_and_ours("both-plain-4")
    head = head_of(recorded)

    for change, message in (
        ({"classifier.weight": None}, "lacks 'classifier.weight'"),
        ({"more.weight": torch.zeros(1)}, "'more.weight' has no place"),
        ({"classifier.weight": torch.zeros(4, 95)}, r"'classifier.weight' has shape \(4, 95\)"),
    ):
        wrong = {name: value for name, value in {**head, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            load_original_head(model, wrong)
