"""The row order of a MindSpore checkpoint's fused weights, given by the user or detected from sampled rows with `fused_order.py`.

Reads a few rows of a few layers, at most SAMPLE_BYTES of each kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from model.checkpoint.fused_order import AUTO, ORDERS, OrderEvidence, RowNorms, weigh_orders
from model.checkpoint.mindspore_encryption import EncryptedFile
from model.checkpoint.mindspore_header import ELEMENT_TYPES, StoredTensor
from model.checkpoint.mindspore_names import FUSED_NAMES
from model.checkpoint.mindspore_rows import RowRuns, build_block, decode_dequant_scale
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader
from parallel.lazy_torch import torch

_QKV, _GATE_HIDDEN = FUSED_NAMES
SAMPLE_BYTES = 32 << 20
"""Maximum bytes read for one kind of fused weight."""
_MAX_LAYERS, _MAX_RANKS, _MAX_ROWS, _MIN_ROWS = 8, 8, 4096, 256
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "weight": (),
    "_handler.weight": ("_weight_quantizer.scale", "_output_quantizer.scale"),
    "_layer.weight": ("_layer.matmul.t_scale", "_layer.matmul.weight_scale", "_layer.matmul.dequant_scale"),
}
"""Suffixes after the name of a fused weight (float or integer) and of its scales."""

Parts = Mapping[str, Sequence[tuple[Path, StoredTensor]]]
"""By stored name, the parts of each tensor in rank order."""


class FusedRows:
    """The fused weights of one checkpoint, with their order determined."""

    def __init__(
        self,
        path: Path,
        parts: Parts,
        find_heads: Callable[[], tuple[int, int]],
        encrypted: Mapping[Path, EncryptedFile],
        given: str | None,
    ) -> None:
        """`find_heads` returns the query heads and KV heads of a part; `given` is an entry of ORDERS, or AUTO or None to detect it.

        Raises CheckpointError when the rows are inconclusive and no order is given, and the errors of `find_heads`.
        """
        self._path, self._parts, self._find_heads, self._encrypted = path, parts, find_heads, encrypted
        self._evidence: OrderEvidence | None = None
        self._is_given = given not in (None, AUTO)
        self.order = given if self._is_given else None
        """An entry of ORDERS; None if there are no fused weights or both orders are the same."""
        found = [name for name in FUSED_NAMES if any(f".{name}." in one for one in parts)]
        if not found or (found == [_QKV] and find_heads()[1] == 1):
            self.order = None
        elif not self._is_given:
            self.order = self._find_order()

    def list_notes(self) -> list[str]:
        """Report which order was detected, or warn if the given one contradicts the weights."""
        if self.order is None:
            return []
        other = ORDERS[1 - ORDERS.index(self.order)]
        evidence = self.examine()
        assert evidence is not None
        if not self._is_given:
            return [
                f"{self._path}: the fused weights are in the row order of MindFormers {self.order}, detected: {evidence.describe()}; "
                f"--fused-order {other} overrides it"
            ]
        if evidence.order == other:
            return [
                f"warning: {self._path} is read in the row order of MindFormers {self.order}, as set, but its weights indicate {other}: "
                f"{evidence.describe()}; check --fused-order"
            ]
        return []

    def examine(self) -> OrderEvidence | None:
        """Return the evidence of the rows on the order; None if there is none."""
        if self._evidence is None and self.order is not None:
            self._evidence = self._weigh()[0]
        return self._evidence

    def _find_order(self) -> str:
        """Return the order indicated by w_gate_hidden. The weaker evidence of w_qkv can only object, and decides if it is the only
        evidence.
        """
        self._evidence, cross = self._weigh()
        order = self._evidence.order
        if order is None:
            raise CheckpointError(
                f"{self._path} holds fused weights (qkv_concat: True) whose row order cannot be told: {self._evidence.describe()}; give "
                "--fused-order 1.3 for files of MindFormers up to 1.3, 1.4 for later ones"
            )
        if cross.order not in (None, order):
            raise CheckpointError(
                f"{self._path} holds fused weights that contradict each other: w_gate_hidden is in MindFormers {order}'s row order "
                f"({self._evidence.describe()}), w_qkv in {cross.order}'s ({cross.describe()}); give --fused-order 1.3 or 1.4"
            )
        return order

    def _weigh(self) -> tuple[OrderEvidence, OrderEvidence]:
        """Return the deciding evidence, and that of w_qkv."""
        reader = FileReader()
        try:
            main = weigh_orders(sample_fused(self._parts, _GATE_HIDDEN, None, self._encrypted, reader))
            has_qkv = any(f".{_QKV}." in name for name in self._parts)
            cross = weigh_orders(sample_fused(self._parts, _QKV, self._find_heads(), self._encrypted, reader) if has_qkv else [])
        finally:
            reader.close()
        return (main if main.num_tensors else cross), cross


def sample_fused(
    parts: Parts, fused: str, heads: tuple[int, int] | None, encrypted: Mapping[Path, EncryptedFile], reader: FileReader
) -> list[RowNorms]:
    """Return row norms of the parts of `attention.w_qkv` (`heads`: those of a part) or `feed_forward.w_gate_hidden`, over spread-out
    layers.
    """
    found = list(_find_tensors(parts, fused))
    layers = [found[number * len(found) // min(len(found), _MAX_LAYERS)] for number in range(min(len(found), _MAX_LAYERS))]
    units = [(weight, scale, rank) for weight, scale in layers for rank in range(min(len(parts[weight]), _MAX_RANKS))]
    return [
        _sample(parts[weight][rank], parts[scale][rank] if scale else None, heads, SAMPLE_BYTES // len(units), encrypted, reader)
        for weight, scale, rank in units
    ]


def _find_tensors(parts: Parts, fused: str) -> Iterator[tuple[str, str | None]]:
    """Return the names of the weights of a kind, and of their scales."""
    for name in parts:
        match = re.fullmatch(rf"(.*\.{re.escape(fused)}\.)(.*)", name)
        if match is None or match[2] not in _SUFFIXES:
            continue
        scales = _SUFFIXES[match[2]]
        scale = next((match[1] + rest for rest in scales if match[1] + rest in parts), None)
        if scale is not None or not scales:
            yield name, scale


def _sample(
    weight: tuple[Path, StoredTensor],
    scale: tuple[Path, StoredTensor] | None,
    heads: tuple[int, int] | None,
    max_bytes: int,
    encrypted: Mapping[Path, EncryptedFile],
    reader: FileReader,
) -> RowNorms:
    num_rows, columns = weight[1].dims[0], weight[1].dims[1] if len(weight[1].dims) > 1 else 1
    row_bytes = max(1, columns * ELEMENT_TYPES[weight[1].tensor_type].itemsize)
    wanted = min(_MAX_ROWS, max(_MIN_ROWS, max_bytes // row_bytes))
    # Sample pairs of rows, for alternating layouts, at an odd distance, to reach all positions within a head.
    take = 2 if heads is None else 1
    step = max(1, -(-num_rows // wanted)) | 1
    runs = RowRuns(0, take, step * take, max(0, (num_rows - take) // (step * take) + 1)) if num_rows >= take else RowRuns(0, num_rows)
    rows = (torch.arange(runs.count)[:, None] * runs.period + torch.arange(runs.take)).flatten()
    block = build_block([(*weight, runs)], encrypted)
    norms = block.read(reader, 0, block.shape[0]).float().reshape(len(rows), -1).norm(dim=1)
    if scale is not None and scale[1].dims[:1] == (num_rows,):
        scales = decode_dequant_scale(build_block([(*scale, RowRuns(0, num_rows))], encrypted).read(reader, 0, num_rows))
        norms = norms * scales.float().flatten()[rows].abs()
    return RowNorms(rows, norms, num_rows, heads)
