"""Pooling and fusion of two modalities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctal.fusion import FUSIONS, Pools, absolute_cosine, segment_attend, segment_max, segment_statistics

B, D = 3, 4


def pools(*, has_audio: tuple[bool, ...] = (True,) * B, seed: int = 0) -> Pools:
    generator = torch.Generator().manual_seed(seed)
    present = torch.tensor(has_audio)
    text_first, text_max, audio_attended, audio_max = torch.randn(4, B, D, generator=generator)
    return Pools(text_first, text_max, audio_attended * present[:, None], audio_max * present[:, None], present)


def test_segments_are_pooled_each_by_itself_and_empty_ones_are_zero() -> None:
    values, scores = torch.randn(5, D), torch.randn(5)
    owner = torch.tensor([0, 0, 2, 2, 2])

    attended, maximum = segment_attend(values, scores, owner, 4), segment_max(values, owner, 4)

    for segment, part in ((0, slice(0, 2)), (2, slice(2, 5))):
        expected = (scores[part].softmax(0)[:, None] * values[part]).sum(0)
        torch.testing.assert_close(attended[segment], expected)
        torch.testing.assert_close(maximum[segment], values[part].amax(0))
    for segment in (1, 3):
        assert not attended[segment].any()
        assert not maximum[segment].any()


def test_statistics_are_those_of_each_segment_and_have_slopes_everywhere() -> None:
    values, scores = torch.randn(6, D, requires_grad=True), torch.randn(6, requires_grad=True)
    owner = torch.tensor([0, 0, 2, 2, 2, 3])

    mean, deviation = segment_statistics(values, scores, owner, 5)

    assert torch.equal(mean, segment_attend(values, scores, owner, 5))
    for segment, part in ((0, slice(0, 2)), (2, slice(2, 5))):
        weights = scores[part].softmax(0)[:, None]
        squares = (weights * values[part].square()).sum(0) - (weights * values[part]).sum(0).square()
        torch.testing.assert_close(deviation[segment], squares.sqrt())
    assert not deviation[[1, 4]].any()
    assert (deviation[3] < 0.01).all()  # of a single position
    deviation.sum().backward()
    assert values.grad is not None
    assert scores.grad is not None
    assert values.grad.isfinite().all()
    assert scores.grad.isfinite().all()
    assert values.grad[2:5].any()


def test_attention_over_huge_scores_stays_finite() -> None:
    attended = segment_attend(torch.ones(2, D), torch.tensor([1e4, -1e4]), torch.tensor([0, 0]), 1)

    torch.testing.assert_close(attended, torch.ones(1, D))


@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_gives_two_hidden_sizes_and_a_term_of_at_least_zero(name: str) -> None:
    fused = FUSIONS[name](D, "cosine")(pools())

    assert fused.vector.shape == (B, 2 * D)
    assert fused.orthogonality_B.shape == (B,)
    assert (fused.orthogonality_B >= 0).all()
    assert bool(fused.orthogonality_B.any()) == name.startswith("orthogonal")


def test_a_long_recording_in_half_precision_is_rounded_once() -> None:
    values, scores, owner = torch.randn(3000, D).abs(), torch.randn(3000), torch.zeros(3000, dtype=torch.long)
    exact = segment_attend(values.bfloat16().float(), scores, owner, 1)
    assert torch.equal(segment_attend(values.bfloat16(), scores, owner, 1), exact.bfloat16())


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_looks_at_what_it_says_that_it_uses_and_at_nothing_else(name: str) -> None:
    fusion = FUSIONS[name](D, "cosine")
    before, other = pools(), pools(seed=1)
    without_text = before._replace(text_first=other.text_first, text_max=other.text_max)
    without_audio = before._replace(audio_attended=other.audio_attended, audio_max=other.audio_max)

    def changes(after: Pools) -> bool:
        return not torch.equal(fusion(before).vector, fusion(after).vector)

    assert changes(without_text) == fusion.uses_text
    assert changes(without_audio) == fusion.uses_audio


@pytest.mark.parametrize("name", ["orthogonal", "gated"])
def test_without_a_recording_the_text_alone_is_fused_and_orthogonality_is_zero(name: str) -> None:
    before = pools(has_audio=(True, False, True))

    fused = FUSIONS[name](D, "cosine")(before)

    torch.testing.assert_close(fused.vector[1], torch.cat([before.text_first[1], before.text_max[1]]))
    assert fused.orthogonality_B[1] == 0


def test_the_cosine_ignores_lengths_and_the_reference_does_not() -> None:
    audio, text = torch.randn(2, B, D)

    def of(scale: float, norm: str) -> Tensor:
        return absolute_cosine(scale * audio, text, norm)  # pyright: ignore[reportArgumentType]

    torch.testing.assert_close(of(3, "cosine"), of(1, "cosine"))
    torch.testing.assert_close(of(3, "reference"), of(1, "reference") / 3)
    torch.testing.assert_close(of(1, "reference"), ((audio * text).sum(1) / audio.norm(dim=1) ** 2).abs())
