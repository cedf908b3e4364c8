"""GELU and the linear layer behind it, without keeping what lies between them for the backward pass.

In a feed-forward the widest tensor is kept twice, before and after GELU. The latter is computed again from the former;
activation checkpointing of both operations (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016) would
compute the matrix product again, too. On a CPU that is one to two hundredths of a step's time at `base`, and a
twentieth at `mini`, whose matrix products are a third as much work for each number: there it is kept.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW_ON_CPU = 512
"""Width of the result below which nothing is computed again on a CPU."""


def linear_of_gelu(states: Tensor, linear: nn.Module) -> Tensor:
    """`linear(gelu(states))`: (…, I) → (…, O), with the same gradients.

    Anything but a plain `nn.Linear` (quantised, with adapters or hooks) is called as it is. Layers that are compiled
    are left to the compiler, which chooses by itself what to keep.
    """
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not is_plain(linear)
        or (states.device.type == "cpu" and linear.out_features < NARROW_ON_CPU)
    ):
        return linear(F.gelu(states))
    result = _LinearOfGelu.apply(states, linear.weight, linear.bias)
    assert isinstance(result, Tensor)
    return result


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether its weight and bias are all that it does."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(linear) is nn.Linear and not any(getattr(linear, hooks) for hooks in kinds)


class _LinearOfGelu(torch.autograd.Function):
    """In the type of the states, as under autocast, whose copy of the weight is not kept either."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return F.linear(F.gelu(states), weight.to(states.dtype), None if bias is None else bias.to(states.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        gradient = gradients[0]
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad
        of_weight = of_bias = of_states = None
        if wants_weight:
            of_weight = gradient.flatten(0, -2).t() @ F.gelu(states).flatten(0, -2)
        if wants_bias:
            of_bias = gradient.flatten(0, -2).sum(0)
        if wants_states:
            of_states = torch.ops.aten.gelu_backward(gradient @ weight.to(states.dtype), states)
        return of_states, of_weight, of_bias
