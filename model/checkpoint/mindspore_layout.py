"""Arrange the ranks of a MindSpore checkpoint: model-parallel slices, data-parallel replicas, pipeline stages, split files.

MindFormers numbers ranks by stage, then replica, then slice. Depends on names, shapes and a few bytes of each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint.mindspore_encryption import EncryptedFile
from model.checkpoint.mindspore_folder import check_single
from model.checkpoint.mindspore_header import ELEMENT_TYPES, StoredTensor
from model.checkpoint.mindspore_names import LEFTOVERS, split_name
from model.checkpoint.mindspore_names import ROW_PARALLEL as _ROW_PARALLEL
from model.checkpoint.mindspore_rows import RowRuns, build_block
from model.checkpoint.mindspore_shards import count_shards, is_sharded, join_shards
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader
from parallel.lazy_torch import torch

_COMPARED_BYTES = 4096
"""Bytes compared at each end of a tensor that two ranks should share."""

_NORMS = ("attention_norm.weight", "ffn_norm.weight", "norm_out.weight")
_VOCABULARY = ("tok_embeddings.embedding_weight", "lm_head.weight")
_SIZES = ("hidden_size", "num_attention_heads", "head_dim", "intermediate_size")

Header = Mapping[str, StoredTensor]
Part = tuple[Path, StoredTensor]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The parts that make up the model."""

    parts: Mapping[str, Sequence[Part]]
    """By name, the slices of each tensor in rank order; a replicated tensor is repeated `num_slices` times."""
    num_slices: int
    """Number of ranks that share each tensor: `model_parallel` of the run that wrote the checkpoint."""


class _Rank:
    """Contents of one rank, from one or several files."""

    def __init__(self, number: int, files: Sequence[Path], headers: Sequence[Header]) -> None:
        check_single(list(files), [_weights_of(header) for header in headers])
        self.number = number
        self.parts: dict[str, Part] = {}
        for file, header in zip(files, headers, strict=True):
            for name, stored in header.items():
                self.parts.setdefault(name, (file, stored))
        self.names = {name for header in headers for name in _weights_of(header)}
        self.file = files[0]


def arrange_ranks(
    path: Path,
    files: Sequence[Sequence[Path]],
    headers: Mapping[Path, Header],
    config: Mapping[str, Any],
    encrypted: Mapping[Path, EncryptedFile],
    reader: FileReader,
) -> Arrangement:
    """Identify slices, replicas and stages. `files`: those of each rank.

    Raises CheckpointError for ranks that do not belong to the same model, and for missing slices.
    """
    ranks = [_Rank(number, one, [headers[file] for file in one]) for number, one in enumerate(files)]
    stages = _split_stages(path, ranks)
    if stages is None:
        return _join_by_name(ranks, config, encrypted, reader)
    parts: dict[str, Sequence[Part]] = {}
    num_slices = 0
    for ranks_of_stage in stages:
        stage = _merge_shards(ranks_of_stage, config, encrypted, reader)
        slices = _find_num_slices(path, stage, config)
        if num_slices and slices != num_slices:
            raise CheckpointError(
                f"{path}: rank_{stage[0].number} holds 1/{slices} of each tensor, but the stage before it 1/{num_slices}: "
                "give the folders of one run"
            )
        num_slices = slices
        for first in range(0, len(stage), slices):
            _check_slices(stage[first : first + slices])
            _check_copies(stage[first : first + slices], encrypted, reader)
            if first:
                _check_replica(stage[:slices], stage[first : first + slices], encrypted, reader)
        for name in stage[0].parts:
            found = [rank.parts[name] for rank in stage[:slices] if name in rank.parts]
            if name in parts and name in stage[0].names:
                _check_alike(name, parts[name], found, encrypted, reader)
            parts.setdefault(name, found)
    return Arrangement(parts, num_slices)


def _weights_of(header: Header) -> set[str]:
    """Return the names that a model needs; ranks may also hold their own counters and optimizer states."""
    return {name for name, stored in header.items() if stored.dims and not LEFTOVERS.fullmatch(name)}


def _split_stages(path: Path, ranks: Sequence[_Rank]) -> list[list[_Rank]] | None:
    """Split the ranks into runs that hold the same names; None if the names of two runs overlap in a layer."""
    stages = [[ranks[0]]]
    for rank in ranks[1:]:
        if rank.names == stages[-1][0].names:
            stages[-1].append(rank)
            continue
        before = stages[-1][0]
        if any(".layers." in name for name in rank.names & before.names):
            return None
        stages.append([rank])
    sizes = {len(stage) for stage in stages}
    if len(sizes) > 1:
        found = ", ".join(str(len(stage)) for stage in stages)
        raise CheckpointError(
            f"{path}: its pipeline stages have {found} ranks, but all have the same number: copy the folders of all ranks"
        )
    return stages


