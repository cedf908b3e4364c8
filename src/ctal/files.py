"""Folders that are either whole or not there, and what is in a file."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ctal.errors import InputError

ASIDE = ".part"
"""Ending of a folder that is still being written."""


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` once the block has filled it; a failure leaves `path` as it was.

    Files are synced before the folder is renamed, and readable by everyone (safetensors makes them private). Raises
    `InputError` when the disk refuses.
    """
    aside = path.with_name(path.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir():
            file.chmod(0o644)
            _sync(file)
        _sync(aside)
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
        _sync(path.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path}: cannot be written ({reason}); free space or mend its rights") from None
        raise


def sha256_of(file: Path) -> str:
    """Of its content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
