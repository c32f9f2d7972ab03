"""The input of one forward pass: new tokens of several sequences, and their positions, which every layer needs."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.backends.paged import PagedRows, place_rows
from model.layers.cache import Cache, KeyValueCache, KeyValueStore
from model.layers.rotary import Rotary


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence."""

    cache: Cache
    """The sequence's KV cache; a forward pass extends it."""
    ids: Sequence[int]
    """The new tokens."""
    adapter: int = 0
    """Number of the sequence's LoRA adapter, from 1; 0: none."""


@dataclass(frozen=True, slots=True)
class StoreRows:
    """Adjacent spans whose caches are in the same store, in the form that the kernels take."""

    rows: slice
    """Their tokens within the pass."""
    store: KeyValueStore
    """The store of their KV caches."""
    places: torch.Tensor
    """int64 [spans, 3]: first token (relative to `rows`), number of earlier tokens of the sequence, index of its
    first block in `blocks`.
    """
    blocks: torch.Tensor
    """int64: block numbers of all these sequences, concatenated."""


class Batch:
    """The spans of one pass."""

    def __init__(self, spans: Sequence[Span], rotary: Rotary, device: torch.device, local_rotary: Rotary | None = None) -> None:
        """`local_rotary`: of layers with a window, if it differs."""
        self.spans = spans
        self.num_tokens = sum(len(span.ids) for span in spans)
        positions = [p for span in spans for p in range(span.cache.length, span.cache.length + len(span.ids))]
        self.cos, self.sin = rotary.angles(positions, device)
        self._local = None if local_rotary is None else local_rotary.angles(positions, device)
        self.adapted = _group_adapted(spans)
        """Number of each adapter in use, with the rows of its tokens within the pass."""
        self._stores: list[StoreRows] | None = None
        self.lies_in_stores = all(isinstance(span.cache, KeyValueCache) and span.cache.store.for_kernels for span in spans)
        """Whether native kernels can read and write all caches (see `join_stores`); else they go by the caches' own methods."""
        self.is_paged = all(isinstance(span.cache, KeyValueCache) and not span.cache.store.for_kernels for span in spans)
        """Whether a device's own attention can read and write all caches (see `place_part`)."""
        self._device, self._paged = device, dict[int, PagedRows]()

    def angles(self, *, local: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and signed sin for a layer with a window (`local`), or without."""
        return self._local if local and self._local is not None else (self.cos, self.sin)

    def advance(self) -> None:
        """Extend the caches after the new tokens have gone through every layer."""
        for span in self.spans:
            span.cache.length += len(span.ids)

    def join_stores(self) -> list[StoreRows]:
        """Group the spans by store. Computed once, since it is the same for every layer."""
        if self._stores is None:
            self._stores, first = [], 0
            for store, group in itertools.groupby(self.spans, key=lambda span: _find_cache(span).store):
                joined = _join(list(group), store, first)
                self._stores.append(joined)
                first = joined.rows.stop
        return self._stores

    def place_part(self, part: StoreRows, tile_tokens: int) -> PagedRows:
        """Return the rows of one of `join_stores` for the device's attention. Computed once, since they are the same for every layer."""
        found = self._paged.get(part.rows.start)
        if found is None:
            sequences, row = [], 0
            for span in self.spans:
                if part.rows.start <= row < part.rows.stop:
                    sequences.append((span.cache.length, len(span.ids), _find_cache(span).blocks))
                row += len(span.ids)
            found = self._paged[part.rows.start] = place_rows(sequences, tile_tokens, part.store.block_size, self._device)
        return found


def _group_adapted(spans: Sequence[Span]) -> list[tuple[int, slice | torch.Tensor]]:
    if not any(span.adapter for span in spans):
        return []
    owners = [span.adapter for span in spans for _ in span.ids]
    groups: list[tuple[int, slice | torch.Tensor]] = []
    for adapter in sorted({*owners} - {0}):
        rows = [row for row, owner in enumerate(owners) if owner == adapter]
        is_run = rows[-1] - rows[0] + 1 == len(rows)
        groups.append((adapter, slice(rows[0], rows[-1] + 1) if is_run else torch.tensor(rows)))
    return groups


def _find_cache(span: Span) -> KeyValueCache:
    assert isinstance(span.cache, KeyValueCache), type(span.cache)
    return span.cache


def _join(spans: Sequence[Span], store: KeyValueStore, first: int) -> StoreRows:
    places: list[tuple[int, int, int]] = []
    blocks: list[int] = []
    token = 0
    for span in spans:
        cache = _find_cache(span)
        end = cache.length + len(span.ids)
        assert end <= len(cache.blocks) * store.block_size, f"{end} tokens need more than {len(cache.blocks)} blocks of {store.block_size}"
        places.append((token, cache.length, len(blocks)))
        blocks.extend(cache.blocks)
        token += len(span.ids)
    return StoreRows(slice(first, first + token), store, torch.tensor(places), torch.tensor(blocks))
