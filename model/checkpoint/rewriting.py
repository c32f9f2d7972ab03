"""Rewrites a checkpoint as a Hugging Face folder, tensor by tensor: as it is, in another float type, or as int8.

Knows sources and schemes; the formats' own files know bytes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.folder_writing import write_folder, write_json, write_tensors
from model.checkpoint.source import CheckpointSource, TensorInfo
from model.config import DTYPES, LlamaConfig
from model.quantization.rtn import quantize_rows
from model.scheme import Scheme, pack_int8, write_scheme
from model.tokenizer_writing import write_tokenizer
from model.weights import FLOAT_DTYPES, linear_names
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader

Progress = Callable[[int, int], None]


def convert_checkpoint(source: CheckpointSource, target: Path, dtype: str | None, on_progress: Progress) -> None:
    """Write `source` as a Hugging Face folder. `dtype`: a key of DTYPES for all float weights, None keeps each as it is."""

    def info(name: str) -> TensorInfo:
        found = source.tensors[name]
        return TensorInfo(found.shape, DTYPES[dtype]) if dtype and found.dtype in FLOAT_DTYPES else found

    tensors = {name: info(name) for name in source.tensors}
    reader = FileReader()

    def read(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield name, _read_whole(source, reader, name).to(tensors[name].dtype)

    kinds = {found.dtype for found in tensors.values() if found.dtype in FLOAT_DTYPES}
    config = dict(source.config)
    if len(kinds) == 1:
        config.pop("dtype", None)  # transformers 5 writes it beside or instead of torch_dtype, and it would win
        config["torch_dtype"] = str(kinds.pop()).removeprefix("torch.")
    _write(source, target, config, tensors, read, [(name, (name,)) for name in tensors], on_progress)


def quantize_rtn(
    source: CheckpointSource, config: LlamaConfig, target: Path, not_converted: tuple[str, ...], on_progress: Progress
) -> Scheme:
    """Write `source` with int8 linears (round to nearest, A16W8, compressed-tensors) as a Hugging Face folder.

    Linears whose name contains a word of `not_converted` stay as they are. Memory: one tensor.
    Raises CheckpointError when the source is quantized already or nothing is left to quantize.
    """
    if source.config.get("quantization_config"):
        raise CheckpointError(f"{source.path} is quantized already; quantize the float checkpoint that it was made from")
    linears = [*linear_names(config), *([] if config.tie_word_embeddings else ["lm_head"])]
    ignore = tuple(name for name in linears if any(word in name for word in not_converted))
    # transformers looks at every Linear, and a tied head is one.
    scheme = Scheme("rtn-a16w8", (*ignore, "lm_head") if config.tie_word_embeddings else ignore)
    chosen = {f"{name}.weight": name for name in linears if name not in ignore}
    if not chosen:
        raise CheckpointError(f"modules_to_not_convert {list(not_converted)} leaves nothing to quantize")
    tensors: dict[str, TensorInfo] = {}
    groups = []
    for name, found in source.tensors.items():
        if name in chosen:
            rows, columns = found.shape
            made = {
                f"{chosen[name]}.weight_packed": TensorInfo((rows, -(-columns // 4)), torch.int32),
                f"{chosen[name]}.weight_scale": TensorInfo((rows, 1), found.dtype),
                f"{chosen[name]}.weight_shape": TensorInfo((2,), torch.int64),
            }
        else:
            made = {name: found}
        tensors.update(made)
        groups.append((name, tuple(made)))
    reader = FileReader()

    def read(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        weight = _read_whole(source, reader, name)
        if name not in chosen:
            yield name, weight
            return
        quantized, scale = quantize_rows(weight)
        yield f"{chosen[name]}.weight_packed", pack_int8(quantized)
        yield f"{chosen[name]}.weight_scale", scale
        yield f"{chosen[name]}.weight_shape", torch.tensor(weight.shape)

    _write(source, target, {**source.config, "quantization_config": write_scheme(scheme)}, tensors, read, groups, on_progress)
    return scheme


def _read_whole(source: CheckpointSource, reader: FileReader, name: str) -> torch.Tensor:
    shape = source.tensors[name].shape
    return source.read_rows(reader, name, 0, shape[0] if shape else 1).reshape(shape)


def _write(
    source: CheckpointSource,
    target: Path,
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    read: Callable[[str], Iterator[tuple[str, torch.Tensor]]],
    groups: list[tuple[str, tuple[str, ...]]],
    on_progress: Progress,
) -> None:
    total, done = len(groups), 0

    def read_counted(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal done
        yield from read(name)
        done += 1
        on_progress(done, total)

    with write_folder(target) as folder:
        write_tensors(folder, tensors, read_counted, groups)
        write_json(folder / "config.json", config)
        write_tokenizer(source.tokenizer_path(), folder)
