"""Attention over packed utterances: one behind the other, without padding.

Shape suffixes: N query positions and M key positions of all utterances of a batch, H heads, D dimensions a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctal.dropout import draw_kept, drop, scale_of_kept

FEW_ON_CPU = 2**17
"""Attention weights of the longest utterance below which half precision is computed in fp32 by torch's kernel on a CPU:
to issue the operations of `_BlockAttention` takes longer than they do."""

BLOCK = 2**21
"""Attention weights in memory at a time where they are computed block by block: 4 or 8 MB a tensor, of which few."""


@dataclass(frozen=True)
class Lengths:
    """How many positions of a packed tensor belong to each utterance, in order."""

    sizes: Sequence[int]
    device: torch.device
    bound: int = field(default=0, compare=False)
    """`longest` is at least this."""
    offsets: Tensor = field(init=False, repr=False, compare=False)
    """(B+1,) int32 on `device`: where each utterance starts, and the end."""
    longest: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # At once rather than when asked for, so that a compiled layer finds them made.
        offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int32)
        object.__setattr__(self, "offsets", torch.from_numpy(offsets).to(self.device))
        object.__setattr__(self, "longest", max([self.bound, *self.sizes]))

    def at(self, offsets: Tensor) -> Lengths:
        """Those that stand at `offsets` whenever they are used, as in a CUDA graph; none is longer than `longest`."""
        lengths = copy.copy(self)
        object.__setattr__(lengths, "sizes", ())  # not known, so that what needs them fails
        object.__setattr__(lengths, "offsets", offsets)
        return lengths


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

    Without dropout on CUDA all utterances at once: torch's flash attention in half precision, its memory-efficient one
    in fp32. Else utterance by utterance, which wastes nothing on padding either: torch's scaled-dot-product attention,
    or on a CPU `_BlockAttention`.

    Args:
        causal: Queries see keys up to their own position; needs the same lengths for both.
        dropout: Probability with which an attention weight is dropped, from 0 to less than 1.

    Returns:
        (N, H, D). An utterance may have 0 queries, and 0 keys only then.
    """
    if len(query_NHD) == 0:
        # Nothing to compute, but keys and values stay in the graph: DDP wants a gradient of every parameter.
        return query_NHD + (key_MHD.sum() + value_MHD.sum())
    is_half = query_NHD.dtype in (torch.float16, torch.bfloat16)
    if _is_at_once(query_NHD, dropout):
        offsets = query_lengths.offsets, key_lengths.offsets
        # A bound may be more than there is, which the kernel for fp32 refuses.
        longest = min(query_lengths.longest, len(query_NHD)), min(key_lengths.longest, len(key_MHD))
        if is_half:
            from torch.nn.attention.varlen import varlen_attn

            # Its causal mask is a window that ends at the query.
            window = (-1, 0) if causal else (-1, -1)
            attended = varlen_attn(query_NHD, key_MHD, value_MHD, *offsets, *longest, window_size=window)
        else:
            # What `scaled_dot_product_attention` has of it takes padded batches, or nested tensors, which cost more
            # than the attention of a few utterances.
            batch = (each[None] for each in (query_NHD, key_MHD, value_MHD))
            attended = torch.ops.aten._efficient_attention_forward(
                *batch, None, *offsets, *longest, 0.0, int(causal), compute_log_sumexp=torch.is_grad_enabled()
            )[0][0]
        assert isinstance(attended, Tensor)
        return attended
    # On a CPU torch's fused kernel has no dropout, and in half precision is at best as fast as in fp32.
    on_cpu = query_NHD.device.type == "cpu"
    weights = query_NHD.shape[1] * query_lengths.longest * key_lengths.longest
    if on_cpu and is_half and dropout == 0.0 and weights < FEW_ON_CPU:
        with torch.autocast("cpu", enabled=False):
            fp32 = (query_NHD.float(), key_MHD.float(), value_MHD.float())
            return _attend_one_by_one(*fp32, query_lengths, key_lengths, causal, dropout).to(query_NHD.dtype)
    if on_cpu and (is_half or dropout > 0):
        attended = _BlockAttention.apply(query_NHD, key_MHD, value_MHD, query_lengths, key_lengths, causal, dropout)
        assert isinstance(attended, Tensor)
        return attended
    return _attend_one_by_one(query_NHD, key_MHD, value_MHD, query_lengths, key_lengths, causal, dropout)


