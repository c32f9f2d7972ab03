"""MindSpore checkpoints of a MindFormers Llama, float or quantized by Golden Stick, under canonical names.

Handles their names and the slicing into `rank_N` folders; `mindspore_header.py` parses the files, and the caller reads the YAML. The
scales of Golden Stick's int8 activations become divisors per input channel (`smooth_scale`) with an input_scale of 1, so that nothing is
rounded twice. The bias that it derives from the input's zero point is dropped, since the zero point itself is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.checkpoint.fused_order import ORDERS, OrderEvidence
from model.checkpoint.mindspore_encryption import EncryptedFile
from model.checkpoint.mindspore_folder import find_files
from model.checkpoint.mindspore_layout import arrange_ranks
from model.checkpoint.mindspore_names import (
    CACHE_ZEROS,
    FORMS,
    LEFTOVERS,
    LINEAR_NAMES,
    PLAIN_NAMES,
    ROLES,
    ROW_PARALLEL,
    split_name,
)
from model.checkpoint.mindspore_order import FusedRows
from model.checkpoint.mindspore_rows import RowBlock, RowRuns, build_block, decode_dequant_scale, make_column
from model.checkpoint.mindspore_safetensors import read_any_header
from model.spec.config import read_config
from model.spec.linear_scheme import LinearScheme
from model.spec.quantization_sections import KV_CACHE_KEY
from model.spec.scheme import declare_scheme, group_linears, read_scheme
from model.spec.tensor_info import TensorInfo
from model.spec.weights import MINDFORMERS_NAMES
from parallel.errors import CheckpointError, ConfigError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor as returned by `read_rows`."""

    blocks: tuple[RowBlock, ...]
    """Joined by column."""
    convert: Callable[[torch.Tensor], torch.Tensor]
    """Conversion; takes any number of rows."""


