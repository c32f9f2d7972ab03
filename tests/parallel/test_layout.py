"""Who owns what, for random shapes and numbers of ranks: every row once, no unit cut, as even as it goes."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import LayoutError
from parallel.layout import Heads, Layout, Rows, Whole, plan_heads, plan_layout, slices, split_evenly

SIZES = st.integers(1, 4000)
RANKS = st.integers(1, 40)
QUICK = settings(max_examples=60, deadline=None)  # a busy machine is no failure


@st.composite
def head_counts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(query heads, key-value heads, ranks that fit)."""
    kv_heads = draw(st.integers(1, 12))
    heads = kv_heads * draw(st.integers(1, 9))
    return heads, kv_heads, draw(st.integers(1, heads))


def plan(heads: int, kv_heads: int, hidden: int, intermediate: int, vocab: int, group: int = 1) -> Layout:
    return plan_layout(
        hidden=hidden, intermediate=intermediate, vocab=vocab, num_heads=heads, num_kv_heads=kv_heads, head_dim=8, group=group
    )


@QUICK
@given(SIZES, RANKS)
def test_things_are_dealt_out_once_in_order_and_as_evenly_as_it_goes(count: int, world_size: int) -> None:
    runs = [split_evenly(count, rank, world_size) for rank in range(world_size)]
    assert [i for start, stop in runs for i in range(start, stop)] == list(range(count))
    lengths = [stop - start for start, stop in runs]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@QUICK
