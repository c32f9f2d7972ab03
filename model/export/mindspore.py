"""Write a checkpoint as a MindSpore `.ckpt` file with MindFormers' names: float, or int8 in the form of Golden Stick 0.6.

Linears are written separately (qkv_concat: False), so the row order of fused weights, which MindFormers changed in 1.4, does not matter.
Only one piece of a tensor is in memory at a time. See `mindspore_header.py` for the format.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.folder_writing import check_target, sync, write_folder, write_json
from model.checkpoint.mindspore_header import (
    BYTES,
    CRC_BYTES,
    CRC_MARK,
    DIMS,
    TAG,
    TENSOR,
    TENSOR_CONTENT,
    TENSOR_TYPE,
    TYPE_NAMES,
    VALUE,
    VARINT,
)
from model.checkpoint.mindspore_names import PLAIN_NAMES, RTN_NAMES, split_name
from model.checkpoint.source import CheckpointSource, read_pieces
from model.spec.config import LlamaConfig
from model.spec.linear_scheme import LinearScheme
from model.spec.packing import unpack_integers
from model.spec.scheme import Scheme, declare_scheme
from model.spec.tensor_info import TensorInfo
from model.spec.weights import MINDFORMERS_NAMES, linear_shape, plan_weights
from model.text.tokenizer_files import write_tokenizer
from parallel.element_type import ElementType
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader
from parallel.lazy_torch import torch

SUFFIX = ".ckpt"
SLICE_BYTES = 512 << 20
"""Larger contents are split into several values with the same tag, as MindSpore does."""
_MINDFORMERS_PLAIN = {ours: theirs for theirs, ours in PLAIN_NAMES.items()}
_RTN = (LinearScheme(), LinearScheme(packed=False))


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the file."""

    tag: str
    info: TensorInfo
    read: Callable[[], Iterator[torch.Tensor]]
    """Yields its rows in pieces."""


def write_mindspore(
    source: CheckpointSource, config: LlamaConfig, scheme: Scheme, target: Path, dtype: str | None, on_progress: Callable[[int, int], None]
) -> None:
    """Write `source`, stored in `scheme`, atomically.

    A `target` that ends in .ckpt is the file, with a config.json next to it unless one exists; any other target is a folder for the
    file, config.json and the tokenizer. `dtype`: a key of DTYPES for all float weights except scales; None keeps each dtype.
    `on_progress` is called with (bytes written, total bytes). Raises CheckpointError for a scheme that MindFormers has no names for, and
    for tensors that are missing or would have to be dropped.
    """
    check_form(config, scheme)
    check_checkpoint(source, config, scheme)
    raw = declare_scheme(source.config, Scheme(kv_cache=scheme.kv_cache))
    if dtype is not None:
        raw.pop("dtype", None)  # transformers 5 writes it besides or instead of torch_dtype, and it would take precedence
        raw["torch_dtype"] = dtype
    reader = FileReader()
    try:
        entries = list(_list_entries(source, reader, config, scheme, dtype))
        if target.suffix == SUFFIX:
            check_target(target, overwrite=True, is_file=True)
            target = Path(os.path.realpath(target))  # preserve a link to the file
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_file(target, entries, on_progress)
            if not (target.parent / "config.json").exists():
                _replace_json(target.parent / "config.json", raw)
            return
        name = f"{target.absolute().name}{SUFFIX}"
        if "strategy" in name:
            raise CheckpointError(f"{name} would be taken for a file that says how ranks were cut: name a folder without 'strategy'")
        with write_folder(target) as folder:
            _write_file(folder / name, entries, on_progress)
            write_json(folder / "config.json", raw)
            write_tokenizer(source.tokenizer_path(), folder)
    finally:
        reader.close()


def check_form(config: LlamaConfig, scheme: Scheme) -> None:
    """Raise CheckpointError for a model or a scheme that MindFormers has no names for here."""
    features = {
        "biases": config.attention_bias or config.output_bias or config.mlp_bias,
        "norms of queries and keys": config.qk_norm,
        "attention over a window": config.sliding_window is not None,
        "experts": config.experts is not None,
    }
    found = next((words for words, present in features.items() if present), None)
    if found is not None:
        raise CheckpointError(f"the model has {found}, which have no form in a .ckpt file here: convert to a Hugging Face folder")
    if scheme.others or scheme.linear not in (None, *_RTN):
        raise CheckpointError(
            f"{scheme.name} has no form in a .ckpt file; float weights and rtn-a16w8 have one: convert to a Hugging Face folder, "
            "or quantize with -a rtn-a16w8"
        )
    if scheme.kv_cache not in (None, "token"):
        raise CheckpointError(
            f"an int8 key-value cache with a scale for each {scheme.kv_cache} cannot be written into a .ckpt file; float weights and "
            "rtn-a16w8 can: convert to a Hugging Face folder"
        )


