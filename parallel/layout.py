"""Tensor-parallel layout: each split dimension is a sequence of indivisible units, and a rank owns a contiguous range of them.

Pure integer arithmetic on sizes, ranks and world sizes.

All splits are over output rows (dimension 0). The inner dimension of a matmul is never split, so each sum over it is computed in full,
on one rank, in a fixed order. This makes results bitwise identical for every world size and keeps the quantization groups along the
inner dimension whole. `model/layers/linear.py` implements the other half of this guarantee.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.errors import LayoutError

TILE_ROWS = 16
"""PyTorch's CPU matmul is bitwise reproducible when its output rows are split at multiples of this."""


def split_evenly(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the range [start, stop) of `count` items that `rank` owns: balanced, with the remainder on the first ranks."""
    base, extra = divmod(count, world_size)
    start = rank * base + min(rank, extra)
    return start, start + base + (1 if rank < extra else 0)


def count_tiled_rows(num_rows: int, unit: int) -> int:
    """Number of rows after padding each unit of `unit` rows (the last may be shorter) to whole tiles."""

    def fill(rows: int) -> int:
        return -(-rows // TILE_ROWS) * TILE_ROWS

    return num_rows // unit * fill(unit) + fill(num_rows % unit)


@dataclass(frozen=True, slots=True)
class Whole:
    """No split: every rank owns all rows."""

    def interval(self, size: int, rank: int, world_size: int) -> tuple[int, int]:
        """Rows [start, stop) of a dimension of `size` rows that `rank` owns."""
        return 0, size

    def num_units(self, size: int) -> int | None:
        """Maximum number of ranks; None if unlimited."""
        return None


@dataclass(frozen=True, slots=True)
class Rows:
    """Contiguous ranges of `unit` rows; the last unit may be shorter."""

    unit: int
    """Rows per indivisible unit."""

    def interval(self, size: int, rank: int, world_size: int) -> tuple[int, int]:
        """Rows [start, stop) of a dimension of `size` rows that `rank` owns."""
        start, stop = split_evenly(self.num_units(size), rank, world_size)
        return min(start * self.unit, size), min(stop * self.unit, size)

    def num_units(self, size: int) -> int:
        """Maximum number of ranks."""
        return -(-size // self.unit)


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of grouped-query attention. A unit is one KV head with its query heads.

    With more ranks than KV heads, each rank holds a copy of one KV head and part of its query heads.
    """

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """KV heads; divides `num_heads`."""
    head_dim: int
    """Rows per head."""
    side: str
    """"query" or "key_value": which of the two this dimension holds."""

    def interval(self, size: int, rank: int, world_size: int) -> tuple[int, int]:
        """Rows [start, stop) of a dimension of `size` rows that `rank` owns."""
        query, key_value = plan_heads(self.num_heads, self.num_kv_heads, rank, world_size)
        start, stop = query if self.side == "query" else key_value
        return start * self.head_dim, stop * self.head_dim

    def num_units(self, size: int) -> int:
        """Maximum number of ranks: a single query head is the smallest part."""
        return self.num_heads


Split = Whole | Rows | Heads


def plan_heads(num_heads: int, num_kv_heads: int, rank: int, world_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the ranges [start, stop) of query heads and KV heads of `rank`.

    Up to `num_kv_heads` ranks, whole groups are distributed over the ranks. Beyond that, ranks are distributed over the groups: the
    ranks of a group split its query heads, and each holds a copy of its KV head.
    """
    group = num_heads // num_kv_heads
    if world_size <= num_kv_heads:
        start, stop = split_evenly(num_kv_heads, rank, world_size)
        return (start * group, stop * group), (start, stop)
    kv_head = 0
    while split_evenly(world_size, kv_head, num_kv_heads)[1] <= rank:
        kv_head += 1
    first_rank, end_rank = split_evenly(world_size, kv_head, num_kv_heads)
    start, stop = split_evenly(group, rank - first_rank, end_rank - first_rank)
    return (kv_head * group + start, kv_head * group + stop), (kv_head, kv_head + 1)


def slices(shape: Sequence[int], split: Split, rank: int, world_size: int) -> tuple[slice, ...]:
    """Return the part of a tensor of `shape` that `rank` owns, one slice per dimension."""
    start, stop = split.interval(shape[0], rank, world_size)
    return (slice(start, stop), *(slice(0, size) for size in shape[1:]))


@dataclass(frozen=True, slots=True)
class Layout:
    """The splits of one decoder model, one per kind of dimension."""

    query: Heads
    """Rows of query projections."""
    key_value: Heads
    """Rows of key and value projections."""
    hidden: Rows
    """Rows of the projections back into the residual stream."""
    intermediate: Rows
    """Rows of the feed-forward intermediate dimension."""
    vocab: Rows
    """Rows of the embedding and the output head."""
    experts: Rows
    """Rows of one expert's intermediate dimension."""
    whole: Whole
    """Replicated tensors: norms."""
    max_world_size: int
    """Largest number of ranks at which every rank owns a unit of every split."""
    reason: str
    """Description of what limits `max_world_size`."""

    def check(self, world_size: int) -> None:
        """Raise LayoutError unless each of `world_size` ranks owns at least one unit of every split."""
        if world_size < 1:
            raise LayoutError(f"the number of ranks is {world_size}, but at least 1 is needed")
        if world_size > self.max_world_size:
            works = "1 works" if self.max_world_size == 1 else f"1 to {self.max_world_size} all work"
            raise LayoutError(f"{world_size} ranks are too many: the model has {self.reason}; {works}")


def plan_layout(
    *,
    hidden: int,
    intermediate: int,
    vocab: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    group: int = 1,
    experts: int | None = None,
) -> Layout:
    """Plan the layout of a decoder with these sizes.

    `experts`: intermediate dimension of an expert, if there are any. `group`: rows that a packed format stores together (1: none); units
    are multiples of it. Units are `TILE_ROWS` rows where that leaves at least one unit per query head, and smaller in tiny models. Raises
    LayoutError when the head counts do not divide.
    """
    if num_heads % num_kv_heads:
        raise LayoutError(f"{num_heads} query heads cannot share {num_kv_heads} key-value heads: it does not divide")

    def rows(size: int) -> Rows:
        unit = min(TILE_ROWS, max(1, size // num_heads))
        return Rows(unit=-(-unit // group) * group)

    splits = {"hidden": (rows(hidden), hidden), "intermediate": (rows(intermediate), intermediate), "vocab": (rows(vocab), vocab)}
    if experts is not None:
        splits["experts"] = (rows(experts), experts)
    limits = {f"{split.num_units(size)} units of {name} rows": split.num_units(size) for name, (split, size) in splits.items()}
    limits[f"{num_heads} query heads"] = num_heads
    reason = min(limits, key=lambda words: (limits[words], words != f"{num_heads} query heads"))
    return Layout(
        query=Heads(num_heads, num_kv_heads, head_dim, "query"),
        key_value=Heads(num_heads, num_kv_heads, head_dim, "key_value"),
        hidden=splits["hidden"][0],
        intermediate=splits["intermediate"][0],
        vocab=splits["vocab"][0],
        experts=splits.get("experts", splits["intermediate"])[0],
        whole=Whole(),
        max_world_size=limits[reason],
        reason=reason,
    )
