"""Prefetch of weights into the page cache while the ranks of this host start; importing PyTorch leaves the disk idle for a second."""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from model.checkpoint.source import CheckpointSource
from model.spec.config import LlamaConfig
from model.spec.scheme import Scheme
from model.spec.weights import plan_weights
from parallel.file_slices import ask_for_bytes

_MOST_BYTES = 4 << 30
"""More than a fast disk reads while a rank starts; data read too early might be evicted again."""


def prefetch(source: CheckpointSource, config: LlamaConfig, scheme: Scheme, ranks: range, world_size: int) -> threading.Thread:
    """Prefetch what `ranks` read first, in a background thread that need not be joined."""
    places = list(find_places(source, config, scheme, ranks, world_size))
    thread = threading.Thread(target=_ask, args=(places,), daemon=True)
    thread.start()
    return thread


def find_places(
    source: CheckpointSource, config: LlamaConfig, scheme: Scheme, ranks: range, world_size: int
) -> Iterator[tuple[Path, int, int]]:
    """Yield (file, first byte, bytes) for the rows of `ranks` that need no conversion, roughly in reading order."""
    left = _MOST_BYTES
    for name, spec in plan_weights(config, scheme).items():
        for rank in ranks:
            row, stop = spec.rows(rank, world_size)
            for part in source.locate_rows(name, row, stop):
                end = min(stop, part.stop)
                if part.start <= row < end:
                    length = min(left, (end - row) * part.row_bytes)
                    yield part.path, part.offset_bytes + (row - part.start) * part.row_bytes, length
                    row, left = end, left - length
                if not left:
                    return


def _ask(places: list[tuple[Path, int, int]]) -> None:
    descriptors: dict[Path, int] = {}
    with suppress(OSError):  # the reader of the file will report its errors
        for path, offset, length in places:
            if path not in descriptors:
                descriptors[path] = os.open(path, os.O_RDONLY)
            ask_for_bytes(descriptors[path], offset, length)
    for descriptor in descriptors.values():
        os.close(descriptor)