class MindSporeFile:
    """A MindSpore checkpoint as a CheckpointSource: a file, a folder with one or several parts, or rank folders.

    `fused_order` is the row order of its fused weights, an entry of ORDERS; None if it has none or both orders are the same.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any] | None = None, key_file: Path | None = None, fused_order: str | None = None
    ) -> None:
        """`config` holds the values of a config.json if the checkpoint has none; `key_file` the key of encrypted files.

        `fused_order`: an entry of ORDERS; None or AUTO: detected from the norms of some rows. Raises CheckpointError for files that are
        missing, corrupt, encrypted with another key or quantized in an unsupported way, and for fused weights whose order cannot be
        detected; ConfigError when the config is missing or lacks values that the tensors need.
        """
        self.path = path
        ranks = find_files(path)
        self.files = [file for files in ranks for file in files]
        self._folders = list_config_folders(path)
        self.config = dict(config) if config is not None else self._read_config()
        self._stored: dict[str, _Tensor] = {}
        self._constants: dict[str, torch.Tensor] = {}
        self._notes: list[str] = []
        self._reader = FileReader()
        try:
            headers = {file: read_any_header(file, self._reader, key_file) for file in self.files}
            self._encrypted: dict[Path, EncryptedFile] = {file: one.encrypted for file, one in headers.items() if one.encrypted}
            self.checksums = {file: header.checksum for file, header in headers.items() if header.checksum}
            tensors = {file: header.tensors for file, header in headers.items()}
            arranged = arrange_ranks(path, ranks, tensors, self.config, self._encrypted, self._reader)
            self._parts, self._num_slices = arranged.parts, arranged.num_slices
            self._order = FusedRows(path, arranged.parts, self._head_shares, self._encrypted, fused_order)
            self.fused_order = self._order.order
            self._add_scheme(self._add_tensors())
        finally:
            self._reader.close()
        # Convert zero rows to find the shapes and dtypes after conversion.
        self.tensors = {name: TensorInfo.of(tensor) for name, tensor in self._constants.items()}
        for name, tensor in self._stored.items():
            sample = self.read_rows(self._reader, name, 0, 0)
            self.tensors[name] = replace(TensorInfo.of(sample), shape=(tensor.blocks[0].shape[0], *sample.shape[1:]))
        self._add_dtype()

    @property
    def notes(self) -> list[str]:
        """Notes for the user on how the checkpoint is read. If the order was given, compares it with sampled rows."""
        tokenizer = self.tokenizer_path()
        is_outside = tokenizer is not None and tokenizer not in self._folders
        return [
            *self._order.list_notes(),
            *self._notes,
            *([f"{self.path} holds no tokenizer: that of {tokenizer} is used"] if is_outside else []),
        ]

    def examine_order(self) -> OrderEvidence | None:
        """Return the evidence of the fused weights' rows on their order; None if there are none."""
        return self._order.examine()

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor."""
        if name in self._constants:
            return self._constants[name][start:stop].clone()
        tensor = self._stored[name]
        columns = [block.read(reader, start, stop) for block in tensor.blocks]
        return tensor.convert(columns[0] if len(columns) == 1 else torch.cat(columns, dim=1))

    def locate_rows(self, name: str, start: int, stop: int) -> list[StoredRows]:
        """Return nothing: most rows are joined or converted."""
        return []

    def tokenizer_path(self) -> Path | None:
        """Return the folder of the file, or the folder around the checkpoint's, if it holds tokenizer.model or tokenizer.json."""
        folders = (*self._folders, self._folders[0].absolute().parent)
        return next((f for f in folders if any((f / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))), None)

    def _read_config(self) -> dict[str, Any]:
        for folder in self._folders:
            if (folder / "config.json").is_file():
                return read_config(folder / "config.json")
        raise ConfigError(f"{self.path} has no config.json: give the MindFormers YAML with -c")

    def _require(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self.path} holds fused tensors or several ranks' parts: the config has to give {key}, but it is {value!r}")
        return value

    def _head_shares(self) -> tuple[int, int]:
        """Return the numbers of query heads and KV heads of each slice."""
        slices, heads = self._num_slices, self._require("num_attention_heads")
        kv_heads = self._require("num_key_value_heads") if self.config.get("num_key_value_heads") else heads
        if heads % slices or kv_heads % slices:
            raise CheckpointError(f"{self.path} has {slices} ranks, but {heads} heads and {kv_heads} key-value heads do not divide by it")
        if heads % kv_heads:
            raise CheckpointError(f"{self.path}: {heads} heads do not divide into {kv_heads} key-value heads: check the config")
        return heads // slices, kv_heads // slices

    def _add_tensors(self) -> dict[str, LinearScheme | None]:
        """Add all tensors; return the storage form of each linear by its Hugging Face name."""
        linears: dict[str, dict[str, str]] = {}
        for name, ((_, stored), *_) in self._parts.items():
            # Scalars and strings are never weights, but counters and notes of a training run.
            if not stored.dims or LEFTOVERS.fullmatch(name):
                continue
            if name.endswith(CACHE_ZEROS):
                self._check_zero(name)
                continue
            prefix, rest = split_name(name)
            linear = next((one for one in (*LINEAR_NAMES, "lm_head") if rest.startswith(f"{one}.")), None)
            role = ROLES.get(rest[len(linear) + 1 :]) if linear else None
            if linear and role:
                if linears.setdefault(prefix + linear, {}).setdefault(role, name) != name:
                    raise CheckpointError(f"{self.path} holds both {linears[prefix + linear][role]} and {name}: one linear has one {role}")
            elif rest in PLAIN_NAMES:
                self._add(prefix + PLAIN_NAMES[rest], name, self._plain_axis(rest, name))
            else:
                self._add(name, name, None)
        return {found: form for linear, roles in linears.items() for found, form in self._add_linear(linear, roles)}

    def _plain_axis(self, rest: str, name: str) -> int | None:
        """Return the axis along which ranks slice a tensor outside the layers' linears; None: replicated."""
        if rest.endswith("_t_scale"):
            return 0
        if self._num_slices == 1 or not rest.startswith(("tok_embeddings", "lm_head")):
            return None
        return 0 if sum(stored.dims[0] for _, stored in self._parts[name]) == self._require("vocab_size") else None

    def _add_linear(self, name: str, roles: dict[str, str]) -> list[tuple[str, LinearScheme | None]]:
        prefix, linear = split_name(name)
        kinds = frozenset(roles) - {"bias"}
        if kinds not in FORMS:
            raise CheckpointError(
                f"{self.path} holds {', '.join(sorted(roles.values()))}, which is no form of Golden Stick's that can be read"
            )
        form = FORMS[kinds]
        weight = roles["float" if form is None else "weight"]
        if form is not None and self._parts[weight][0][1].tensor_type != "Int8":
            raise CheckpointError(f"{weight} is {self._parts[weight][0][1].tensor_type}, but only Int8 can be read: quantize to int8")
        row_parallel = linear in ROW_PARALLEL
        rows_axis = None if row_parallel else (self._plain_axis(linear, weight) if linear == "lm_head" else 0)
        given = []
        for short, part in self._fused_parts(linear, weight):
            full = prefix + short
            self._add(f"{full}.weight", weight, 1 if row_parallel else rows_axis, part)
            # With static int8 activations, it holds the correction for their zero point.
            if "bias" in roles and (form is None or form.activation != "tensor"):
                self._add(f"{full}.bias", roles["bias"], rows_axis, part)
            if "weight_scale" in roles:
                if "weight_zero" in roles:
                    self._check_zero(roles["weight_zero"])
                self._add(f"{full}.weight_scale", roles["weight_scale"], rows_axis, part, make_column)
                if "smooth_scale" in roles:
                    self._add(f"{full}.smooth_scale", roles["smooth_scale"], 0 if row_parallel else None, None, _invert)
            elif form is not None:
                if len(dims := self._parts[roles["dequant_scale"]][0][1].dims) != 1:
                    raise CheckpointError(f"{roles['dequant_scale']} has the shape {list(dims)}, but one scale for each row is needed")
                self._add(f"{full}.weight_scale", roles["dequant_scale"], rows_axis, part, decode_dequant_scale)
                self._add(f"{full}.smooth_scale", roles["input_scale"], 0 if row_parallel else None)
                self._constants[f"{full}.input_scale"] = torch.ones(1)
                self._constants[f"{full}.input_zero_point"] = self._read_input_zero(roles["input_zero"])
            given.append((full, form))
        return given

    def _fused_parts(self, linear: str, name: str) -> list[tuple[str, list[RowRuns] | None]]:
        """Return the Hugging Face names of a linear's parts, and the rows of each in every slice; None: all rows.

        Each slice fuses its own parts: MindFormers fuses after slicing.
        """
        if linear == "lm_head":
            return [("lm_head", None)]
        names = LINEAR_NAMES[linear]
        if len(names) == 1:
            return [(names[0], None)]
        if len(names) == 3:
            heads, kv_heads = self._head_shares()
            shares = [heads, kv_heads, kv_heads]
        else:
            kv_heads, shares = 0, [1, 1]
        runs: list[list[RowRuns]] = [[] for _ in names]
        for _, stored in self._parts[name]:
            rows, first = stored.dims[0], 0
            if rows % sum(shares):
                raise CheckpointError(f"{name} has {rows} rows, which do not divide into {sum(shares)} heads or halves: check the config")
            # Order 1.4 repeats the parts for every KV head, and for every feed-forward row.
            count = 1 if self.fused_order != ORDERS[1] else max(1, kv_heads or rows // 2)
            unit = rows // sum(shares)
            for share, found in zip(shares, runs, strict=True):
                take = unit * share // count
                found.append(RowRuns(first, take, rows // count, count))
                first += take
        return list(zip(names, runs, strict=True))

    def _add(
        self,
        target: str,
        name: str,
        axis: int | None,
        rows: Sequence[RowRuns] | None = None,
        convert: Callable[[torch.Tensor], torch.Tensor] = lambda data: data,
    ) -> None:
        if target in self._stored:
            raise CheckpointError(f"{self.path} holds {target} twice, the second time as {name}: save it again")
        self._stored[target] = _Tensor(self._build_blocks(name, axis, rows), convert)

    def _build_blocks(self, name: str, axis: int | None, rows: Sequence[RowRuns] | None = None) -> tuple[RowBlock, ...]:
        """Join the parts that the ranks hold along `axis` (None: replicated), taking only `rows` of each."""
        parts = self._parts[name]
        rows = rows or [RowRuns(0, stored.dims[0]) for _, stored in parts]
        pieces = [(file, stored, runs) for (file, stored), runs in zip(parts, rows, strict=True)]
        if axis == 0:
            return (build_block(pieces, self._encrypted),)
        blocks = [build_block([piece], self._encrypted) for piece in pieces]
        if axis == 1 and all(len(block.shape) > 1 and block.shape[0] == blocks[0].shape[0] for block in blocks):
            return tuple(blocks)
        self._check_equal(name, blocks)
        return (blocks[0],)

    def _check_equal(self, name: str, blocks: list[RowBlock]) -> None:
        """Compare small replicated tensors across ranks: a wrong rank's scale would corrupt the others."""
        if any(block.shape != blocks[0].shape for block in blocks):
            found = " and ".join(str(list(block.shape)) for block in blocks)
            raise CheckpointError(f"{name} has the shapes {found} in {len(blocks)} files, but all of them should hold the whole of it")
        if len(blocks) == 1 or len(blocks[0].shape) > 1:
            return
        first, *others = [block.read(self._reader, 0, block.shape[0]) for block in blocks]
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(f"{name} differs in {len(blocks)} files, but each should hold the same: give the files of one run")

    def _read_vector(self, name: str) -> torch.Tensor:
        """Concatenate the elements of all ranks."""
        (block,) = self._build_blocks(name, 0)
        return block.read(self._reader, 0, block.shape[0])

    def _check_zero(self, name: str) -> None:
        zero_points = self._read_vector(name)
        count = int((zero_points != 0).sum())
        if count:
            raise CheckpointError(
                f"{self.path}: {count} of {zero_points.numel()} zero points {name} are not 0, but only symmetric ones can be read: "
                "quantize with weight_symmetric and kvcache_symmetric True"
            )

    def _read_input_zero(self, name: str) -> torch.Tensor:
        zero_points = self._read_vector(name)
        if zero_points.dtype != torch.int8:
            # Later releases store the reciprocal of the scale in this case.
            raise CheckpointError(f"{name} is {self._parts[name][0][1].tensor_type}, but Golden Stick 0.6 writes Int8: quantize with it")
        low, high = min(zero_points.tolist(), default=0), max(zero_points.tolist(), default=0)
        if low != high:
            raise CheckpointError(f"{name} holds zero points from {low} to {high}, but only one for all channels can be read")
        return zero_points[:1].clone()

    def _add_scheme(self, forms: Mapping[str, LinearScheme | None]) -> None:
        quantized = {name: form for name, form in forms.items() if form is not None}
        if any(form.activation == "token" for form in quantized.values()):
            self._notes.append(
                f"{self.path} holds scales without zero points: Golden Stick 1.0, activations rounded to int8 for each token (A8W8 dynamic)"
            )
        has_cache = any(name.endswith((".k_scale", ".v_scale")) for name in self._stored)
        ignore = tuple(name for name in _list_linears(forms) if forms.get(name) is None) if quantized else ()
        # config.json may be that of the original checkpoint; only per-token scales are not stored.
        declared = read_scheme({KV_CACHE_KEY: self.config.get(KV_CACHE_KEY)}).kv_cache
        kv_cache = "channel" if has_cache else declared if declared == "token" else None
        self.config = declare_scheme(self.config, group_linears(quantized, ignore, kv_cache))

    def _add_dtype(self) -> None:
        if self.config.get("dtype") or self.config.get("torch_dtype"):
            return
        names = (name for name in self.tensors if name.endswith("proj.weight") and self.tensors[name].dtype.is_floating_point)
        first = next((name for name in ("model.embed_tokens.weight", *names) if name in self.tensors), None)
        if first is not None:
            self.config["torch_dtype"] = self.tensors[first].dtype_name


def _invert(factors: torch.Tensor) -> torch.Tensor:
    """Return the divisors for factors of the inputs."""
    return 1.0 / factors.float()


def list_config_folders(path: Path) -> list[Path]:
    """Return the folders that may hold config.json and the tokenizer. Raises CheckpointError for a folder without files."""
    return list(dict.fromkeys([path, find_files(path)[0][0].parent])) if path.is_dir() else [path.parent]


def _list_linears(forms: Mapping[str, LinearScheme | None]) -> list[str]:
    """Return the full names of the linears in `forms`, over all layers, and of the head."""
    layers = dict.fromkeys(split_name(name)[0] for name in forms if name != "lm_head")
    return [layer + name for layer in layers for name in MINDFORMERS_NAMES] + ["lm_head"]
