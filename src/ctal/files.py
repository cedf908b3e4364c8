"""Files and folders that are either whole or not there, and what is in a file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from ctal.errors import InputError

ASIDE = ".part"
"""Ending of what is still being written, or about to be removed."""
_REPLACED = f".old{ASIDE}"


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` once the block has filled it; a failure leaves `path` as it was.

    Files are synced before the folder is renamed, and readable by everyone (safetensors makes them private). Raises
    `InputError` when the disk refuses.
    """
    aside, replaced = path.with_name(path.name + ASIDE), path.with_name(path.name + _REPLACED)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        if replaced.exists() and not path.exists():  # killed between two renames
            replaced.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir():
            file.chmod(0o644)
            _sync(file)
        _sync(aside)
        # No folder can be renamed onto another; removing one takes longer than renaming it.
        if path.exists():
            path.rename(replaced)
        aside.rename(path)
        _sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise disk_refuses(path, error) from None
        raise


_MEND = "free space or mend its rights"


@contextmanager
def file_aside(path: Path, mend: str = _MEND) -> Iterator[BinaryIO]:
    """A file that appears at `path` once it is whole and on disk; a failure leaves `path` as it was.

    Raises `InputError` when the disk refuses, which ends with `mend`.
    """
    aside = path.with_name(path.name + ASIDE)
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_refuses(path, error, mend) from error
        raise


def write_json(path: Path, value: Mapping[str, object], mend: str = _MEND) -> None:
    """As `file_aside` does."""
    with file_aside(path, mend) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def disk_refuses(path: Path, error: Exception, mend: str = _MEND) -> InputError:
    """What to raise where the system does not let `path` be written."""
    return InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); {mend}")


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
