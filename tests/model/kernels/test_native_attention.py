"""The kernel of attention: a plain softmax in float64, the cache's own bits, and the same bits for any passes, split and threads."""

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest
import torch

from model.backends.registry import find_backend
from model.kernels.library import find_kernels, kernels_chosen, list_kernels
from model.layers.attention import Attention
from model.layers.batch import Batch, Span
from model.layers.cache import KeyValueCache, KeyValueStore
from model.layers.rotary import Rotary, rotate
from model.spec.config import build_config
from parallel.layout import plan_heads

CPU = torch.device("cpu")
LAYER = 1
KINDS = (None, "token", "channel")
LENGTHS = (150, 37, 66)
"""Of three sequences: over two borders of 64 keys, under one, just behind one."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

pytestmark = pytest.mark.skipif(
    find_kernels() is None,
    reason="no kernels: the package was built without them, or this processor has neither AVX2 nor NEON with dot products",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one attention, and how keys and values are kept."""

    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 24
    block_size: int = 16
    kind: str | None = None
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None


CASES = [
    Case(heads, kv_heads, head_dim, block_size, KINDS[number % 3], dtype)
    for number, (heads, kv_heads, head_dim, block_size) in enumerate(
        [(1, 1, 8, 16), (8, 4, 8, 48), (6, 1, 24, 16), (9, 3, 16, 48), (4, 4, 64, 16), (6, 2, 80, 48), (5, 5, 24, 48), (8, 2, 128, 16)]
    )
    for dtype in TOLERANCE
]
KEPT = [Case(kind=kind, dtype=dtype, block_size=48 if dtype == torch.bfloat16 else 16) for kind in KINDS for dtype in TOLERANCE]


LIMITED = [
    Case(heads, kv_heads, head_dim, block_size, KINDS[number % 3], dtype, window, softcap)
    for number, (heads, kv_heads, head_dim, block_size, window, softcap) in enumerate(
        [(6, 2, 24, 16, 1, None), (8, 2, 64, 48, 7, None), (5, 5, 16, 16, 64, None), (9, 3, 32, 16, 70, 2.0), (4, 1, 128, 16, None, 5.0)]
    )
    for dtype in TOLERANCE
]
"""With windows and limited scores: windows of one token, within a chunk of 64 keys, as long as one, over its borders."""


