"""Weights that are split over processes (FSDP2), so that a model trains where no device holds it with its moments.

Each process keeps its part of every tensor as a `DTensor`; a layer's weights are gathered while it computes. In a model
that is not split all of this changes nothing, so the training loop asks no questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer


def shard(model: nn.Module, device: torch.device) -> None:
    """Splits the weights of `model` over all processes, in place: a group for each layer, and one for all else."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model.to(device)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, mesh=mesh)
    # The outermost group is wanted first in the backward pass again, so it stays gathered between.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gathers all weights on every process meanwhile, as plain tensors: for forward passes of which each process does
    another number, and to write the model. All processes enter and leave together."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def synchronise(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass adds gradients up over the processes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor's whole value, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_main(tensors: Mapping[str, Tensor], is_main: bool) -> dict[str, Tensor]:
    """Whole tensors in the main process's memory, and none on the others, which all take part.

    One at a time is whole on a device, where not all of them may fit if their weights are split.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = gathered(tensor)
        if is_main:
            found[name] = value.cpu()
    return found


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, on the device of `like`, and split as that is; every process brings the same."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor
