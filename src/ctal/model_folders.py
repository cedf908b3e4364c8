"""Folders that `from_pretrained` reads: a model with its processor, checked before they are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from ctal.errors import InputError
from ctal.processing_ctal import CtalProcessor

WEIGHTS = "model.safetensors"
_FILES = ("config.json", WEIGHTS, "processor_config.json", "tokenizer.json")


def architecture_of(folder: Path, mend: str = "give RUN/model") -> str | None:
    """The class that the model in `folder` is of; raises `InputError` where there is no model of ours."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {mend}")
    for name in _FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder}: not a model folder with its processor ({name} is missing); give RUN/model")
    config = read_object(folder / "config.json")
    if config.get("model_type") != "ctal":
        raise InputError(f"{folder}: a model of type '{config.get('model_type')}', not of ctal; give RUN/model")
    return (config.get("architectures") or [None])[0]


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Raises `InputError` where what `from_pretrained` reads of `folder` in the block is damaged."""
    disable_progress_bar()
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what a damaged file leads to is of any kind
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder}: cannot be loaded ({reason}); copy it again from where it was trained") from None


def load_processor(folder: Path) -> CtalProcessor:
    """The processor in a model folder; raises `InputError` where `folder` does not hold it and a model."""
    architecture_of(folder)
    with loading(folder):
        return CtalProcessor.from_pretrained(folder)


def load_whole(folder: Path, kind: type[Any]) -> tuple[Any, CtalProcessor, dict[str, Any]]:
    """A model of class `kind` in evaluation mode, its processor and its `run.json`, empty where there is none.

    Raises `InputError` where anything of it is damaged or missing.
    """
    with loading(folder):
        processor = CtalProcessor.from_pretrained(folder)
        # Typed as if it gave the model alone.
        model, info = kind.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        # transformers would go on with random numbers in their place.
        raise InputError(f"{folder}: {WEIGHTS} lacks {min(info['missing_keys'])}; copy it again")
    return model.eval(), processor, run_of(folder)


def run_of(folder: Path) -> dict[str, Any]:
    """The `run.json` of a model folder, empty where there is none; raises `InputError` where it is damaged."""
    path = folder / "run.json"
    return read_object(path) if path.is_file() else {}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; raises `InputError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not JSON ({error}); copy the model folder again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; copy the model folder again")
    return value