def _join_by_name(
    ranks: Sequence[_Rank], config: Mapping[str, Any], encrypted: Mapping[Path, EncryptedFile], reader: FileReader
) -> Arrangement:
    """Collect the slices of each tensor from ranks of which each wrote a part of the common tensors (remove_redundancy).

    Raises CheckpointError if a slice is in no file.
    """
    found = (
        _compare_shape(name, one, config, linear) for rank in ranks for linear in _ROW_PARALLEL for name, (_, one) in rank.parts.items()
    )
    slices = next((one for one in found if one is not None), 0)
    parts: dict[str, Sequence[Part]] = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank.parts):
        holders = (
            [[rank for rank in ranks if name in rank.parts and rank.number % slices == one] for one in range(slices)] if slices else []
        )
        missing = next((one for one, some in enumerate(holders) if not some), None)
        holder = next(rank for rank in ranks if name in rank.parts)
        if name in holder.names and (not slices or len(ranks) % slices or (missing is not None and not _is_whole(name, holder, config))):
            other = next((rank for rank in ranks if name not in rank.parts), ranks[0])
            raise CheckpointError(
                f"{holder.file} holds {name}, but {other.file} does not, and no other file has this slice of it: give the files of all "
                "ranks of one run"
            )
        if missing is not None:
            holders = [[rank for some in holders for rank in some]] * slices
        for first, *replicas in holders:
            for replica in replicas:
                _check_alike(name, [first.parts[name]], [replica.parts[name]], encrypted, reader)
        parts[name] = [some[0].parts[name] for some in holders]
        _check_types(name, parts[name])
    return Arrangement(parts, slices)


def _is_whole(name: str, rank: _Rank, config: Mapping[str, Any]) -> bool:
    """Return whether a tensor is one that every rank holds whole."""
    rest = split_name(name)[1]
    return rest in _NORMS or (rest in _VOCABULARY and rank.parts[name][1].dims[0] == config.get("vocab_size"))


def _merge_shards(
    stage: Sequence[_Rank], config: Mapping[str, Any], encrypted: Mapping[Path, EncryptedFile], reader: FileReader
) -> Sequence[_Rank]:
    """Return the ranks of a stage with the shards of the parallel optimizer joined: one rank for each slice."""
    shards, slices = count_shards(stage[0].parts, config)
    if shards == 1 or len(stage) == 1:
        return stage
    if len(stage) != shards * slices:
        raise CheckpointError(
            f"{stage[0].file} holds 1/{shards} of the rows of each of {slices} slices (enable_parallel_optimizer): {shards * slices} ranks "
            f"are needed, but there are {len(stage)}: copy the folders of all ranks"
        )
    merged = []
    for number in range(slices):
        group = stage[number::slices]
        _check_copies(group, encrypted, reader)
        rank = copy(group[0])
        rank.parts = dict(group[0].parts)
        for name in sorted(rank.names):
            found = [one.parts[name] for one in group]
            _check_types(name, found)
            is_cut = is_sharded(name, found[0], shards, slices, config)
            if is_cut is None:
                is_cut = not all(
                    torch.equal(_read_ends(*found[0], encrypted, reader), _read_ends(*one, encrypted, reader)) for one in found
                )
            if is_cut:
                rank.parts[name] = join_shards(found)
            else:
                for one in found[1:]:
                    _check_alike(name, found[:1], [one], encrypted, reader)
        merged.append(rank)
    return merged


def _find_num_slices(path: Path, stage: Sequence[_Rank], config: Mapping[str, Any]) -> int:
    """Return the number of ranks of a stage that share each tensor, from the shapes of tensors that are always sliced; all if unclear."""
    found = [_compare_shape(name, stored, config, linear) for linear in _ROW_PARALLEL for name, (_, stored) in stage[0].parts.items()]
    slices = next((one for one in found if one is not None), None)
    if slices is None:
        return len(stage)
    if len(stage) % slices:
        holder = stage[0].file if len(stage) == 1 else path
        have = "is one of them" if len(stage) == 1 else f"holds {len(stage)} ranks"
        raise CheckpointError(
            f"{holder} {have}, but each tensor was cut into {slices} slices: give the folder that holds the rank_N folders of all {slices}"
        )
    return slices


