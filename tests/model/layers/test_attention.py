"""Attention against a plain softmax, and the same bits for any split of the heads and any threads."""

import itertools
import math

import pytest
import torch

from model.backends.registry import find_backend
from model.layers.attention import Attention
from parallel.layout import plan_heads

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = ((1, 1), (1, 37), (5, 5), (40, 40), (3, 20), (19, 20))  # new tokens, all tokens


def build(num_threads: int) -> Attention:
    return Attention(num_threads, find_backend("cpu"))


def make(tokens: int, all_tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(query [tokens, heads, head_dim], keys, values [kv heads, all tokens, head_dim])."""
    generator = torch.Generator().manual_seed(tokens * 1000 + all_tokens)
    shapes = ((tokens, heads, head_dim), (kv_heads, all_tokens, head_dim), (kv_heads, all_tokens, head_dim))
    return tuple((2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes)


def attend_plainly(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One query of one head after the other, in float64."""
    tokens, heads, head_dim = query.shape
    group, past = heads // keys.shape[0], keys.shape[1] - tokens
    out = torch.empty((tokens, heads, head_dim), dtype=torch.float64)
    for token in range(tokens):
        for head in range(heads):
            seen = slice(past + token + 1)
            scores = keys[head // group, seen].double() @ query[token, head].double() / math.sqrt(head_dim)
            out[token, head] = torch.softmax(scores, 0) @ values[head // group, seen].double()
    return out.reshape(tokens, heads * head_dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 16), (8, 4, 8), (4, 4, 64), (6, 1, 24)])
def test_attention_is_a_causal_softmax_over_the_head_of_the_group(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    for tokens, all_tokens in TOKENS:
        inputs = make(tokens, all_tokens, heads, kv_heads, head_dim, dtype)
        found, expected = build(1).attend(*inputs), attend_plainly(*inputs)
        assert found.dtype == dtype and found.shape == expected.shape
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 16), (8, 4, 8)])
def test_every_split_of_the_heads_gives_the_same_bits(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    for tokens, all_tokens in TOKENS:
        query, keys, values = make(tokens, all_tokens, heads, kv_heads, head_dim, dtype)
        whole = build(1).attend(query, keys, values)
        for world_size in range(2, heads + 1):
            parts = []
            for rank in range(world_size):
                (start, stop), (kv_start, kv_stop) = plan_heads(heads, kv_heads, rank, world_size)
                parts.append(build(1).attend(query[:, start:stop], keys[kv_start:kv_stop], values[kv_start:kv_stop]))
            assert torch.equal(torch.cat(parts, dim=1), whole), (tokens, all_tokens, world_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_threads_gives_the_same_bits(dtype: torch.dtype, keep_torch_threads: None) -> None:
    for tokens, all_tokens in ((1, 37), (1, 4000), (60, 60), (50, 90)):  # with work for one thread and for several
        inputs = make(tokens, all_tokens, 9, 3, 32, dtype)
        torch.set_num_threads(1)
        expected = build(1).attend(*inputs)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(build(threads).attend(*inputs), expected), (tokens, all_tokens, threads)
            assert torch.get_num_threads() == threads


def test_a_prompt_in_parts_gives_what_it_gives_in_one() -> None:
    query, keys, values = make(30, 30, 9, 3, 16, torch.float32)
    whole = build(1).attend(query, keys, values)
    cuts = [0, 1, 2, 13, 30]
    parts = [build(1).attend(query[a:b], keys[:, :b], values[:, :b]) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_a_later_token_does_not_change_an_earlier_one() -> None:
    query, keys, values = make(12, 12, 4, 2, 16, torch.float32)
    before = build(1).attend(query, keys, values)
    keys[:, 7:], values[:, 7:], query[7:] = 50, -50, 3
    after = build(1).attend(query, keys, values)
    assert torch.equal(after[:7], before[:7]) and not torch.equal(after[7:], before[7:])