@given(SIZES, st.integers(1, 70), RANKS)
def test_rows_cover_every_row_once_and_cut_no_unit(size: int, unit: int, world_size: int) -> None:
    runs = [Rows(unit).interval(size, rank, world_size) for rank in range(world_size)]
    assert runs[0][0] == 0 and runs[-1][1] == size
    assert all(left[1] == right[0] for left, right in pairwise(runs))
    assert all(stop % unit == 0 for _, stop in runs[:-1] if stop != size)
    units = [-(-(stop - start) // unit) for start, stop in runs]
    assert max(units) - min(units) <= 1
    assert (min(units) > 0) == (world_size <= Rows(unit).num_units(size))


@QUICK
@given(head_counts())
def test_query_heads_are_covered_once_in_order_and_no_rank_is_without(counts: tuple[int, int, int]) -> None:
    heads, kv_heads, world_size = counts
    queries = [plan_heads(heads, kv_heads, rank, world_size)[0] for rank in range(world_size)]
    owned = [head for start, stop in queries for head in range(start, stop)]
    assert owned == list(range(heads))
    # A group may have a rank too many only where there are more ranks than key-value heads; each still has a head.
    assert all(start < stop for start, stop in queries)


@QUICK
@given(head_counts())
def test_a_rank_has_exactly_the_key_value_heads_of_its_query_heads(counts: tuple[int, int, int]) -> None:
    heads, kv_heads, world_size = counts
    group = heads // kv_heads
    for rank in range(world_size):
        (q_start, q_stop), (kv_start, kv_stop) = plan_heads(heads, kv_heads, rank, world_size)
        assert {head // group for head in range(q_start, q_stop)} == set(range(kv_start, kv_stop))
        if world_size <= kv_heads:
            assert (q_start, q_stop) == (kv_start * group, kv_stop * group), "a group is cut"
        else:
            assert kv_stop - kv_start == 1


@QUICK
@given(head_counts())
def test_heads_are_as_even_as_groups_allow(counts: tuple[int, int, int]) -> None:
    heads, kv_heads, world_size = counts
    plans = [plan_heads(heads, kv_heads, rank, world_size) for rank in range(world_size)]
    if world_size <= kv_heads:
        sizes = [kv_stop - kv_start for _, (kv_start, kv_stop) in plans]
        assert max(sizes) - min(sizes) <= 1
        return
    ranks_of = [[q_stop - q_start for (q_start, q_stop), kv in plans if kv[0] == head] for head in range(kv_heads)]
    assert max(map(len, ranks_of)) - min(map(len, ranks_of)) <= 1
    assert all(max(sizes) - min(sizes) <= 1 for sizes in ranks_of)


def test_nine_heads_over_three_key_value_heads_are_six_and_three_on_two_ranks() -> None:
    assert plan_heads(9, 3, 0, 2) == ((0, 6), (0, 2))
    assert plan_heads(9, 3, 1, 2) == ((6, 9), (2, 3))


def test_eight_ranks_of_four_key_value_heads_keep_a_copy_each_of_one() -> None:
    assert [plan_heads(8, 4, rank, 8) for rank in range(8)] == [((rank, rank + 1), (rank // 2, rank // 2 + 1)) for rank in range(8)]


@QUICK
@given(head_counts(), st.integers(1, 130))
def test_slices_of_heads_are_whole_heads(counts: tuple[int, int, int], head_dim: int) -> None:
    heads, kv_heads, world_size = counts
    for side, number, part in (("query", heads, 0), ("key_value", kv_heads, 1)):
        split = Heads(heads, kv_heads, head_dim, side)
        for rank in range(world_size):
            start, stop = plan_heads(heads, kv_heads, rank, world_size)[part]
            expected = (slice(start * head_dim, stop * head_dim), slice(0, 5))
            assert slices((number * head_dim, 5), split, rank, world_size) == expected


@QUICK
@given(SIZES, RANKS)
def test_what_is_whole_is_whole_on_every_rank(size: int, world_size: int) -> None:
    for rank in range(world_size):
        assert slices((size, 3), Whole(), rank, world_size) == (slice(0, size), slice(0, 3))
    assert Whole().num_units(size) is None


@QUICK
@given(head_counts(), SIZES, SIZES, SIZES, st.sampled_from([1, 4, 8, 32, 128]))
def test_every_rank_that_fits_has_rows_of_everything_and_groups_stay_whole(
    counts: tuple[int, int, int], hidden: int, intermediate: int, vocab: int, group: int
) -> None:
    heads, kv_heads, _ = counts
    layout = plan(heads, kv_heads, hidden, intermediate, vocab, group)
    assert 1 <= layout.max_world_size <= heads
    for world_size in {1, (layout.max_world_size + 1) // 2, layout.max_world_size}:
        layout.check(world_size)
        for split, size in ((layout.hidden, hidden), (layout.intermediate, intermediate), (layout.vocab, vocab)):
            assert split.unit % group == 0
            runs = [split.interval(size, rank, world_size) for rank in range(world_size)]
            assert [row for run in runs for row in range(*run)] == list(range(size))
            assert all(start < stop for start, stop in runs)
            assert all(stop % group == 0 for _, stop in runs[:-1])


@QUICK
@given(head_counts(), SIZES, SIZES, SIZES)
def test_large_models_split_at_tiles_and_small_ones_still_serve_every_head(
    counts: tuple[int, int, int], hidden: int, intermediate: int, vocab: int
) -> None:
    heads, kv_heads, _ = counts
    layout = plan(heads, kv_heads, hidden, intermediate, vocab)
    for split, size in ((layout.hidden, hidden), (layout.intermediate, intermediate), (layout.vocab, vocab)):
        assert split.unit == 16 if size >= 16 * heads else split.unit < 16
        assert split.num_units(size) >= min(heads, size)
    assert layout.max_world_size == min(heads, hidden, intermediate, vocab)


@QUICK
@given(head_counts(), st.integers(1, 500))
def test_too_many_ranks_are_refused_with_both_numbers_and_those_that_work(counts: tuple[int, int, int], extra: int) -> None:
    heads, kv_heads, _ = counts
    layout = plan(heads, kv_heads, 4096, 4096, 4096)
    works = "1 works" if heads == 1 else f"1 to {heads} all work"
    with pytest.raises(LayoutError, match=f"^{heads + extra} ranks are too many: the model has {heads} query heads; {works}$"):
        layout.check(heads + extra)


def test_a_limit_that_is_not_the_heads_is_named() -> None:
    layout = plan(8, 8, 64, 64, 256, group=32)
    with pytest.raises(LayoutError, match=re.escape("3 ranks are too many: the model has 2 units of hidden rows; 1 to 2 all work")):
        layout.check(3)


@pytest.mark.parametrize("world_size", [0, -1])
def test_fewer_than_one_rank_is_refused(world_size: int) -> None:
    with pytest.raises(LayoutError, match=f"the number of ranks is {world_size}, but at least 1 is needed"):
        plan(8, 8, 64, 64, 64).check(world_size)


def test_heads_that_do_not_divide_are_refused_with_both_numbers() -> None:
    with pytest.raises(LayoutError, match="9 query heads cannot share 4 key-value heads"):
        plan(9, 4, 64, 64, 64)