def _list_entries(source: CheckpointSource, reader: FileReader, config: LlamaConfig, scheme: Scheme, dtype: str | None) -> Iterator[_Entry]:
    """Return the entries of the file, in the model's order."""

    def read(name: str, convert: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Iterator[torch.Tensor]]:
        return lambda: map(convert, read_pieces(source, reader, name, 0, source.tensors[name].shape[0]))

    for name in plan_weights(config, scheme):
        info = source.tensors[name]
        (prefix, rest), (full, _, part) = split_name(name), name.rpartition(".")
        plain, short = _MINDFORMERS_PLAIN.get(rest), rest.rpartition(".")[0]
        form = None if plain else scheme.find_linear(full)
        tag = f"{prefix}{MINDFORMERS_NAMES.get(short, short)}."
        if form is None:
            kind = ElementType.named(dtype) if dtype else info.dtype
            tag = prefix + plain if plain else tag + part
            yield _Entry(tag, TensorInfo(info.shape, kind), read(name, _cast_to(kind.torch_dtype)))
        elif part == "weight_scale":
            rows, columns = (config.vocab_size, config.hidden_size) if full == "lm_head" else linear_shape(config, short)
            weight = f"{full}.weight_packed" if form.packed else f"{full}.weight"
            unpack = _unpack_to(columns) if form.packed else _cast_to(torch.int8)
            scale = TensorInfo((rows,), info.dtype)
            yield _Entry(tag + RTN_NAMES["weight"], TensorInfo((rows, columns), ElementType.INT8), read(weight, unpack))
            yield _Entry(tag + RTN_NAMES["weight_scale"], scale, read(name, lambda piece: piece.flatten()))
            yield _Entry(tag + RTN_NAMES["weight_zero"], scale, read(name, lambda piece: torch.zeros_like(piece.flatten())))


def _cast_to(kind: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda piece: piece.to(kind)


def _unpack_to(columns: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda piece: unpack_integers(piece, 8, columns)


def _write_file(path: Path, entries: list[_Entry], on_progress: Callable[[int, int], None]) -> None:
    done, total = 0, sum(entry.info.num_bytes for entry in entries)
    with _Writer(path) as writer:
        for entry in entries:
            writer.begin(entry.tag, entry.info)
            for piece in entry.read():
                writer.write(piece)
                done += piece.nbytes
                on_progress(done, total)


class _Writer:
    """Atomic writer of a file, tensor by tensor; until it is complete, an existing file remains."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.partial-{os.getpid()}")
        self._file = self._temporary.open("wb", buffering=0)
        self._crc = 0
        self._tag, self._info, self._left, self._slice_left = "", TensorInfo((0,), ElementType.INT8), 0, 0

    def begin(self, tag: str, info: TensorInfo) -> None:
        """Start the next tensor."""
        assert self._left == 0, (self._tag, self._left)
        self._tag, self._info, self._left, self._slice_left = tag, info, info.num_bytes, 0

    def write(self, rows: torch.Tensor) -> None:
        """Append any number of rows of the tensor."""
        assert rows.dtype == self._info.dtype.torch_dtype, (self._tag, rows.dtype, self._info)
        data = memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert len(data) <= self._left, (self._tag, rows.shape, self._info)
        while data:
            if self._slice_left == 0:
                self._slice_left = min(self._left, SLICE_BYTES)
                self._put(memoryview(_encode_start(self._tag, self._info, self._slice_left)))
            part = data[: self._slice_left]
            self._put(part)
            self._slice_left -= len(part)
            self._left -= len(part)
            data = data[len(part) :]

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                assert self._left == 0, (self._tag, self._left)
                self._put(memoryview(CRC_MARK + self._crc.to_bytes(CRC_BYTES, "big")))
                os.fsync(self._file.fileno())
                self._file.close()
                _replace(self._temporary, self._path)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _put(self, data: memoryview) -> None:
        self._crc = zlib.crc32(data, self._crc)
        done = 0
        while done < len(data):
            done += self._file.write(data[done:])


def _encode_start(tag: str, info: TensorInfo, content_bytes: int) -> bytes:
    """Encode a message up to the content of its tensor, which is the last field."""
    tensor = b"".join(_encode_varint(DIMS << 3 | VARINT) + _encode_varint(size) for size in info.shape)
    tensor += _encode_field(TENSOR_TYPE, TYPE_NAMES[info.dtype].encode()) + _encode_key(TENSOR_CONTENT, content_bytes)
    value = _encode_field(TAG, tag.encode()) + _encode_key(TENSOR, len(tensor) + content_bytes) + tensor
    return _encode_key(VALUE, len(value) + content_bytes) + value


def _encode_field(number: int, content: bytes) -> bytes:
    return _encode_key(number, len(content)) + content


def _encode_key(number: int, length: int) -> bytes:
    return _encode_varint(number << 3 | BYTES) + _encode_varint(length)


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _replace_json(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        write_json(temporary, value)
        sync(temporary)
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    temporary.rename(path)
    sync(path.parent)
