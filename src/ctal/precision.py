"""The arithmetic in which a model is asked: fp32, bf16 by autocast, or int8 on a CPU.

On a CPU the third quantises dynamically: each linear layer's weights by output channel when the model is loaded, what
goes into it by its range in the batch, so a result depends a little on what shares its batch (docs/performance.md).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ctal.errors import CtalWarning, InputError, did_you_mean

PRECISIONS = ("fp32", "bf16", "int8")

Model = TypeVar("Model", bound=nn.Module)


def fast_precision() -> Literal["fp32", "bf16"]:
    """bf16 where this machine multiplies it in hardware, else fp32; a model can be trained in either."""
    return "bf16" if multiplies_bf16("cuda" if torch.cuda.is_available() else "cpu") else "fp32"


def multiplies_bf16(device_type: str) -> bool:
    """Whether this machine's `cpu` or `cuda` device has instructions for products in bf16."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def check_precision(precision: str, device: torch.device) -> None:
    """Warns of bf16 where `device` has no instructions for it.

    Raises:
        InputError: It is not in `PRECISIONS`; int8 on another device than a CPU.
    """
    if precision not in PRECISIONS:
        hint = did_you_mean(precision, PRECISIONS)
        raise InputError(f"precision '{precision}'{hint}: choose from {', '.join(PRECISIONS)}")
    if precision == "int8" and device.type != "cpu":
        raise InputError(f"precision int8 is for CPUs; use bf16 on {device}")
    if precision == "bf16" and device.type in ("cpu", "cuda") and not multiplies_bf16(device.type):
        message = "precision bf16: this {} multiplies it in software, which takes many times as long; use fp32"
        warnings.warn(message.format({"cpu": "CPU", "cuda": "GPU"}[device.type]), CtalWarning, stacklevel=2)


def for_precision(model: Model, precision: str) -> Model:
    """The model to call under `autocast`; for int8 a quantised copy, in evaluation mode."""
    if precision != "int8":
        return model
    with warnings.catch_warnings():
        # torch deprecates this way in favour of torchao, a dependency of its own.
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic
        from torch.ao.quantization.qconfig import per_channel_dynamic_qconfig

        # A classifier of speakers compares with its weights by angle, so they stay as they are.
        spec = {nn.Linear: per_channel_dynamic_qconfig, "classifier": None}
        return quantize_dynamic(copy.deepcopy(model).eval(), spec, inplace=True)


def forward_in(precision: str, device: torch.device, model: nn.Module) -> Callable[..., Any]:
    """The forward pass of `model` in `precision`, and nothing else: not what makes its batches."""

    def forward(**inputs: torch.Tensor) -> Any:
        with autocast(device, precision):
            return model(**inputs)

    return forward


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """What a forward pass in `precision` runs in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
