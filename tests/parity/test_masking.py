"""The masks of frames have the statistics of the authors' masks."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import pytest
import torch

from conftest import REFERENCE, needs_reference
from ctal.masking import mask_frames

pytestmark = needs_reference

UTTERANCES = 400
"""As many as were recorded for each length."""

STANDARD_ERRORS = 4


def statistics(frames: int, short_masking: Literal["fit", "reference"]) -> dict[str, Any]:
    """Fractions as recorded: of frames masked, of utterances without a mask, and what became of masked frames."""
    generator = torch.Generator().manual_seed(frames)
    # Frames are told apart by their value, none is zero.
    features = torch.arange(1.0, frames + 1)[:, None]
    fractions, fates = [], torch.zeros(3)
    for _ in range(UTTERANCES):
        masked, is_masked = mask_frames(
            features, ratio=0.15, min_span=20, max_span=50, generator=generator, short_masking=short_masking
        )
        zeroed = is_masked & (masked == 0).all(1)
        kept = is_masked & (masked == features).all(1)
        fractions.append(is_masked.float().mean())
        fates += torch.stack([zeroed.sum(), (is_masked & ~zeroed & ~kept).sum(), kept.sum()])
    fraction = torch.stack(fractions)
    names = ("zeroed", "replaced", "kept")
    return {
        "masked_fraction_mean": fraction.mean().item(),
        "masked_fraction_std": fraction.std().item(),
        "no_mask_rate": (fraction == 0).float().mean().item(),
        "masked_frames": fates.sum().item(),
        **dict(zip(names, (fates / fates.sum()).tolist(), strict=True)),
    }


def recorded(frames: int) -> dict[str, Any]:
    rows = json.loads((REFERENCE / "masking_statistics.json").read_text())
    return next(row for row in rows if row["frames"] == frames)


@pytest.mark.parametrize(
    ("frames", "short_masking"),
    [(frames, "fit") for frames in (500, 1000, 2000, 3000)]
    + [(frames, "reference") for frames in (60, 100, 200, 500, 1000, 2000, 3000)],
)
def test_masks_are_those_of_the_authors_within_sampling_error(
    frames: int, short_masking: Literal["fit", "reference"]
) -> None:
    theirs, ours = recorded(frames), statistics(frames, short_masking)

    # Both are samples of UTTERANCES utterances, so the difference has twice the variance of one mean.
    spread = math.hypot(theirs["masked_fraction_std"], ours["masked_fraction_std"])
    error = abs(ours["masked_fraction_mean"] - theirs["masked_fraction_mean"])
    assert error <= STANDARD_ERRORS * spread / math.sqrt(UTTERANCES)
    rate = theirs["no_mask_rate"]
    error = abs(ours["no_mask_rate"] - rate)
    assert error <= STANDARD_ERRORS * math.sqrt(2 * rate * (1 - rate) / UTTERANCES)
    for fate in ("zeroed", "replaced", "kept"):
        share = theirs[fate]
        if share is not None:
            # Dice are thrown for frames, independently.
            sampling = math.sqrt(2 * share * (1 - share) / ours["masked_frames"])
            assert abs(ours[fate] - share) <= STANDARD_ERRORS * sampling, fate


@pytest.mark.parametrize("frames", [60, 100])
def test_fit_masks_the_utterances_that_the_authors_leave_unmasked(frames: int) -> None:
    assert recorded(frames)["no_mask_rate"] > 0.5
    assert statistics(frames, "fit")["no_mask_rate"] == 0
