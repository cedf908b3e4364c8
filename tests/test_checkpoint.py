"""Checkpoints are whole, or they are not there."""

from __future__ import annotations

import os
import resource
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctal.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, save_checkpoint
from ctal.errors import InputError
from ctal.files import folder_aside

STATE = {"step": 3, "best_metric": 0.1 + 0.2, "position": {"epoch": 1, "step": 2}}


def some_tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    moments = {"a.weight/exp_avg": torch.randn(3, 4, generator=generator), "a.weight/step": torch.tensor(3.0)}
    return {"model": {"a.weight": torch.randn(4, 3, generator=generator).T}, "optimizer": moments}


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step-1", some_tensors(), STATE)
    loaded = load_checkpoint(tmp_path / "step-1")
    assert loaded.state == STATE
    assert loaded.tensors.keys() == some_tensors().keys()
    for group, named in some_tensors().items():
        assert loaded.tensors[group].keys() == named.keys()
        assert all(torch.equal(loaded.tensors[group][name], tensor) for name, tensor in named.items())


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step-1", some_tensors(), STATE)
    assert {file.suffix for file in (tmp_path / "step-1").iterdir()} == {".safetensors", ".json"}


def test_a_new_checkpoint_replaces_an_old_one_of_the_same_step(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step-1", some_tensors(0), STATE)
    save_checkpoint(tmp_path / "step-1", some_tensors(1), {**STATE, "step": 4})
    loaded = load_checkpoint(tmp_path / "step-1")
    assert loaded.state["step"] == 4
    assert torch.equal(loaded.tensors["model"]["a.weight"], some_tensors(1)["model"]["a.weight"])


class Killed(BaseException):
    """Stands in for the end of the process."""


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("operation", range(1, 11))
def test_a_checkpoint_whose_writing_ends_anywhere_is_whole_or_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: int, replaces: bool
) -> None:
    save_checkpoint(checkpoint_path(tmp_path, 2), some_tensors(), STATE)
    if replaces:
        save_checkpoint(checkpoint_path(tmp_path, 4), some_tensors(), STATE)
    done = 0

    def dies(name: str) -> None:
        module, function = {"fsync": (os, "fsync"), "rename": (Path, "rename"), "write": (Path, "write_text")}[name]
        original = getattr(module, function)

        def counted(*arguments: object) -> object:
            nonlocal done
            done += 1
            if done == operation:
                raise Killed
            return original(*arguments)

        monkeypatch.setattr(module, function, counted)

    for name in ("fsync", "rename", "write"):
        dies(name)
    try:
        save_checkpoint(checkpoint_path(tmp_path, 4), some_tensors(1), STATE)
        assert operation > done, "this one was not interrupted"
    except Killed:
        pass
    monkeypatch.undo()

    listed = list_checkpoints(tmp_path)
    assert listed[0] == checkpoint_path(tmp_path, 2)
    for path in listed:
        load_checkpoint(path)
    if replaces:
        with suppress(Killed), folder_aside(checkpoint_path(tmp_path, 4)):
            raise Killed
        load_checkpoint(checkpoint_path(tmp_path, 4))
    save_checkpoint(checkpoint_path(tmp_path, 4), some_tensors(1), STATE)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 2), checkpoint_path(tmp_path, 4)]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in list_checkpoints(tmp_path)}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_file_that_differs_or_is_missing_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "step-1"
    save_checkpoint(path, some_tensors(), STATE)
    content = bytearray((path / name).read_bytes())
    content[-2] ^= 1
    (path / name).write_bytes(content)
    assert refusal(path) == (
        f"{path / name}: does not match manifest.json; remove {path} to go on from the checkpoint before it"
    )
    (path / name).unlink()
    assert refusal(path).startswith(f"{path / name}: ")


@pytest.mark.parametrize("damage", ["missing", "cut short", "not an object"])
def test_a_checkpoint_without_a_sound_manifest_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "step-1"
    save_checkpoint(path, some_tensors(), STATE)
    manifest = path / "manifest.json"
    if damage == "missing":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:-5] if damage == "cut short" else "[]")
    assert refusal(path).startswith(f"{path}: not a checkpoint")


def test_checkpoints_are_listed_oldest_first_without_unfinished_ones(tmp_path: Path) -> None:
    for step in (1000, 2, 30):
        save_checkpoint(checkpoint_path(tmp_path, step), some_tensors(), STATE)
    shutil.copytree(checkpoint_path(tmp_path, 30), tmp_path / "step-00002000.part")
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, step) for step in (2, 30, 1000)]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 2)
    save_checkpoint(path, some_tensors(), STATE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(InputError, match="cannot be written") as caught:
            save_checkpoint(path, {"model": {"a": torch.zeros(10_000)}}, STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert load_checkpoint(path).state == STATE
