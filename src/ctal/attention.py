"""Attention over packed utterances: one behind the other, without padding.

Shape suffixes: N query positions and M key positions of all utterances of a batch, H heads, D dimensions a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHORT_ON_CPU = 512
"""Keys of the longest utterance below which attention on a CPU is computed in fp32, whatever the precision."""


@dataclass(frozen=True)
class Lengths:
    """How many positions of a packed tensor belong to each utterance, in order."""

    sizes: Sequence[int]
    device: torch.device
    offsets: Tensor = field(init=False, repr=False, compare=False)
    """(B+1,) int32 on `device`: where each utterance starts, and the end."""
    longest: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # At once rather than when asked for, so that a compiled layer finds them made.
        offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int32)
        object.__setattr__(self, "offsets", torch.from_numpy(offsets).to(self.device))
        object.__setattr__(self, "longest", max(self.sizes, default=0))


def packed_attention(
    query_NHD: Tensor,
    key_MHD: Tensor,
    value_MHD: Tensor,
    query_lengths: Lengths,
    key_lengths: Lengths,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of each utterance's queries to its own keys.

    Variable-length flash attention on CUDA in half precision (which has no dropout and whose causal mask is a window
    that ends at the query), else scaled-dot-product attention utterance by utterance, which wastes nothing on padding.

    Args:
        causal: Queries see keys up to their own position; needs the same lengths for both.
        dropout: Probability with which an attention weight is dropped.

    Returns:
        (N, H, D). An utterance may have 0 queries, never 0 keys.
    """
    if len(query_NHD) == 0:
        # Nothing to compute, but keys and values stay in the graph: DDP wants a gradient of every parameter.
        return query_NHD + (key_MHD.sum() + value_MHD.sum())
    is_half = query_NHD.dtype in (torch.float16, torch.bfloat16)
    if query_NHD.is_cuda and is_half and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn

        attended = varlen_attn(
            query_NHD,
            key_MHD,
            value_MHD,
            query_lengths.offsets,
            key_lengths.offsets,
            query_lengths.longest,
            key_lengths.longest,
            window_size=(-1, 0) if causal else (-1, -1),
        )
        assert isinstance(attended, Tensor)
        return attended
    # On a CPU, half-precision attention over few keys is slower than in fp32, its backward pass by a factor of 3 to 5.
    if query_NHD.device.type == "cpu" and is_half and key_lengths.longest < SHORT_ON_CPU:
        with torch.autocast("cpu", enabled=False):
            fp32 = (query_NHD.float(), key_MHD.float(), value_MHD.float())
            return _attend_one_by_one(*fp32, query_lengths, key_lengths, causal, dropout).to(query_NHD.dtype)
    return _attend_one_by_one(query_NHD, key_MHD, value_MHD, query_lengths, key_lengths, causal, dropout)


@torch.compiler.disable()  # its graph would be another one for every number of utterances
def _attend_one_by_one(
    query_NHD: Tensor,
    key_MHD: Tensor,
    value_MHD: Tensor,
    query_lengths: Lengths,
    key_lengths: Lengths,
    causal: bool,
    dropout: float,
) -> Tensor:
    utterances = zip(
        query_NHD.split(list(query_lengths.sizes)),
        key_MHD.split(list(key_lengths.sizes)),
        value_MHD.split(list(key_lengths.sizes)),
        strict=True,
    )
    attended = [
        F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            is_causal=causal,
            dropout_p=dropout,
        )[0].transpose(0, 1)
        for query, key, value in utterances
        if len(query)
    ]
    return torch.cat(attended)


@torch.compiler.disable()  # likewise
def attention_weights(query_NHD: Tensor, key_MHD: Tensor, query_lengths: Lengths, key_lengths: Lengths) -> list[Tensor]:
    """The softmax weights that `packed_attention` uses inside, one (H, queries, keys) tensor an utterance."""
    scale = query_NHD.shape[-1] ** -0.5
    return [
        torch.einsum("qhd,khd->hqk", query * scale, key).softmax(-1)
        for query, key in zip(
            query_NHD.split(list(query_lengths.sizes)), key_MHD.split(list(key_lengths.sizes)), strict=True
        )
    ]