def _compare_shape(name: str, stored: StoredTensor, config: Mapping[str, Any], linear: str) -> int | None:
    """Return the number of column slices of this tensor; None if its shape does not tell."""
    if f".{linear}." not in name or not name.endswith("weight") or len(stored.dims) != 2:
        return None
    (rows, part), (hidden, heads, head_dim, width) = stored.dims, (config.get(key) for key in _SIZES)
    if type(hidden) is int and hidden != rows:
        return None  # the config of another model, which is reported elsewhere
    if linear == "feed_forward.w2":
        full = width
    else:
        full = heads * head_dim if type(heads) is type(head_dim) is int else rows
    return full // part if type(full) is int and part and full >= part and full % part == 0 else None


def _check_slices(ranks: Sequence[_Rank]) -> None:
    """Check that every rank holds the same tensors, with the same dtypes and numbers of dimensions."""
    for name in sorted(ranks[0].names):
        _check_types(name, [rank.parts[name] for rank in ranks])


def _check_types(name: str, parts: Sequence[Part]) -> None:
    """Check that all slices of a tensor have the same dtype and sizes, except for the number of rows."""
    (one_file, one), *others = parts
    for file, stored in others:
        if (stored.tensor_type, len(stored.dims), stored.dims[1:]) != (one.tensor_type, len(one.dims), one.dims[1:]):
            raise CheckpointError(
                f"{name} is {one.tensor_type} {list(one.dims)} in {one_file}, but {stored.tensor_type} "
                f"{list(stored.dims)} in {file}: give the files of one run"
            )


def _check_copies(ranks: Sequence[_Rank], encrypted: Mapping[Path, EncryptedFile], reader: FileReader) -> None:
    """Raise CheckpointError where one slice lies under two ranks: all tensors that are cut by their columns are equal at both ends."""
    names = [name for name in sorted(ranks[0].names) if name.endswith("weight") and any(f".{linear}." in name for linear in _ROW_PARALLEL)]
    if not names:
        return
    seen: dict[bytes, _Rank] = {}
    for rank in ranks:
        start = _read_ends(*rank.parts[names[0]], encrypted, reader).numpy().tobytes()
        other = seen.setdefault(start, rank)
        if other is not rank and all(
            torch.equal(_read_ends(*rank.parts[name], encrypted, reader), _read_ends(*other.parts[name], encrypted, reader))
            for name in names[1:]
        ):
            raise CheckpointError(
                f"{other.file} and {rank.file} hold the same slice of each tensor, but should hold different slices: copy the files of "
                "both ranks again"
            )


def _check_replica(ranks: Sequence[_Rank], others: Sequence[_Rank], encrypted: Mapping[Path, EncryptedFile], reader: FileReader) -> None:
    for name in sorted(ranks[0].names):
        _check_alike(name, [rank.parts[name] for rank in ranks], [rank.parts[name] for rank in others], encrypted, reader)


def _check_alike(
    name: str, parts: Sequence[Part], others: Sequence[Part], encrypted: Mapping[Path, EncryptedFile], reader: FileReader
) -> None:
    """Check that two replicas agree: shapes, and the bytes at both ends of each tensor."""
    for (file, one), (other_file, other) in zip(parts, others, strict=True):
        if (one.tensor_type, one.dims) != (other.tensor_type, other.dims):
            raise CheckpointError(
                f"{name} is {one.tensor_type} {list(one.dims)} in {file}, but {other.tensor_type} {list(other.dims)} in {other_file}, "
                "which should hold the same: give the files of one run"
            )
        if not torch.equal(_read_ends(file, one, encrypted, reader), _read_ends(other_file, other, encrypted, reader)):
            raise CheckpointError(
                f"{name} differs in {file} and {other_file}, which hold the same slice of the model: give the files of one run, "
                "or the folder of one data-parallel replica"
            )


def _read_ends(file: Path, stored: StoredTensor, encrypted: Mapping[Path, EncryptedFile], reader: FileReader) -> torch.Tensor:
    row_bytes = max(1, ELEMENT_TYPES[stored.tensor_type].itemsize * stored.dims[1] if len(stored.dims) > 1 else stored.dims[0])
    rows, some = stored.dims[0], max(1, _COMPARED_BYTES // row_bytes)
    runs = [RowRuns(0, rows)] if rows <= 2 * some else [RowRuns(0, some), RowRuns(rows - some, some)]
    block = build_block([(file, stored, one) for one in runs], encrypted)
    return block.read(reader, 0, block.shape[0]).reshape(-1).view(torch.uint8)
