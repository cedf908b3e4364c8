"""Masks of tokens and of frames."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from ctal.masking import IGNORED, MIN_MASKABLE_FRAMES, MaskedFrames, MaskedTokens, mask_frames, mask_tokens

VOCAB, MASK_ID, SPECIAL_IDS = 50, 4, 5


def masked_tokens(ids: Tensor, seed: int = 0, ratio: float = 0.15) -> MaskedTokens:
    return mask_tokens(
        ids,
        vocab_size=VOCAB,
        mask_id=MASK_ID,
        special_ids=SPECIAL_IDS,
        ratio=ratio,
        generator=Generator().manual_seed(seed),
    )


def masked_frames(
    features: Tensor,
    seed: int = 0,
    short_masking: Literal["fit", "reference"] = "fit",
    spans: tuple[int, int] = (20, 50),
) -> MaskedFrames:
    return mask_frames(
        features,
        ratio=0.15,
        min_span=spans[0],
        max_span=spans[1],
        generator=Generator().manual_seed(seed),
        short_masking=short_masking,
    )


def numbered(frames: int) -> Tensor:
    """(T, 1) features that are told apart by their value; none is zero."""
    return torch.arange(1.0, frames + 1)[:, None]


def test_the_same_generator_gives_the_same_masks_and_another_seed_others() -> None:
    ids, features = torch.arange(40), numbered(300)
    assert torch.equal(masked_tokens(ids, 1).input_ids, masked_tokens(ids, 1).input_ids)
    assert torch.equal(masked_frames(features, 1).features, masked_frames(features, 1).features)
    assert not torch.equal(masked_tokens(ids, 1).labels, masked_tokens(ids, 2).labels)
    assert not torch.equal(masked_frames(features, 1).is_masked, masked_frames(features, 2).is_masked)


def test_inputs_are_left_as_they_are() -> None:
    ids, features = torch.arange(40), numbered(300)
    masked_tokens(ids)
    masked_frames(features)
    assert torch.equal(ids, torch.arange(40))
    assert torch.equal(features, numbered(300))


@given(ids=st.lists(st.integers(0, VOCAB - 1), max_size=30), ratio=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_only_words_are_chosen_and_labels_restore_the_text(ids: list[int], ratio: float, seed: int) -> None:
    original = torch.tensor(ids, dtype=torch.long)

    masked, labels = masked_tokens(original, seed, ratio)

    chosen = labels != IGNORED
    assert not chosen[original < SPECIAL_IDS].any()
    assert torch.equal(torch.where(chosen, labels, masked), original)
    changed = masked[masked != original]
    assert ((changed == MASK_ID) | (changed >= SPECIAL_IDS)).all()
    assert ((masked >= 0) & (masked < VOCAB)).all()


def test_of_the_words_15_percent_are_chosen_and_80_10_10_percent_masked_replaced_kept() -> None:
    ids = torch.full((200_000,), 7)

    masked, labels = masked_tokens(ids)

    chosen = labels != IGNORED
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.004)
    assert (masked[chosen] == MASK_ID).float().mean().item() == pytest.approx(0.8, abs=0.01)
    # One of the random words is the word itself.
    other = 1 - 1 / (VOCAB - SPECIAL_IDS)
    assert ((masked != MASK_ID) & (masked != 7))[chosen].float().mean().item() == pytest.approx(0.1 * other, abs=0.008)


@given(frames=st.integers(1, 400), seed=st.integers(0, 2**31), reference=st.booleans())
@settings(deadline=None)
def test_only_masked_frames_change_and_to_zero_or_to_a_frame_of_the_utterance(
    frames: int, seed: int, reference: bool
) -> None:
    features = numbered(frames)

    masked, is_masked = masked_frames(features, seed, "reference" if reference else "fit")

    assert masked.shape == features.shape
    assert torch.equal(masked[~is_masked], features[~is_masked])
    assert torch.isin(masked, torch.cat([torch.zeros(1), features.flatten()])).all()
    if reference:
        assert not is_masked[-1]


@given(frames=st.integers(MIN_MASKABLE_FRAMES, 400), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_no_utterance_of_10_frames_is_left_unmasked_nor_masked_whole(frames: int, seed: int) -> None:
    _, is_masked = masked_frames(numbered(frames), seed)
    assert is_masked.any()
    assert not is_masked.all()


@pytest.mark.parametrize("frames", range(1, MIN_MASKABLE_FRAMES))
def test_shorter_utterances_keep_all_frames(frames: int) -> None:
    masked, is_masked = masked_frames(numbered(frames))
    assert not is_masked.any()
    assert torch.equal(masked, numbered(frames))


def test_reference_never_masks_up_to_66_frames() -> None:
    for frames in (1, 20, 50, 66):
        for seed in range(50):
            assert not masked_frames(numbered(frames), seed, "reference").is_masked.any()


def test_fit_reaches_the_first_and_the_last_frame() -> None:
    masks = torch.stack([masked_frames(numbered(60), seed).is_masked for seed in range(300)])
    assert masks.any(0).all()


def test_a_span_has_the_length_that_was_asked_for() -> None:
    for seed in range(20):
        is_masked = masked_frames(numbered(100), seed, spans=(25, 25)).is_masked
        assert int(is_masked.sum()) == 25
        assert int((is_masked[1:] != is_masked[:-1]).sum()) <= 2, "one run of frames"


@given(frames=st.integers(1, 400), seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_a_ratio_of_0_masks_nothing(frames: int, seed: int) -> None:
    generator = Generator().manual_seed(seed)
    masked = mask_frames(numbered(frames), ratio=0, min_span=20, max_span=50, generator=generator)
    assert not masked.is_masked.any()
