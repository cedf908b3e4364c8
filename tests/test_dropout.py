"""Dropout drops what it is asked to, with torch's generator, and scales the rest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctal.dropout import Dropout


def dropped(values: Tensor, p: float, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return Dropout(p)(values)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.95])
def test_the_share_asked_for_is_dropped_in_each_of_the_four_that_share_a_draw(p: float) -> None:
    count = 400_000
    kept_N4 = (dropped(torch.ones(count, 4), p) != 0).double()
    deviation = (p * (1 - p) / count) ** 0.5

    assert ((kept_N4.mean(0) - (1 - p)).abs() < 5 * deviation).all()
    # Independent of each other, and of the next draw.
    centred_N4 = kept_N4 - (1 - p)
    products = torch.cat([centred_N4, centred_N4.roll(-1, 0)], 1).T @ centred_N4 / count
    products[range(4), range(4)] -= p * (1 - p)
    assert products.abs().max() < 5 * p * (1 - p) / count**0.5


@given(st.lists(st.integers(0, 7), min_size=1, max_size=3), st.floats(0.001, 0.999), st.integers(0, 9))
def test_what_is_kept_is_scaled_and_gradients_likewise(shape: list[int], p: float, seed: int) -> None:
    values = (1 + torch.rand(shape)).requires_grad_()
    result = dropped(values, p, seed)
    result.sum().backward()

    kept = result != 0
    scale = 2**16 / (2**16 - round(p * 2**16))
    assert torch.equal(result[kept], values.detach()[kept] * scale)
    assert values.grad is not None
    assert torch.equal(values.grad, kept * torch.tensor(scale))


def test_the_generators_state_decides_and_a_pass_done_again_drops_the_same() -> None:
    values = torch.randn(50, 7, requires_grad=True)
    assert torch.equal(dropped(values, 0.3, 1), dropped(values, 0.3, 1))
    assert not torch.equal(dropped(values, 0.3, 1), dropped(values, 0.3, 2))

    def gradient(*, again: bool) -> Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Sequential(Dropout(0.3), torch.nn.Tanh(), Dropout(0.3))
        result = checkpoint(layer, values, use_reentrant=False) if again else layer(values)
        (found,) = torch.autograd.grad(result.square().sum(), values)
        return found

    assert torch.equal(gradient(again=True), gradient(again=False))


def test_nothing_is_dropped_in_evaluation_or_with_probability_0_and_all_with_1() -> None:
    values = torch.randn(9)
    assert Dropout(0.5).eval()(values) is values
    assert torch.equal(dropped(values, 0), values)
    assert torch.equal(dropped(values, 1), torch.zeros(9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_stays(dtype: torch.dtype) -> None:
    assert dropped(torch.ones(5, dtype=dtype), 0.5).dtype == dtype