def _is_at_once(query_NHD: Tensor, dropout: float) -> bool:
    """Whether all utterances are attended to at once: not with dropout, since flash attention of varied lengths has
    none, and the memory-efficient kernel drops other weights in its backward pass there than in its forward pass."""
    # Rows that begin at multiples of 16 bytes are all that the kernel for fp32 takes.
    is_taken = query_NHD.dtype in (torch.float16, torch.bfloat16) or (
        query_NHD.dtype == torch.float32 and query_NHD.shape[-1] % 4 == 0
    )
    return query_NHD.is_cuda and dropout == 0.0 and is_taken


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
    attended = []
    for query, key, value in _utterances(query_lengths, [query_NHD], key_lengths, [key_MHD, value_MHD]):
        if len(query) == 0:
            continue
        batch = (each.transpose(0, 1)[None] for each in (query, key, value))
        states_HND = F.scaled_dot_product_attention(*batch, is_causal=causal, dropout_p=dropout)[0]
        attended.append(states_HND.transpose(0, 1))
    return torch.cat(attended)


class _BlockAttention(torch.autograd.Function):
    """Attention on a CPU by matrix products, with a block of weights in memory at a time.

    The backward pass computes a block's weights again, and draws what is dropped again from a seed that the forward
    pass has taken from torch's generator, so that memory grows with the length and not with its square.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_NHD: Tensor,
        key_MHD: Tensor,
        value_MHD: Tensor,
        query_lengths: Lengths,
        key_lengths: Lengths,
        causal: bool,
        dropout: float,
    ) -> Tensor:
        ctx.save_for_backward(query_NHD, key_MHD, value_MHD)
        ctx.lengths, ctx.causal, ctx.dropout = (query_lengths, key_lengths), causal, dropout
        ctx.seed = int(torch.randint(2**32, ())) if dropout > 0 else 0  # all that a generator on the CPU takes of it
        draws = _Draws(dropout, ctx.seed)
        result_NHD = torch.empty_like(query_NHD, memory_format=torch.contiguous_format)
        scratch = _Scratch(query_NHD)
        with torch.autocast("cpu", enabled=False):  # as the backward pass computes
            of_queries, of_keys = [query_NHD, result_NHD], [key_MHD, value_MHD]
            for query, result, key, value in _utterances(query_lengths, of_queries, key_lengths, of_keys):
                query_HND, key_HMD = _heads_first(query * query.shape[-1] ** -0.5), _heads_first(key)
                value_HMD = _heads_first(value).mul(draws.scale)
                result_HND = torch.empty_like(query_HND)
                for block in _blocks(query_HND, key_HMD, causal, draws, scratch):
                    torch.bmm(block.kept_weights(), value_HMD[block.of_keys], out=result_HND[block.of_queries])
                result.copy_(result_HND.transpose(0, 1))
        return result_NHD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NHD,) = gradients
        query_NHD, key_MHD, value_MHD = ctx.saved_tensors
        scale = query_NHD.shape[-1] ** -0.5
        of_query_NHD, of_key_MHD, of_value_MHD = (torch.empty_like(each) for each in (query_NHD, key_MHD, value_MHD))
        draws = _Draws(ctx.dropout, ctx.seed)
        scratch, scratch_of_gradient = _Scratch(query_NHD), _Scratch(query_NHD)
        query_lengths, key_lengths = ctx.lengths
        of_queries, of_keys = [query_NHD, gradient_NHD, of_query_NHD], [key_MHD, value_MHD, of_key_MHD, of_value_MHD]
        for query, gradient, of_query, key, value, of_key, of_value in _utterances(
            query_lengths, of_queries, key_lengths, of_keys
        ):
            query_HND, key_HMD = _heads_first(query * scale), _heads_first(key)
            value_HMD, gradient_HND = _heads_first(value).mul(draws.scale), _heads_first(gradient)
            of_query_HND = torch.empty_like(query_HND)
            # Sums over blocks, which half precision would round one by one.
            sums = torch.promote_types(key_HMD.dtype, torch.float32)
            of_key_HDM, of_value_HDM = (torch.zeros_like(key_HMD.mT, dtype=sums) for _ in range(2))
            for block in _blocks(query_HND, key_HMD, ctx.causal, draws, scratch):
                seen = block.heads, slice(None), block.keys
                of_value_HDM[seen] += gradient_HND[block.of_queries].mT @ block.kept_weights()
                of_weights = scratch_of_gradient.view(*block.weights.shape)
                torch.bmm(gradient_HND[block.of_queries], value_HMD[block.of_keys].mT, out=of_weights)
                if block.kept is not None:
                    of_weights = drop(of_weights, block.kept)
                of_scores = torch.ops.aten._softmax_backward_data.out(
                    of_weights, block.weights, -1, of_weights.dtype, grad_input=of_weights
                )
                torch.bmm(of_scores, key_HMD[block.of_keys], out=of_query_HND[block.of_queries])
                of_key_HDM[seen] += query_HND[block.of_queries].mT @ of_scores
            of_query.copy_(of_query_HND.mul_(scale).transpose(0, 1))
            of_key.copy_(of_key_HDM.permute(2, 0, 1))
            of_value.copy_(of_value_HDM.mul_(draws.scale).permute(2, 0, 1))
        return of_query_NHD, of_key_MHD, of_value_MHD, None, None, None, None


def _heads_first(states_NHD: Tensor) -> Tensor:
    return states_NHD.transpose(0, 1).contiguous()


def _utterances(
    query_lengths: Lengths, of_queries: Sequence[Tensor], key_lengths: Lengths, of_keys: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Views of each utterance's part of tensors with a row a query, and then of those with a row a key."""
    parts = [each.split(list(query_lengths.sizes)) for each in of_queries]
    return zip(*parts, *(each.split(list(key_lengths.sizes)) for each in of_keys), strict=True)


