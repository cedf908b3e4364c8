"""Which recordings a model has heard, so that it is not judged by them unawares.

RUN/model/heard.safetensors   64 bits of the hash of each recording (`Corpus.recordings`): `recordings`, those whose
                              labels it was trained or chosen by; `sounds`, those that pre-training has heard
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ctal.errors import InputError

_FILE = "heard.safetensors"


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Heard:
    """(n,) int64 each, sorted."""

    recordings: np.ndarray = field(default_factory=_none)
    """Whose labels were learned, or chose the model."""
    sounds: np.ndarray = field(default_factory=_none)
    """That pre-training was trained on, without labels."""

    @classmethod
    def of(cls, folder: Path) -> Heard:
        """By the model in `folder`; nothing is known of one from elsewhere. Raises `InputError` for a damaged file."""
        path = folder / _FILE
        if not path.is_file():
            return cls()
        try:
            found = load_file(path)
            return cls(found["recordings"], found["sounds"])
        except (SafetensorError, KeyError):
            raise InputError(f"{path}: is damaged; copy the model again from where it was trained") from None

    def and_recordings(self, more: np.ndarray) -> Heard:
        return Heard(np.union1d(self.recordings, more), self.sounds)

    def and_sounds(self, more: np.ndarray) -> Heard:
        return Heard(self.recordings, np.union1d(self.sounds, more))

    def save(self, folder: Path) -> None:
        save_file({"recordings": self.recordings, "sounds": self.sounds}, folder / _FILE)
