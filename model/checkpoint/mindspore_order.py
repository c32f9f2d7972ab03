"""Samples the fused weights of a MindSpore checkpoint for `fused_order.py`: a few rows of a few layers, at most SAMPLE_BYTES.

Depends on the names of fused weights and their scales, and on where ranks' parts lie.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from model.checkpoint.fused_order import RowNorms
from model.checkpoint.mindspore_encryption import EncryptedFile
from model.checkpoint.mindspore_header import ELEMENT_TYPES, StoredTensor
from model.checkpoint.mindspore_rows import RowRuns, build_block, decode_dequant_scale
from parallel.file_slices import FileReader

SAMPLE_BYTES = 32 << 20
"""Bytes that are read at most for one kind of fused weight."""
_MAX_LAYERS, _MAX_RANKS, _MAX_ROWS, _MIN_ROWS = 8, 8, 4096, 256
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "weight": (),
    "_handler.weight": ("_weight_quantizer.scale", "_output_quantizer.scale"),
    "_layer.weight": ("_layer.matmul.t_scale", "_layer.matmul.weight_scale", "_layer.matmul.dequant_scale"),
}
"""What follows the name of a fused weight, float or integer, and of its scales."""

Parts = Mapping[str, Sequence[tuple[Path, StoredTensor]]]
"""By its name in the files, the parts of each tensor in rank order."""


def sample_fused(
    parts: Parts, fused: str, heads: tuple[int, int] | None, encrypted: Mapping[Path, EncryptedFile], reader: FileReader
) -> list[RowNorms]:
    """Row norms of the parts of `attention.w_qkv` (`heads` are those of a part) or `feed_forward.w_gate_hidden`, spread over the layers."""
    found = list(_find_tensors(parts, fused))
    layers = [found[number * len(found) // min(len(found), _MAX_LAYERS)] for number in range(min(len(found), _MAX_LAYERS))]
    units = [(weight, scale, rank) for weight, scale in layers for rank in range(min(len(parts[weight]), _MAX_RANKS))]
    return [
        _sample(parts[weight][rank], parts[scale][rank] if scale else None, heads, SAMPLE_BYTES // len(units), encrypted, reader)
        for weight, scale, rank in units
    ]


def _find_tensors(parts: Parts, fused: str) -> Iterator[tuple[str, str | None]]:
    """Names of the weights of a kind, and of their scales."""
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
    # Pairs, for what alternates; an odd distance, so that all places of a head are met.
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
