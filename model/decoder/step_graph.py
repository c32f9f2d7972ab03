"""Decoding steps as graphs of the device: recorded once per size, then replayed by one call.

A graph works on fixed buffers, so a step is padded to one of a few numbers of rows and to a power of two of blocks. Everything that
changes from step to step goes to the device in one block of integers.
"""

from collections.abc import Callable, Sequence

import torch

from model.backends.interface import StepBlock, StepRecorder
from model.backends.paged import CHUNK_TOKENS, SPLIT_TOKENS
from model.layers.batch import Span
from model.layers.cache import KeyValueCache
from model.layers.rotary import Rotary
from model.layers.step_batch import StepBatch, count_integers, split_block

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows of a graph."""


class StepGraphs:
    """The graphs of one model. Its layers must not wait for the device."""

    def __init__(
        self,
        recorder: StepRecorder,
        rotaries: Sequence[Rotary],
        head_dim: int,
        device: torch.device,
        run: Callable[[StepBatch], torch.Tensor],
    ) -> None:
        """`run`: embeddings, all layers and the last norm for a batch: [rows, H]."""
        self._recorder, self._rotaries, self._head_dim, self._device, self._run = recorder, rotaries, head_dim, device, run
        self._graphs: dict[tuple[int, int, int], tuple[StepBlock, Callable[[], torch.Tensor]]] = {}

    def run(self, spans: Sequence[Span]) -> torch.Tensor | None:
        """Return the hidden states [T, H] of a decoding step; None for other passes. The next step overwrites the result."""
        caches = [span.cache for span in spans]
        stores = {id(cache.store): cache.store for cache in caches if isinstance(cache, KeyValueCache)}
        tokens = sum(len(span.ids) for span in spans)
        longest, adapted = max(len(span.ids) for span in spans), any(span.adapter for span in spans)
        if (
            len(stores) != 1
            or not all(isinstance(cache, KeyValueCache) for cache in caches)
            or longest > SPLIT_TOKENS
            or tokens > ROWS[-1]
            or adapted
        ):
            return None
        (store,) = stores.values()
        rows = next(size for size in ROWS if size >= tokens)
        least = max(-(-(span.cache.length + len(span.ids)) // store.block_size) for span in spans)
        blocks = max(CHUNK_TOKENS // store.block_size, 1 << (least - 1).bit_length())
        key = (id(store), rows, blocks)
        found = self._graphs.get(key)
        sizes = (rows, blocks, self._head_dim, len(self._rotaries))
        block = self._recorder.open_block(count_integers(*sizes), self._device) if found is None else found[0]
        block.wait()
        self._fill(block.values, spans, *sizes[:2])
        block.send()
        if found is None:
            batch = StepBatch(block.on_device, rows, blocks, store, self._head_dim, len(self._rotaries))
            found = self._graphs[key] = block, self._recorder.capture(lambda: self._run(batch))
        hidden = found[1]()
        for span in spans:
            span.cache.length += len(span.ids)
        return hidden[:tokens]

    def _fill(self, values: torch.Tensor, spans: Sequence[Span], rows: int, blocks: int) -> None:
        parts, angles = split_block(values, rows, blocks, self._head_dim, len(self._rotaries))
        values.zero_()
        places = [(span.cache.length + place, owner) for owner, span in enumerate(spans) for place in range(len(span.ids))]
        used = len(places)
        parts[0][:used] = torch.tensor([token for span in spans for token in span.ids], dtype=torch.int32)
        numbers, tiles = parts[1].view(rows, 2), parts[2].view(rows, 4)
        numbers[:, 0] = -1  # padding
        numbers[:used] = torch.tensor(places, dtype=torch.int32)
        tiles[:, 0], tiles[:, 1], tiles[:, 2:] = torch.arange(rows), 1, numbers
        table = parts[3].view(rows, blocks)
        for owner, span in enumerate(spans):
            assert isinstance(span.cache, KeyValueCache)
            mine = span.cache.blocks[:blocks]
            end = span.cache.length + len(span.ids)
            assert end <= len(mine) * span.cache.store.block_size, f"{end} tokens need more than {len(mine)} blocks"
            table[owner, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        for rotary, (cos, sin) in zip(self._rotaries, angles, strict=True):
            cos[:used], sin[:used] = rotary.angles([position for position, _ in places], torch.device("cpu"))
