"""Attention over packed utterances: one behind the other, without padding.

Shape suffixes: N query positions and M key positions of all utterances of a batch, H heads, D dimensions a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctal.dropout import draw_kept, scale_of_kept

SHORT_ON_CPU = 512
"""Keys of the longest utterance below which attention on a CPU is computed in fp32, whatever the precision."""

BLOCK = 2**21
"""Attention weights that are computed at a time where they are dropped: 8 MB a tensor, of which there are few."""


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
    that ends at the query), else utterance by utterance, which wastes nothing on padding: torch's scaled-dot-product
    attention, or, with dropout on a CPU, for which torch has no fused kernel, `_DroppedAttention`.

    Args:
        causal: Queries see keys up to their own position; needs the same lengths for both.
        dropout: Probability with which an attention weight is dropped, from 0 to less than 1.

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
    # On a CPU, half-precision attention over few keys is slower than in fp32, its backward pass by a factor of 3 to 5;
    # where weights are dropped, about half of the time goes into what is no matrix product.
    if query_NHD.device.type == "cpu" and is_half and (key_lengths.longest < SHORT_ON_CPU or dropout > 0):
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
    attended = []
    for query, key, value in utterances:
        if len(query) == 0:
            continue
        heads_first = (each.transpose(0, 1) for each in (query, key, value))
        if dropout > 0 and query.device.type == "cpu":
            states_HND = _DroppedAttention.apply(*heads_first, causal, dropout)
            assert isinstance(states_HND, Tensor)
        else:
            batch = (each[None] for each in heads_first)
            states_HND = F.scaled_dot_product_attention(*batch, is_causal=causal, dropout_p=dropout)[0]
        attended.append(states_HND.transpose(0, 1))
    return torch.cat(attended)


class _DroppedAttention(torch.autograd.Function):
    """Attention of one utterance with dropout of its weights, of which only a block is in memory at a time.

    The backward pass computes a block's weights again and draws the same numbers again, from a seed that the forward
    pass has taken from torch's generator, so that memory grows with the length and not with its square.
    """

    @staticmethod
    def forward(
        ctx: Any, query_HND: Tensor, key_HMD: Tensor, value_HMD: Tensor, causal: bool, dropout: float
    ) -> Tensor:
        ctx.save_for_backward(query_HND, key_HMD, value_HMD)
        ctx.causal, ctx.dropout = causal, dropout
        ctx.seed = int(torch.randint(2**32, ()))  # all that a generator on the CPU takes of it
        result_HND = torch.empty_like(query_HND)
        with torch.autocast("cpu", enabled=False):  # as the backward pass computes
            scaled_HMD = value_HMD * scale_of_kept(dropout)
            for block in _blocks(query_HND, key_HMD, causal, dropout, ctx.seed):
                weights = block.weights.mul_(block.kept)
                result_HND[block.heads, block.queries] = weights @ scaled_HMD[block.heads, block.keys]
        return result_HND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (gradient_HND,) = gradients
        query_HND, key_HMD, value_HMD = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query_HND), torch.zeros_like(key_HMD), torch.zeros_like(value_HMD)
        scaled_HMD = value_HMD * scale_of_kept(ctx.dropout)
        for block in _blocks(query_HND, key_HMD, ctx.causal, ctx.dropout, ctx.seed):
            queries, keys = (block.heads, block.queries), (block.heads, block.keys)
            gradient = gradient_HND[queries]
            of_value[keys] += (block.weights * block.kept).mT @ gradient
            of_weights = (gradient @ scaled_HMD[keys].mT).mul_(block.kept)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, block.weights, -1, block.weights.dtype)
            of_query[queries] = of_scores @ key_HMD[keys]
            of_key[keys] += of_scores.mT @ query_HND[queries]
        scale = query_HND.shape[-1] ** -0.5
        return of_query.mul_(scale), of_key.mul_(scale), of_value.mul_(scale_of_kept(ctx.dropout)), None, None


@dataclass(frozen=True)
class _Block:
    """Some heads' weights between some queries and the keys that they see."""

    heads: slice
    queries: slice
    keys: slice
    weights: Tensor
    """(heads, queries, keys), before dropout."""
    kept: Tensor
    """Bool of the same shape."""


def _blocks(query_HND: Tensor, key_HMD: Tensor, causal: bool, dropout: float, seed: int) -> Iterator[_Block]:
    """All weights of an utterance, in the same order and with the same draws whenever it is asked for them."""
    generator = torch.Generator().manual_seed(seed)
    heads, queries, width = query_HND.shape
    keys = key_HMD.shape[1]
    heads_a_block = max(1, min(heads, BLOCK // (queries * keys)))
    queries_a_block = max(1, min(queries, BLOCK // keys))
    for head in range(0, heads, heads_a_block):
        for first in range(0, queries, queries_a_block):
            end = min(first + queries_a_block, queries)
            of_heads, seen = slice(head, head + heads_a_block), slice(0, end if causal else keys)
            scores = (query_HND[of_heads, first:end] * width**-0.5) @ key_HMD[of_heads, seen].mT
            if causal:
                scores.masked_fill_(torch.ones(scores.shape[1:], dtype=torch.bool).triu_(1 + first), -torch.inf)
            weights = scores.softmax(-1)
            yield _Block(of_heads, slice(first, end), seen, weights, draw_kept(weights.shape, dropout, generator))


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
