"""Checkpoints: directories that are either whole or not there.

A checkpoint is written aside, synced and renamed into place; its manifest has the SHA-256 of every file and is checked
before anything is loaded. Tensors are safetensors, the rest JSON: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ctal.errors import InputError
from ctal.files import ASIDE, folder_aside, sha256_of

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory holds."""

    tensors: Mapping[str, dict[str, Tensor]]
    """Group (for example `model`, `optimizer`) → name → tensor."""
    state: dict[str, Any]


def save_checkpoint(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint to `path`, replacing one that is there; raises `InputError` when the disk refuses."""
    with folder_aside(path) as aside:
        for group, named in tensors.items():
            contiguous = {name: tensor.detach().contiguous() for name, tensor in named.items()}
            save_file(contiguous, aside / f"{group}.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=1))
        manifest = {file.name: sha256_of(file) for file in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint after checking its manifest; raises `InputError` where a file is missing or differs."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not isinstance(manifest, dict) or "state.json" not in manifest:
            raise ValueError("not the manifest of a checkpoint")
    except (OSError, ValueError):
        raise InputError(f"{path}: not a checkpoint ({MANIFEST} is missing or damaged); remove this folder") from None
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file() or sha256_of(file) != expected:
            raise InputError(f"{file}: does not match {MANIFEST}; remove {path} to go on from the checkpoint before it")
    tensors = {Path(name).stem: load_file(path / name) for name in manifest if name.endswith(".safetensors")}
    return Checkpoint(tensors, json.loads((path / "state.json").read_text()))


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.name.endswith(ASIDE))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step-{step:08d}"
