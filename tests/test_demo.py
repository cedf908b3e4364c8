"""The demo keeps what is done, but nothing that was fine-tuned from another pre-training."""

from __future__ import annotations

import hashlib
from pathlib import Path

from conftest import Labelled
from ctal.demo import _Job
from ctal.finetune import finetune
from ctal.recipes import FinetuneConfig, make_config


def test_a_fine_tuning_is_kept_for_its_own_pre_training_and_done_anew_for_another(
    labelled: Labelled, tmp_path: Path
) -> None:
    job = _Job("sentiment", tmp_path / "sentiment")
    config = make_config(FinetuneConfig, {"workers": 0})
    finetune(job.task, [labelled.split], job.folder, config, start_from=labelled.pretrained, head={}, steps=1)
    job.discard_unless_from(hashlib.sha256((labelled.pretrained / "model.safetensors").read_bytes()).hexdigest())
    assert job.is_done
    job.discard_unless_from("another")
    assert not job.folder.exists()