class _Draws:
    """Which weights are dropped: the same again from the same seed, for the same blocks in the same order."""

    def __init__(self, dropout: float, seed: int) -> None:
        self.dropout = dropout
        self.scale = scale_of_kept(dropout)
        self.generator = torch.Generator().manual_seed(seed)

    def kept(self, shape: torch.Size) -> Tensor | None:
        return draw_kept(shape, self.dropout, self.generator) if self.dropout > 0 else None


class _Scratch:
    """Memory for one block after another, since to get it anew costs as much as a matrix product."""

    def __init__(self, like: Tensor) -> None:
        self.memory = like.new_empty(0)

    def view(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        if count > len(self.memory):
            self.memory = self.memory.new_empty(count)
        return self.memory[:count].view(shape)


@dataclass(frozen=True)
class _Block:
    """Some heads' weights between some queries and the keys that they see."""

    heads: slice
    queries: slice
    keys: slice
    weights: Tensor
    """(heads, queries, keys), before dropout; its memory is the next block's."""
    kept: Tensor | None
    """As `draw_kept` gives it, or None: all."""

    @property
    def of_queries(self) -> tuple[slice, slice]:
        return self.heads, self.queries

    @property
    def of_keys(self) -> tuple[slice, slice]:
        return self.heads, self.keys

    def kept_weights(self) -> Tensor:
        return self.weights if self.kept is None else drop(self.weights, self.kept)


def _blocks(query_HND: Tensor, key_HMD: Tensor, causal: bool, draws: _Draws, scratch: _Scratch) -> Iterator[_Block]:
    """All weights of an utterance whose queries are scaled already."""
    heads, queries, _ = query_HND.shape
    keys = key_HMD.shape[1]
    # In four parts where few see all keys, so that little is computed of what none sees.
    queries_a_block = max(1, min(-(-queries // 4) if causal else queries, BLOCK // keys))
    heads_a_block = max(1, min(heads, BLOCK // (queries_a_block * keys)))
    for head in range(0, heads, heads_a_block):
        of_heads = slice(head, min(head + heads_a_block, heads))
        for first in range(0, queries, queries_a_block):
            end = min(first + queries_a_block, queries)
            seen = slice(0, end if causal else keys)
            query, key = query_HND[of_heads, first:end], key_HMD[of_heads, seen]
            weights = scratch.view(len(query), query.shape[1], key.shape[1])
            torch.bmm(query, key.mT, out=weights)
            if causal:
                later = torch.ones(end - first, end - first, dtype=torch.bool).triu_(1)
                weights[..., first:].masked_fill_(later, -torch.inf)
            torch.softmax(weights, -1, out=weights)
            yield _Block(of_heads, slice(first, end), seen, weights, draws.kept(weights.shape))


@torch.compiler.disable()  # likewise
def attention_weights(query_NHD: Tensor, key_MHD: Tensor, query_lengths: Lengths, key_lengths: Lengths) -> list[Tensor]:
    """The softmax weights that `packed_attention` uses inside, one (H, queries, keys) tensor an utterance."""
    scale = query_NHD.shape[-1] ** -0.5
    return [
        torch.einsum("qhd,khd->hqk", query * scale, key).softmax(-1)
        for query, key in _utterances(query_lengths, [query_NHD], key_lengths, [key_MHD])
    ]
