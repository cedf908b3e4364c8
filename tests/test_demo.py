"""The demo keeps what is done, but nothing that was made of other data or fine-tuned from another pre-training."""

from __future__ import annotations

import hashlib
from pathlib import Path

from conftest import Labelled
from ctal.batching import Corpus
from ctal.demo import _discard_if, _Job
from ctal.finetune import finetune
from ctal.recipes import FinetuneConfig, make_config
from ctal.store import Store


def test_a_run_is_kept_for_its_own_data_and_pre_training_and_made_anew_for_others(
    labelled: Labelled, tmp_path: Path
) -> None:
    job = _Job("sentiment", tmp_path / "sentiment")
    config = make_config(FinetuneConfig, {"workers": 0})
    finetune(job.task, [labelled.split], job.folder, config, start_from=labelled.pretrained, head={}, steps=1)
    weights = hashlib.sha256((labelled.pretrained / "model.safetensors").read_bytes()).hexdigest()
    data = Corpus([Store(labelled.split)]).content_hash
    for name, value in {"start_from": weights, "data_hash": data, "steps": 1}.items():
        assert not _discard_if(job.folder, lambda run, name=name, value=value: run[name] != value)
        assert job.is_done
    assert _discard_if(job.folder, lambda run: run["steps"] < 2)
    assert not job.folder.exists()
    assert not _discard_if(job.folder, lambda run: True)
