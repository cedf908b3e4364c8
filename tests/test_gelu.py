"""What is computed again in the backward pass changes no bit of result or gradients, and is not kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ctal.gelu
from ctal.gelu import linear_of_gelu


@pytest.fixture(autouse=True)
def _at_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctal.gelu, "NARROW_ON_CPU", 0)


def plain(states: Tensor, linear: nn.Linear) -> Tensor:
    return linear(F.gelu(states))


def outcome(function, linear: nn.Linear, states: Tensor, precision: torch.dtype) -> list[Tensor | None]:
    """Result, and gradients of whatever wants one."""
    states = states.detach().clone().requires_grad_(states.requires_grad)
    linear.zero_grad(set_to_none=True)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        result = function(states if precision == torch.float32 else states.to(precision), linear)
    result.float().square().sum().backward()
    return [result, states.grad, linear.weight.grad, None if linear.bias is None else linear.bias.grad]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "states", "weight"])
@pytest.mark.parametrize("shape", [(50, 12), (3, 17, 12)])
def test_result_and_gradients_are_those_of_the_two_operations(
    precision: torch.dtype, bias: bool, frozen: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 5, bias=bias)
    linear.weight.requires_grad_(frozen != "weight")
    states = torch.randn(shape, requires_grad=frozen != "states")

    ours, theirs = (outcome(function, linear, states, precision) for function in (linear_of_gelu, plain))

    assert sum(each is not None for each in theirs) == 3 + bias - (frozen != "nothing")
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or other is None or (mine.dtype == other.dtype and torch.equal(mine, other))


def test_the_result_of_gelu_is_not_kept() -> None:
    linear, states = nn.Linear(64, 8), torch.randn(10, 64, requires_grad=True)
    activated = F.gelu(states.detach())

    def kept(function) -> bool:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda each: each):
            function(states, linear)
        return any(each.shape == activated.shape and torch.equal(each, activated) for each in saved)

    assert kept(plain)
    assert not kept(linear_of_gelu)


def test_gradients_are_the_same_under_activation_checkpointing_and_can_be_differentiated_again() -> None:
    torch.manual_seed(0)
    linear, states = nn.Linear(6, 3).double(), torch.randn(4, 6, dtype=torch.double, requires_grad=True)

    (without,) = torch.autograd.grad(linear_of_gelu(states, linear).square().sum(), states)
    result = checkpoint(linear_of_gelu, states, linear, use_reentrant=False)
    assert isinstance(result, Tensor)
    (again,) = torch.autograd.grad(result.square().sum(), states)

    assert torch.equal(without, again)
    assert torch.autograd.gradgradcheck(lambda values: linear_of_gelu(values, linear), states)


def test_hooks_of_the_layer_are_called() -> None:
    linear, seen = nn.Linear(4, 2), []
    linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    states = torch.randn(3, 4, requires_grad=True)

    linear_of_gelu(states, linear)

    assert torch.equal(seen[0], F.gelu(states))
