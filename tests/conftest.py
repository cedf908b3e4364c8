"""Shared facts of the tests: where the optional recordings lie, one thread a worker, no network."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCE = REPOSITORY.parent / "shared" / "reference"
REAL = REPOSITORY.parent / "shared" / "real"

needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="recorded outputs of the authors' code (../shared/reference) are absent"
)
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="real recordings (../shared/real) are absent")


@pytest.fixture(autouse=True, scope="session")
def _one_thread_a_worker():
    """pytest-xdist runs one worker a core; more threads would only fight, and would make timings jump."""
    import torch

    torch.set_num_threads(1)
