"""Packed attention equals attention of each utterance on its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctal import attention
from ctal.attention import Lengths, attention_weights, packed_attention

HEADS, WIDTH = 2, 4
CPU = torch.device("cpu")

utterances = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 7)), min_size=1, max_size=5)
"""Numbers of queries and of keys."""


def draw(seed: int, *sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, HEADS, WIDTH, dtype=torch.float64, generator=generator) for size in sizes]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """One utterance by the definition, head by head and query by query."""
    output = torch.zeros_like(query)
    for head in range(HEADS):
        for i in range(len(query)):
            seen = i + 1 if causal else len(key)
            scores = key[:seen, head] @ query[i, head] / WIDTH**0.5
            weights = scores.exp() / scores.exp().sum()
            output[i, head] = weights @ value[:seen, head]
    return output


@given(sizes=utterances, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_packed_attention_is_softmax_attention_of_each_utterance(sizes: list[tuple[int, int]], seed: int) -> None:
    queries, keys = ([size[side] for size in sizes] for side in (0, 1))
    query, key, value = draw(seed, sum(queries), sum(keys), sum(keys))

    packed = packed_attention(query, key, value, Lengths(queries, CPU), Lengths(keys, CPU))

    parts = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    expected = torch.cat([softmax_attention(q, k, v, causal=False) for q, k, v in parts])
    torch.testing.assert_close(packed, expected)


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_a_causal_query_sees_keys_up_to_its_own(lengths: list[int], seed: int) -> None:
    query, key, value = draw(seed, *[sum(lengths)] * 3)

    packed = packed_attention(query, key, value, Lengths(lengths, CPU), Lengths(lengths, CPU), causal=True)

    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    torch.testing.assert_close(packed, torch.cat([softmax_attention(q, k, v, causal=True) for q, k, v in parts]))


@given(sizes=utterances, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_weights_are_those_that_the_outputs_are_made_with(sizes: list[tuple[int, int]], seed: int) -> None:
    queries, keys = ([size[side] for size in sizes] for side in (0, 1))
    query, key, value = draw(seed, sum(queries), sum(keys), sum(keys))

    weights = attention_weights(query, key, Lengths(queries, CPU), Lengths(keys, CPU))

    for each in weights:
        torch.testing.assert_close(each.sum(-1), torch.ones_like(each.sum(-1)))
    parts = zip(weights, value.split(keys), strict=True)
    outputs = torch.cat([torch.einsum("hqk,khd->qhd", each, values) for each, values in parts])
    torch.testing.assert_close(outputs, packed_attention(query, key, value, Lengths(queries, CPU), Lengths(keys, CPU)))


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    query, key, value = draw(0, 2000, 9, 9)
    query, value = torch.zeros_like(query), torch.ones_like(value)

    attended = packed_attention(query, key, value, Lengths([2000], CPU), Lengths([9], CPU), dropout=0.3)

    assert attended.std() > 0.1
    assert attended.mean().item() == pytest.approx(1, abs=0.02)


def test_no_two_heads_blocks_utterances_or_passes_drop_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 8 * 64)  # eight queries of a head
    lengths = Lengths([64, 64], CPU)
    alike = torch.zeros(128, HEADS, 64, dtype=torch.float64)
    identity = torch.eye(64, dtype=torch.float64).repeat(2, 1)[:, None].expand(128, HEADS, 64)

    def kept(seed: int | None = None) -> Tensor:
        """(utterances, queries, heads, keys): values that are an identity show the weights."""
        if seed is not None:
            torch.manual_seed(seed)
        return packed_attention(alike, alike, identity, lengths, lengths, dropout=0.5).unflatten(0, (2, 64)) > 0

    first, next_pass = kept(seed=0), kept()
    assert first.double().mean().item() == pytest.approx(0.5, abs=0.03)
    blocks = torch.cat(
        [each.unflatten(1, (8, 8)).permute(0, 1, 3, 2, 4).reshape(-1, 8 * 64) for each in (first, next_pass)]
    )
    agreement = (blocks[:, None] == blocks).double().mean(-1)
    assert agreement.fill_diagonal_(0.5).sub(0.5).abs().max() < 0.15
    assert torch.equal(kept(seed=0), first)


@given(sizes=utterances, seed=st.integers(0, 2**31), block=st.integers(1, 100), causal=st.booleans())
@settings(deadline=None, max_examples=50)
def test_dropout_that_drops_nothing_is_plain_attention_in_blocks_of_any_size(
    sizes: list[tuple[int, int]], seed: int, block: int, causal: bool
) -> None:
    queries, keys = ([size[side] for size in sizes] for side in (1 if causal else 0, 1))
    inputs = [tensor.requires_grad_() for tensor in draw(seed, sum(queries), sum(keys), sum(keys))]
    lengths = Lengths(queries, CPU), Lengths(keys, CPU)

    def outcome(dropout: float) -> list[Tensor]:
        query, key, value = inputs
        result = packed_attention(query, key, value, *lengths, causal=causal, dropout=dropout)
        return [result, *torch.autograd.grad(result.square().sum(), inputs)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        dropped = outcome(1e-9)
    for mine, plain in zip(dropped, outcome(0.0), strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_weights_that_were_dropped(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 20)
    inputs = tuple(tensor.requires_grad_() for tensor in draw(0, 11, 11, 11))
    lengths = Lengths([7, 4], CPU)

    def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.4) -> Tensor:
        torch.manual_seed(5)
        return packed_attention(query, key, value, lengths, lengths, causal=causal, dropout=dropout)

    query, key, value = inputs
    assert not torch.allclose(attend(query, key, value), attend(query, key, value, dropout=0.0))
    assert torch.autograd.gradcheck(attend, inputs)


def test_gradients_are_the_same_under_activation_checkpointing() -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in draw(0, 11, 11, 11))
    lengths = Lengths([7, 4], CPU)

    def gradients(*, again: bool) -> tuple[Tensor, ...]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return packed_attention(query, key, value, lengths, lengths, dropout=0.4)

        torch.manual_seed(5)
        result = checkpoint(attend, *inputs, use_reentrant=False) if again else attend(*inputs)
        assert isinstance(result, Tensor)
        return torch.autograd.grad(result.square().sum(), inputs)

    for mine, plain in zip(gradients(again=True), gradients(again=False), strict=True):
        assert torch.equal(mine, plain)


def test_no_tensor_of_queries_times_keys_is_kept_for_the_backward_pass() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in draw(0, 300, 300, 300))
    lengths = Lengths([300], CPU)
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        packed_attention(query, key, value, lengths, lengths, dropout=0.1)
    assert kept
    assert max(kept) <= 300 * HEADS * WIDTH


def test_no_query_at_all_gives_no_output() -> None:
    query, key, value = draw(0, 0, 5, 5)
    attended = packed_attention(query, key, value, Lengths([0, 0], CPU), Lengths([2, 3], CPU))
    assert attended.shape == (0, HEADS, WIDTH)


def test_without_queries_keys_and_values_still_have_gradients() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in draw(0, 0, 5, 5))
    packed_attention(query, key, value, Lengths([0, 0], CPU), Lengths([2, 3], CPU)).sum().backward()
    for tensor in (key, value):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_offsets_are_where_utterances_start() -> None:
    lengths = Lengths([3, 1, 4], CPU)
    assert lengths.offsets.tolist() == [0, 3, 4, 8]
    assert lengths.offsets.dtype == torch.int32
    assert lengths.longest == 4


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its kernels cannot run")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [None, [3, 0, 200, 64, 0]], ids=["causal", "fewer or none, and an empty utterance"])
def test_a_gpu_gives_what_the_cpu_gives(dtype: torch.dtype, queries: list[int] | None) -> None:
    keys = [5, 1, 130, 64] if queries is None else [5, 1, 130, 64, 0]
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(sum(each), 3, HEADS, 64, generator=generator) for each in (queries or keys, keys)]

    def outcome(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        of_queries, of_keys = (each.to(device, dtype).requires_grad_() for each in draws)
        lengths = [Lengths(each, device, bound=256) for each in (queries or keys, keys)]
        # As the layers have them: parts of one product.
        inputs = (of_queries[:, 0], of_keys[:, 1], of_keys[:, 2])
        result = packed_attention(*inputs, *lengths, causal=queries is None)
        gradients = torch.autograd.grad(result.float().square().sum(), (of_queries, of_keys))
        return [each.float().cpu() for each in (result, *gradients)]

    limit = 1e-5 if dtype == torch.float32 else 2e-2
    expected = outcome(CPU, torch.float32)
    for each, full in zip(outcome(torch.device("cuda"), dtype), expected, strict=True):
        assert (each - full).norm() < limit * full.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_dropout_drops_by_the_seed_differs_between_heads_and_is_the_same_in_the_backward_pass(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, upstream = (torch.randn(500, HEADS, 64, generator=generator).to(device) for _ in range(3))
    value = torch.ones(500, HEADS, 64, device=device)
    lengths = Lengths([300, 200], torch.device(device))

    def attend(seed: int, value: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return packed_attention(query, key, value, lengths, lengths, dropout=0.3)

    result = attend(1, value)
    assert torch.equal(result, attend(1, value))
    assert not torch.equal(result, attend(2, value))
    assert not torch.equal(result[:, 0], result[:, 1])
    assert result.mean().item() == pytest.approx(1, abs=0.01)

    # With weights W, results are W V and gradients of V are W' U: summed with V and with U both are the same.
    value = torch.randn(500, HEADS, 64, generator=generator).to(device).requires_grad_()
    result = attend(1, value)
    (gradient,) = torch.autograd.grad(result, value, upstream)
    for part in (slice(0, 300), slice(300, 500)):
        of_values, of_results = ((a * b)[part].sum((0, 2)) for a, b in ((gradient, value), (result, upstream)))
        torch.testing.assert_close(of_values, of_results, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("longest", [8, 600])
def test_half_precision_stays_close_to_fp32_and_drops_the_same(
    longest: int, dropout: float, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", 600 * 50)  # so that gradients are sums over several
    lengths = Lengths([3, longest], CPU)

    def outcome(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        query, key, value = (tensor.to(dtype).requires_grad_() for tensor in draw(0, *[3 + longest] * 3))
        result = packed_attention(query, key, value, lengths, lengths, causal=causal, dropout=dropout)
        return [result, *torch.autograd.grad(result.float().square().sum(), (query, key, value))]

    halves, fulls = outcome(torch.bfloat16), outcome(torch.float32)
    torch.testing.assert_close(halves[0].float(), fulls[0], atol=3e-2, rtol=3e-2)
    for half, full in zip(halves, fulls, strict=True):
        assert half.dtype == torch.bfloat16
        assert (half.float() - full).norm() < 0.02 * full.norm()
