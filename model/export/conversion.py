"""Convert a checkpoint to a Hugging Face folder, tensor by tensor, optionally to another float dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from model.checkpoint.cache_scales import list_cache_scales
from model.checkpoint.folder_writing import write_folder, write_json, write_tensors
from model.checkpoint.source import CheckpointSource, read_pieces
from model.spec.tensor_info import TensorInfo
from model.spec.weights import FLOAT_DTYPES
from model.text.tokenizer_files import write_tokenizer
from parallel.element_type import ElementType
from parallel.file_slices import FileReader
from parallel.lazy_torch import torch

Progress = Callable[[int, int], None]


def convert_checkpoint(source: CheckpointSource, target: Path, dtype: str | None, on_progress: Progress) -> None:
    """Write `source` as a Hugging Face folder. `dtype`: a key of DTYPES for all float weights; None keeps each dtype."""

    def info(name: str) -> TensorInfo:
        found = source.tensors[name]
        return TensorInfo(found.shape, ElementType.named(dtype)) if dtype and found.dtype_name in FLOAT_DTYPES else found

    tensors = {name: info(name) for name in source.tensors}
    reader = FileReader()

    def read(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        shape = source.tensors[name].shape
        for piece in read_pieces(source, reader, name, 0, shape[0] if shape else 1):
            yield name, piece.to(tensors[name].dtype.torch_dtype)

    kinds = {found.dtype_name for found in tensors.values() if found.dtype_name in FLOAT_DTYPES}
    config = dict(source.config)
    if len(kinds) == 1:
        config.pop("dtype", None)  # transformers 5 writes it besides or instead of torch_dtype, and it would take precedence
        config["torch_dtype"] = kinds.pop()
    write_checkpoint(source, target, config, tensors, read, [(name, (name,)) for name in tensors], on_progress)


def read_whole(source: CheckpointSource, reader: FileReader, name: str) -> torch.Tensor:
    """Read all rows of a tensor."""
    shape = source.tensors[name].shape
    return source.read_rows(reader, name, 0, shape[0] if shape else 1).reshape(shape)


def write_checkpoint(
    source: CheckpointSource,
    target: Path,
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    read: Callable[[str], Iterator[tuple[str, torch.Tensor]]],
    groups: list[tuple[str, tuple[str, ...]]],
    on_progress: Progress,
    add_files: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a Hugging Face folder atomically: weights (see `write_tensors`), config.json, tokenizer, `add_files`."""
    total, done = sum(info.num_bytes for info in tensors.values()), 0

    def read_counted(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal done
        for tensor, rows in read(name):
            yield tensor, rows
            done += rows.nbytes
            on_progress(done, total)

    with write_folder(target) as folder:
        write_tensors(folder, tensors, read_counted, groups, list_cache_scales(config, tensors))
        write_json(folder / "config.json", config)
        write_tokenizer(source.tokenizer_path(), folder)
        add_files(folder)
