"""The imported checkpoint of the authors gives what their code gave for the same batch."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import REFERENCE, needs_reference
from ctal import CtalForPreTraining
from ctal.convert_original import convert_checkpoint

pytestmark = needs_reference


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CtalForPreTraining:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_checkpoint(REFERENCE / "states-4.ckpt", folder, REFERENCE / "tokenizer")
    return CtalForPreTraining.from_pretrained(folder)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(REFERENCE / "pretraining.safetensors")


@pytest.fixture(scope="module")
def batch(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "input_ids": "input_ids",
        "attention_mask": "text_attention_mask",
        "input_features": "audio_inputs",
        "feature_attention_mask": "audio_attention_mask",
        "labels": "text_labels",
        "feature_labels": "audio_targets",
        "mask_time_indices": "audio_mask",
    }
    return {ours: recorded[theirs] for ours, theirs in names.items()}


@pytest.mark.parametrize("output_hidden_states", [False, True], ids=["losses only", "all outputs"])
@torch.no_grad()
def test_losses_are_the_recorded_ones(
    model: CtalForPreTraining, batch: dict[str, Tensor], recorded: dict[str, Tensor], output_hidden_states: bool
) -> None:
    outputs = model(**batch, output_hidden_states=output_hidden_states)

    torch.testing.assert_close(outputs.text_loss, recorded["text_loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.audio_loss, recorded["audio_loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("with_labels", [False, True], ids=["without labels", "with labels"])
@torch.no_grad()
def test_outputs_at_valid_positions_are_the_recorded_ones(
    model: CtalForPreTraining, batch: dict[str, Tensor], recorded: dict[str, Tensor], with_labels: bool
) -> None:
    inputs = batch if with_labels else dict(list(batch.items())[:4])

    outputs = model(**inputs, output_hidden_states=True)

    is_token, is_frame = batch["attention_mask"].bool(), batch["feature_attention_mask"].bool()
    for ours, theirs, is_valid in (
        (outputs.text_hidden_state, "text_hidden", is_token),
        (outputs.audio_hidden_state, "audio_hidden", is_frame),
        (outputs.logits[..., :64], "text_logits_first", is_token),
        (outputs.reconstruction, "audio_reconstruction", is_frame),
    ):
        torch.testing.assert_close(ours[is_valid], recorded[theirs][is_valid], atol=1e-4, rtol=0, msg=theirs)


@torch.no_grad()
def test_the_imported_audio_encoder_sees_no_later_frame_as_it_was_trained(
    model: CtalForPreTraining, batch: dict[str, Tensor]
) -> None:
    inputs = dict(list(batch.items())[:4])
    changed = inputs | {"input_features": inputs["input_features"].clone()}
    changed["input_features"][:, 50:] += 1

    before, after = (model(**each).audio_hidden_state for each in (inputs, changed))

    torch.testing.assert_close(before[:, :50], after[:, :50])
    assert not torch.allclose(before[:, 50:], after[:, 50:])
