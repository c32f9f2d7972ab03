"""Meta's Llama 1, 2 and 3 downloads as a checkpoint: params.json and consolidated.NN.pth, one file per model-parallel rank.

Handles Meta's names and tensor slices; `torch_header.py` parses the files, `meta_params.py` params.json. Norms, which every file holds
in full, are read from the first: comparing them would read data at opening.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.checkpoint.meta_params import read_meta_params
from model.checkpoint.source import Checksum
from model.checkpoint.torch_header import StoredTensor, read_torch_header
from model.spec.tensor_info import TensorInfo
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch
from parallel.regular_file import MAX_LIST_BYTES, read_text

_PARAMS, _CHECKLIST, _SINGLE_FILE = "params.json", "checklist.chk", "consolidated.pth"
_RANK_FILE = re.compile(r"consolidated\.([0-9]+)\.pth")
_CHECKLIST_LINE = re.compile(r"^([0-9a-fA-F]{32})[ \t]+\*?(?:\./)?(.+?)[ \t\r]*$", re.MULTILINE)
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_TOP_NAMES: Mapping[str, tuple[str, int | None]] = {
    _EMBEDDING: ("model.embed_tokens.weight", 0),
    "norm.weight": ("model.norm.weight", None),
    _HEAD: ("lm_head.weight", 0),
}
"""Hugging Face names and the sliced dimension; None: replicated in every file. Llama 1 and 2 slice the embedding's columns."""
_LAYER_NAMES: Mapping[str, tuple[str, int | None]] = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]*)\.(.+)")
_IGNORED_SUFFIX = "rope.freqs"
FAMILY = "llama"
"""The `model_type` of all such downloads."""
_SIZED_BY = ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight")
_WHOLE_MODEL = "copy the files of all ranks, and the params.json of this model"


@dataclass(frozen=True, slots=True)
class _Joined:
    """One tensor assembled from all files."""

    blocks: list[list[StoredRows]]
    """Outer list: joined by column; inner lists: joined by row."""
    head_rows: int
    """Rows per head with interleaved rotary pairs; 1: rows are in order."""