class Sequences:
    """Sequences whose blocks lie in no order in one store full of NaN, or in two stores."""

    def __init__(self, case: Case, lengths: Sequence[int] = LENGTHS, num_stores: int = 1) -> None:
        self.case, self.fixed = case, make_scales(case) if case.kind == "channel" else None
        counts = [-(-length // case.block_size) for length in lengths]
        blocks = list(range(sum(counts) + 2))
        random.Random(3).shuffle(blocks)
        sizes = (LAYER + 1, len(blocks), case.block_size, case.kv_heads, case.head_dim)
        self.stores = [KeyValueStore(*sizes, case.dtype, CPU, case.kind, for_kernels=True) for _ in range(num_stores)]
        for store in self.stores:
            store.data.fill_(float("nan") if case.kind is None else 77)
            if store.scales is not None:
                store.scales.fill_(float("nan"))
        self.caches = []
        for number, count in enumerate(counts):
            self.caches.append(KeyValueCache(self.stores[number % num_stores], blocks[:count]))
            blocks = blocks[count:]
        hidden = case.heads * case.head_dim
        config = {"hidden_size": hidden, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16, "head_dim": case.head_dim}
        self.rotary = Rotary(build_config({**config, "num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads}))

    def run(self, inputs: Sequence[torch.Tensor], passes: Sequence[Sequence[tuple[int, int]]], threads: int = 1) -> list[torch.Tensor]:
        """What comes out for each sequence [tokens, heads * head_dim]; a pass is the sequences in it and their numbers of new tokens."""
        attention, case = Attention(threads, find_backend("cpu")), self.case
        parts: list[list[torch.Tensor]] = [[] for _ in inputs]
        for one in passes:
            spans = [Span(self.caches[number], [0] * count) for number, count in one]
            batch = Batch(spans, self.rotary, CPU)
            lengths = [(span.cache.length, span.cache.length + len(span.ids)) for span in spans]
            qkv = torch.cat([inputs[number][start:stop] for (number, _), (start, stop) in zip(one, lengths, strict=True)])
            out = attention(qkv, case.heads, case.kv_heads, LAYER, batch, self.fixed, case.window, case.softcap)
            assert out.dtype == case.dtype
            for (number, _), part in zip(one, torch.split(out, [count for _, count in one]), strict=True):
                parts[number].append(part)
            batch.advance()
        return [torch.cat(some) for some in parts]


def make_scales(case: Case) -> torch.Tensor:
    """Stored ones, which cut the largest values."""
    return (torch.rand((2, case.kv_heads, 1, case.head_dim), generator=torch.Generator().manual_seed(5)) + 0.5) * 3 / 127


def make_inputs(case: Case, lengths: Sequence[int] = LENGTHS) -> list[torch.Tensor]:
    width = (case.heads + 2 * case.kv_heads) * case.head_dim
    generator = torch.Generator().manual_seed(width)
    return [(1.5 * torch.randn((length, width), generator=generator)).to(case.dtype) for length in lengths]


def whole(lengths: Sequence[int] = LENGTHS) -> list[list[tuple[int, int]]]:
    return [list(enumerate(lengths))]


def in_chunks(size: int, lengths: Sequence[int] = LENGTHS) -> list[list[tuple[int, int]]]:
    """Every sequence goes on by so many tokens a pass, beside those that are not at their end."""
    passes = [[(number, min(size, length - start)) for number, length in enumerate(lengths) if start < length]
              for start in range(0, max(lengths), size)]  # fmt: skip
    return [one[::-1] if index % 2 else one for index, one in enumerate(passes)]


def read_bits(sequences: Sequences) -> list[torch.Tensor]:
    """What each sequence has in its blocks, scales as well."""
    found = []
    for cache in sequences.caches:
        store = cache.store
        for memory in (store.data[LAYER], *(() if store.scales is None else (store.scales[LAYER].unsqueeze(4),))):
            found.append(cache._join(memory, 0, cache.length).contiguous().view(torch.uint8))
    return found


def hold_equal(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def attend_plainly(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    """query [tokens, heads, head_dim] over keys and values [kv heads, all tokens, head_dim], in float64."""
    tokens, heads, head_dim = query.shape
    wide, narrow = (one.double().repeat_interleave(heads // len(keys), 0) for one in (keys, values))
    scores = query.transpose(0, 1).double() @ wide.transpose(1, 2) / math.sqrt(head_dim)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    later = keys.shape[1] - tokens + 1
    hidden = torch.ones(tokens, keys.shape[1]).triu(later)
    if window is not None:
        hidden += torch.ones(tokens, keys.shape[1]).tril(later - 1 - window)
    scores.masked_fill_(hidden.bool(), -math.inf)
    return (torch.softmax(scores, 2) @ narrow).transpose(0, 1).reshape(tokens, heads * head_dim)


@pytest.mark.parametrize("case", CASES + KEPT + LIMITED, ids=str)
def test_it_attends_as_a_softmax_in_float64_and_keeps_what_a_cache_writes(case: Case) -> None:
    inputs, native, plain = make_inputs(case), Sequences(case), Sequences(case)
    before = [one.clone() for one in inputs]
    found = native.run(inputs, whole())
    for one, cache, out in zip(before, plain.caches, found, strict=True):
        batch = Batch([Span(cache, [0] * len(one))], plain.rotary, CPU)
        split = one.view(len(one), case.heads + 2 * case.kv_heads, case.head_dim)
        turned = rotate(split[:, : case.heads + case.kv_heads], batch.cos, batch.sin)
        cache.append(LAYER, turned[:, case.heads :], split[:, case.heads + case.kv_heads :], plain.fixed)
        expected = attend_plainly(turned[:, : case.heads], *cache.read(LAYER, plain.fixed, len(one)), case.window, case.softcap)
        torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])
    # The whole store: nothing but the places of these tokens has changed.
    for a, b in zip(native.stores, plain.stores, strict=True):
        assert torch.equal(a.data[LAYER].view(torch.uint8), b.data[LAYER].view(torch.uint8))
        assert a.scales is None or (b.scales is not None and torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8)))


@pytest.mark.parametrize("case", CASES[::4] + KEPT + LIMITED[::2], ids=str)
def test_a_prompt_token_by_token_in_parts_and_beside_others_has_the_same_bits(case: Case) -> None:
    inputs, together = make_inputs(case), Sequences(case)
    expected, kept = together.run(inputs, whole()), read_bits(together)
    alone = [[(number, length)] for number, length in enumerate(LENGTHS)]
    for passes in (alone, in_chunks(1), in_chunks(7), in_chunks(64), in_chunks(65)):
        sequences = Sequences(case)
        hold_equal(sequences.run(inputs, passes), expected)
        hold_equal(read_bits(sequences), kept)
    two = Sequences(case, num_stores=2)
    hold_equal(two.run(inputs, in_chunks(7)), expected)
    hold_equal(read_bits(two), kept)


@pytest.mark.parametrize("name", [one.name for one in list_kernels()[1:]])
@pytest.mark.parametrize("case", [Case(8, 2, 64, dtype=torch.bfloat16), Case(9, 3, 24, dtype=torch.bfloat16, window=33)], ids=str)
def test_other_instruction_sets_have_the_same_bits_in_parts_too(case: Case, name: str) -> None:
    inputs = make_inputs(case)
    with kernels_chosen(name):
        expected = Sequences(case).run(inputs, whole())
        for passes in (in_chunks(1), in_chunks(7)):
            hold_equal(Sequences(case).run(inputs, passes), expected)


@pytest.mark.parametrize("case", [*KEPT[::2], Case(9, 3, 16), Case(8, 4, 8, kind="token"), *LIMITED[::4]], ids=str)
def test_every_split_of_the_heads_gives_the_same_bits(case: Case) -> None:
    inputs = make_inputs(case)
    expected = Sequences(case).run(inputs, whole())
    for world_size in (2, 3, case.heads):
        parts: list[list[torch.Tensor]] = []
        for rank in range(world_size):
            (start, stop), (kv_start, kv_stop) = plan_heads(case.heads, case.kv_heads, rank, world_size)
            mine = dataclasses.replace(case, heads=stop - start, kv_heads=kv_stop - kv_start)
            sequences = Sequences(mine)
            if case.kind == "channel":
                sequences.fixed = make_scales(case)[:, kv_start:kv_stop].contiguous()
            keys, values = case.heads, case.heads + case.kv_heads
            heads = [*range(start, stop), *range(keys + kv_start, keys + kv_stop), *range(values + kv_start, values + kv_stop)]
            local = [one.view(len(one), -1, case.head_dim)[:, heads].flatten(1) for one in inputs]
            parts.append(sequences.run(local, whole()))
        hold_equal([torch.cat(some, dim=1) for some in zip(*parts, strict=True)], expected)


@pytest.mark.parametrize("case", [*KEPT[::4], CASES[-1]], ids=str)
def test_every_number_of_threads_gives_the_same_bits(case: Case, keep_torch_threads: None) -> None:
    inputs = make_inputs(case)
    torch.set_num_threads(1)
    expected = Sequences(case).run(inputs, whole())
    for threads in (2, 3):
        torch.set_num_threads(threads)
        hold_equal(Sequences(case).run(inputs, whole(), threads), expected)
        hold_equal(Sequences(case).run(inputs, in_chunks(7), threads), expected)


@pytest.mark.parametrize("name", [one.name for one in list_kernels()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_error_beside_float64_is_the_documented_one(dtype: torch.dtype, name: str) -> None:
    case, length = Case(8, 2, 64, dtype=dtype), 2000
    (inputs,) = make_inputs(case, (length,))
    with kernels_chosen(name):
        kernels, sequences = find_kernels(), Sequences(case, (length,))
        assert kernels is not None
        batch = Batch([Span(sequences.caches[0], [0] * length)], sequences.rotary, CPU)
        (found,) = sequences.run([inputs.clone()], whole((length,)))
    split = inputs.view(length, 12, 64)
    turned = rotate(split[:, :10], batch.cos, batch.sin)
    right = attend_plainly(turned[:, :8], turned[:, 8:].transpose(0, 1), split[:, 10:].transpose(0, 1))
    error, rounding = ((one.double() - right).norm() / right.norm() for one in (found, right.to(dtype)))
    if dtype == torch.float32:
        assert error < 2e-6
    elif kernels.instruction_set.adds_pairs:
        assert (error**2 - rounding**2) ** 0.5 < 1.5e-3
    else:
        assert error < 1.01 * rounding


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_token_that_has_left_the_window_changes_nothing(value: float, dtype: torch.dtype) -> None:
    for window in (1, 33):
        case = Case(6, 2, 24, dtype=dtype, window=window)
        inputs = make_inputs(case)
        expected = Sequences(case).run(inputs, whole())
        for first in (20, 67):
            changed = [one.clone() for one in inputs]
            changed[0][first] = value
            for passes in (whole(), in_chunks(7)):
                found = Sequences(case).run([one.clone() for one in changed], passes)
                kept = [*range(first), *range(first + window, LENGTHS[0])]
                assert torch.equal(found[0][kept], expected[0][kept]), (window, first)
                assert found[0][first : first + window].isnan().any(1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [3e4, math.inf, math.nan])
def test_a_later_token_does_not_change_an_earlier_one(value: float, kind: str | None) -> None:
    case = Case(kind=kind)
    inputs = make_inputs(case)
    expected = Sequences(case).run(inputs, whole())
    for first in (1, 30, 70, 149):
        changed = [one.clone() for one in inputs]
        changed[0][first:] = value
        found = Sequences(case).run(changed, whole())
        assert torch.equal(found[0][:first], expected[0][:first]), first
        hold_equal(found[1:], expected[1:])


@pytest.mark.parametrize("kind", [None, "token"])
@pytest.mark.parametrize("side", ["key", "value"])
def test_nan_in_a_key_or_value_is_seen_by_every_later_token(side: str, kind: str | None) -> None:
    for head_dim in (8, 24, 80):
        case = Case(4, 4, head_dim, kind=kind)
        for place in (0, head_dim - 1):
            (inputs,) = make_inputs(case, (90,))
            inputs.view(90, 3, 4, head_dim)[20, 1 if side == "key" else 2, 1, place] = math.nan
            (found,) = Sequences(case, (90,)).run([inputs], whole((90,)))
            nan = found.view(90, 4, head_dim).isnan()
            assert not nan[:20].any() and not nan[:, [0, 2, 3]].any()
            assert nan[20:, 1, place].all() and (kind is None or nan[20:, 1].all()), (head_dim, place)


def test_values_beyond_a_stored_scale_are_cut_at_its_ends_with_their_sign() -> None:
    case = Case(2, 2, 24, kind="channel")
    inputs, native, plain = make_inputs(case), Sequences(case), Sequences(case)
    native.fixed = plain.fixed = torch.full((2, 2, 1, 24), 1e-12)
    native.run(inputs, whole())
    values = inputs[0][:, 4 * 24 :].view(-1, 2, 24)
    kept = native.caches[0]._join(native.stores[0].data[LAYER], 0, LENGTHS[0])[1].transpose(0, 1)
    assert torch.equal(kept, torch.where(values > 0, 127, -128).to(torch.int8))


def test_more_tokens_than_the_blocks_hold_are_refused() -> None:
    case = Case()
    sequences = Sequences(case)
    with pytest.raises(AssertionError, match="49 tokens need more than 3 blocks of 16"):
        sequences.run(make_inputs(case, (1, 49)), [[(1, 49)]])