class MetaFolder:
    """A Meta folder as a CheckpointSource, opened by reading its headers."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for files that are missing, corrupt, of different models, or that would execute code; ConfigError for
        params.json.
        """
        if not path.is_dir():
            raise CheckpointError(f"{path} is no folder: give the one that holds {_PARAMS}")
        self.path = path
        self._params = read_meta_params(path / _PARAMS)
        self.notes = self._params.notes
        self.files = _find_files(path)
        read = [read_torch_header(file, _IGNORED_SUFFIX) for file in self.files]
        headers = [header for header, _ in read]
        # A line of checklist.chk covers all bytes of its file.
        directories = {file: checksum for file, (_, checksum) in zip(self.files, read, strict=True)}
        self.checksums = directories | _read_checksums(path / _CHECKLIST, self.files)
        _check_ranks(self.files, headers)
        if all(header.get(_HEAD) == header.get(_EMBEDDING) for header in headers):
            # The same data under both names.
            for header in headers:
                header.pop(_HEAD, None)
        self.tensors: dict[str, TensorInfo] = {}
        self._joined: dict[str, _Joined] = {}
        for name in headers[0]:
            self._join(name, [header[name] for header in headers])
        self._check_layers()
        embedding, gate = (self.tensors[name] for name in _SIZED_BY)
        self.config = self._params.build_config(embedding, gate.shape[0], tied=_TOP_NAMES[_HEAD][0] not in self.tensors)

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor; q and k rows in Hugging Face's order."""
        joined = self._joined[name]
        if joined.head_rows == 1 or start == stop:
            return _read_blocks(reader, joined, start, stop)
        # Meta interleaves the two halves of each head's rotary pairs, so rows are located by whole heads.
        size = joined.head_rows
        first, last = start // size * size, -(-stop // size) * size
        rows = _read_blocks(reader, joined, first, last)
        ordered = rows.view(-1, size // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
        return ordered[start - first : stop - first].contiguous()

    def locate_rows(self, name: str, start: int, stop: int) -> list[StoredRows]:
        """Return where the rows are stored, for tensors with contiguous rows in order."""
        joined = self._joined[name]
        return joined.blocks[0] if joined.head_rows == 1 and len(joined.blocks) == 1 else []

    def tokenizer_path(self) -> Path | None:
        """Return the folder, or its parent as in original downloads, if it holds tokenizer.model or tokenizer.json."""
        folders = (self.path, self.path.absolute().parent)
        return next((folder for folder in folders if any((folder / name).is_file() for name in _TOKENIZERS)), None)

    def _join(self, name: str, pieces: Sequence[StoredTensor]) -> None:
        target, axis = _translate(self.files[0], name)
        (shape, dtype), count = (pieces[0].info.shape, pieces[0].info.dtype), len(pieces)
        if len(shape) != (1 if axis is None else 2) or 0 in shape:
            raise CheckpointError(f"{self.files[0]}: {name} has the shape {list(shape)}, which no Llama model has: take the original file")
        if name == _EMBEDDING and shape[1] != self._params.dim:
            axis = 1
            if shape[1] * count != self._params.dim:
                raise CheckpointError(
                    f"{self.path}: {name} has {shape[1]} columns in each of {count} files, but {_PARAMS} says dim {self._params.dim}: "
                    + _WHOLE_MODEL
                )
        step = shape[0] if axis == 0 else 0
        rows = [
            StoredRows(file, piece.offset_bytes, rank * step, rank * step + shape[0], shape[1:], dtype)
            for rank, (file, piece) in enumerate(zip(self.files, pieces, strict=True))
        ]
        full = tuple(size * count if dimension == axis else size for dimension, size in enumerate(shape))
        blocks = {0: [rows], 1: [[part] for part in rows], None: [rows[:1]]}[axis]
        self._joined[target] = _Joined(blocks, self._find_head_rows(name, full[0]))
        self.tensors[target] = TensorInfo(full, dtype)

    def _find_head_rows(self, name: str, rows: int) -> int:
        heads = {"wq": self._params.num_heads, "wk": self._params.num_kv_heads}.get(name.split(".")[-2])
        if heads is None:
            return 1
        size, count = self._params.head_dim, len(self.files)
        if rows != heads * size:
            repeated = rows > heads * size and heads < count
            advice = (
                "ranks that repeat heads cannot be read: take a download of fewer files, or Hugging Face's" if repeated else _WHOLE_MODEL
            )
            raise CheckpointError(f"{self.path}: {name} has {rows} rows in {count} files, but {heads} heads need {heads * size}: {advice}")
        return size

    def _check_layers(self) -> None:
        found = {name.split(".")[2] for name in self.tensors if name.startswith("model.layers.")}
        if len(found) != self._params.num_layers or found != {str(index) for index in range(len(found))}:
            raise CheckpointError(f"{self.path} holds {len(found)} layers, but {_PARAMS} says {self._params.num_layers}: {_WHOLE_MODEL}")
        for name in _SIZED_BY:
            if name not in self.tensors:
                raise CheckpointError(f"{self.path} lacks {name}, which tells the model's sizes: take the original files")


def is_meta(path: Path) -> bool:
    """Return whether a folder holds params.json and a tensor file named as Meta's."""
    return (path / _PARAMS).is_file() and any(_RANK_FILE.fullmatch(file.name) or file.name == _SINGLE_FILE for file in path.iterdir())


def _find_files(path: Path) -> list[Path]:
    ranks = sorted((int(match[1]), file) for file in path.iterdir() if (match := _RANK_FILE.fullmatch(file.name)))
    single = [path / _SINGLE_FILE] if (path / _SINGLE_FILE).is_file() else []
    if bool(ranks) == bool(single):
        raise CheckpointError(
            f"{path} holds {len(single)} {_SINGLE_FILE} and {len(ranks)} files consolidated.NN.pth: either the one or the others are needed"
        )
    for rank, (number, file) in enumerate(ranks):
        if number != rank:
            raise CheckpointError(
                f"{path} holds {len(ranks)} files, but {file.name} is there instead of consolidated.{rank:02d}.pth: copy all"
            )
    return single or [file for _, file in ranks]


def _read_checksums(file: Path, files: Sequence[Path]) -> dict[Path, Checksum]:
    try:
        text = read_text(file, MAX_LIST_BYTES, errors="replace") if file.exists() else ""
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    values = {name: value.lower() for value, name in _CHECKLIST_LINE.findall(text)}
    return {one: Checksum("md5", values[one.name], file.name) for one in files if one.name in values}


def _check_ranks(files: Sequence[Path], headers: Sequence[Mapping[str, StoredTensor]]) -> None:
    """Check that every rank holds the same tensors, with the same shapes and dtypes."""
    for file, header in zip(files[1:], headers[1:], strict=True):
        for name in sorted(headers[0].keys() | header.keys()):
            expected, found = _describe(headers[0].get(name)), _describe(header.get(name))
            if expected != found:
                raise CheckpointError(f"{name!r} is {expected} in {files[0]}, but {found} in {file}: take the files of one download")


def _describe(stored: StoredTensor | None) -> str:
    return f"{stored.info.dtype_name} {list(stored.info.shape)}" if stored else "missing"


def _translate(file: Path, name: str) -> tuple[str, int | None]:
    """Return the Hugging Face name and the sliced dimension."""
    layer = _LAYER.fullmatch(name)
    found = _LAYER_NAMES.get(layer[2]) if layer else _TOP_NAMES.get(name)
    if found is None:
        raise CheckpointError(f"{file} holds {name!r}, which no text model of Meta's has: take the original file of a Llama model")
    return (f"model.layers.{layer[1]}.{found[0]}", found[1]) if layer else found


def _read_blocks(reader: FileReader, joined: _Joined, start: int, stop: int) -> torch.Tensor:
    blocks = [reader.read_rows(parts, start, stop) for parts in joined.blocks]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
