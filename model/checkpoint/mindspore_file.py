"""MindSpore `.ckpt` files of a MindFormers Llama, float or quantized by Golden Stick, under Hugging Face and `model/scheme.py`'s names.

Knows MindFormers' and Golden Stick's names, and how MindFormers cuts tensors for `rank_N` folders; no bytes of the file
(`mindspore_header.py`), no YAML: its values come from the caller. Golden Stick's int8 activations come as divisors for each input channel
(`smooth_scale`) beside an input_scale of 1, so that nothing is rounded a second time; the bias that it derives from the input's zero point
is dropped, for the zero point itself is given.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.mindspore_folder import find_files
from model.checkpoint.mindspore_header import ELEMENT_TYPES, StoredTensor, read_mindspore_header
from model.checkpoint.source import TensorInfo
from model.config import read_config
from model.scheme import LinearScheme, Scheme, declare_scheme
from model.weights import MINDFORMERS_NAMES
from parallel.errors import CheckpointError, ConfigError
from parallel.file_slices import FileReader, StoredRows

_PLAIN_NAMES = {
    "tok_embeddings.embedding_weight": "embed_tokens.weight",
    "norm_out.weight": "norm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.infer_attention.paged_attention_mgr.key_t_scale": "self_attn.k_scale",
    "attention.infer_attention.paged_attention_mgr.value_t_scale": "self_attn.v_scale",
}
"""Tensors that are no part of a linear, by what follows `model.` or `model.layers.N.`."""
_LINEAR_NAMES = {ours: (theirs,) for theirs, ours in MINDFORMERS_NAMES.items()} | {
    "attention.w_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feed_forward.w_gate_hidden": ("mlp.gate_proj", "mlp.up_proj"),
}
_ROW_PARALLEL = ("attention.wo", "feed_forward.w2")
"""MindFormers cuts their columns, and the rows of all other linears."""
_ROLES = {
    "weight": "float",
    "_handler.weight": "weight",
    "_weight_quantizer.scale": "weight_scale",
    "_weight_quantizer.zp_neg": "weight_zero",
    "_input_quantizer.t_scale": "input_scale",
    "_input_quantizer.t_zp": "input_zero",
    "_output_quantizer.scale": "dequant_scale",
    "_handler.bias": "bias",
    "_layer.weight": "weight",
    "_layer.matmul.t_scale": "weight_scale",
    "_layer.matmul.t_zp_neg": "weight_zero",
    "input_scale": "input_scale",
    "input_zp": "input_zero",
    "_layer.matmul.dequant_scale": "dequant_scale",
    "_layer.bias": "bias",
}
"""What follows a linear's name, for RTN and SmoothQuant (first) and for PTQ, and what it is."""
_FORMS = {
    frozenset({"float"}): None,
    frozenset({"weight", "weight_scale", "weight_zero"}): LinearScheme(packed=False),
    frozenset({"weight", "weight_scale"}): LinearScheme(packed=False),
    frozenset({"weight", "input_scale", "input_zero", "dequant_scale"}): LinearScheme(
        packed=False, activation="tensor", activation_symmetric=False, smooth=True
    ),
}
_LEFTOVERS = re.compile(
    r"(.*\.)?(_weight_observer_cell|_(key|value)_input_quantizer)\..*"
    r"|.*\.(key_value_t_scale|key_value_t_zp|key_cache|value_cache)"
    r"|.*\._layer\.matmul\.input_(scale|zp)"
    r"|(adam_m|adam_v|moment1|moment2|moments|accum|accu_grads|stat)\..*"
    r"|(global_step|epoch_num|step_num|learning_rate|lr|loss_scale|scale_sense|beta[12]_power|(current|last_overflow)_iterator_step)"
)
"""What training and calibration leave in a file: nothing that a run needs, or a second copy of it."""
_CACHE_ZEROS = (".paged_attention_mgr.key_t_zp", ".paged_attention_mgr.value_t_zp")


@dataclass(frozen=True, slots=True)
class _Block:
    """Whole rows of a tensor, or of some columns of it, as they are stored."""

    parts: list[StoredRows]
    """Bytes, for a slice of a file may end inside a row."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, reader: FileReader, start: int, stop: int) -> torch.Tensor:
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        data = reader.read_rows(self.parts, start * row_bytes, stop * row_bytes)
        return data.view(self.dtype).view(stop - start, *self.shape[1:])


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor as `read_rows` gives it."""

    blocks: tuple[_Block, ...]
    """Beside each other."""
    convert: Callable[[torch.Tensor], torch.Tensor]
    """Of any number of rows."""


class MindSporeFile:
    """A `.ckpt` file, a folder of one, or a folder of `rank_0`, `rank_1`, … with one each, as a CheckpointSource."""

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None) -> None:
        """`config` holds the values of a config.json, where the checkpoint has none beside it.

        Raises CheckpointError for files that are missing, damaged or quantized in a way that cannot be read; ConfigError when the
        config is missing or lacks what the tensors need.
        """
        self.path = path
        self._files = find_files(path)
        self._folders = [path, self._files[0].parent] if path.is_dir() else [path.parent]
        self.config = dict(config) if config is not None else self._read_config()
        self._headers = [read_mindspore_header(file) for file in self._files]
        self._check_ranks()
        self._stored: dict[str, _Tensor] = {}
        self._constants: dict[str, torch.Tensor] = {}
        self._reader = FileReader()
        try:
            self._add_scheme(self._add_tensors())
        finally:
            self._reader.close()
        # Shapes and types after the conversion are known by converting no rows.
        self.tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._constants.items()}
        for name, tensor in self._stored.items():
            sample = self.read_rows(self._reader, name, 0, 0)
            self.tensors[name] = TensorInfo((tensor.blocks[0].shape[0], *sample.shape[1:]), sample.dtype)
        self._add_dtype()
        self._headers.clear()

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        if name in self._constants:
            return self._constants[name][start:stop].clone()
        tensor = self._stored[name]
        columns = [block.read(reader, start, stop) for block in tensor.blocks]
        return tensor.convert(columns[0] if len(columns) == 1 else torch.cat(columns, dim=1))

    def tokenizer_path(self) -> Path | None:
        """The folder of the file, when tokenizer.model or tokenizer.json is there."""
        return next((f for f in self._folders if any((f / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))), None)

    def _read_config(self) -> dict[str, Any]:
        for folder in self._folders:
            if (folder / "config.json").is_file():
                return read_config(folder / "config.json")
        raise ConfigError(f"{self.path} has no config.json: give the MindFormers YAML with -c")

    def _require(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int):
            raise ConfigError(f"{self.path} holds fused tensors or several ranks' parts: the config has to give {key}, but it is {value!r}")
        return value

    def _check_ranks(self) -> None:
        """Every rank holds the same tensors, of the same type and number of dimensions."""
        first = self._headers[0]
        for file, header in zip(self._files[1:], self._headers[1:], strict=True):
            differing = sorted(first.keys() ^ header.keys())
            if differing:
                raise CheckpointError(
                    f"{file} and {self._files[0]} differ in {len(differing)} names, {differing[0]} first: give the files of one run"
                )
            for name, stored in header.items():
                if stored.tensor_type != first[name].tensor_type or stored.dims[1:] != first[name].dims[1:]:
                    raise CheckpointError(
                        f"{name} is {first[name].tensor_type} {list(first[name].dims)} in {self._files[0]}, but {stored.tensor_type} "
                        f"{list(stored.dims)} in {file}: give the files of one run"
                    )

    def _add_tensors(self) -> dict[str, LinearScheme | None]:
        """Enter all tensors; give how each linear, by its Hugging Face name, is stored."""
        linears: dict[str, dict[str, str]] = {}
        for name, stored in self._headers[0].items():
            # No weight is a scalar or a text: counters and notes of a training run.
            if not stored.dims or _LEFTOVERS.fullmatch(name):
                continue
            if name.endswith(_CACHE_ZEROS):
                self._check_zero(name)
                continue
            prefix, rest = _split_name(name)
            linear = next((one for one in (*_LINEAR_NAMES, "lm_head") if rest.startswith(f"{one}.")), None)
            role = _ROLES.get(rest[len(linear) + 1 :]) if linear else None
            if linear and role:
                if linears.setdefault(prefix + linear, {}).setdefault(role, name) != name:
                    raise CheckpointError(f"{self.path} holds both {linears[prefix + linear][role]} and {name}: one linear has one {role}")
            elif rest in _PLAIN_NAMES:
                self._add(prefix + _PLAIN_NAMES[rest], name, self._plain_axis(rest, name))
            else:
                self._add(name, name, None)
        return {found: form for linear, roles in linears.items() for found, form in self._add_linear(linear, roles)}

    def _plain_axis(self, rest: str, name: str) -> int | None:
        """The axis along which ranks hold parts of a tensor that is no part of a layer's linear; None: each holds the whole."""
        if rest.endswith("_t_scale"):
            return 0
        if len(self._files) == 1 or not rest.startswith(("tok_embeddings", "lm_head")):
            return None
        return 0 if sum(header[name].dims[0] for header in self._headers) == self._require("vocab_size") else None

    def _add_linear(self, name: str, roles: dict[str, str]) -> list[tuple[str, LinearScheme | None]]:
        prefix, linear = _split_name(name)
        kinds = frozenset(roles) - {"bias"}
        if kinds not in _FORMS:
            raise CheckpointError(f"{self.path} holds {', '.join(sorted(roles.values()))}, which is no form that Golden Stick 0.6 writes")
        form = _FORMS[kinds]
        if "bias" in roles and (form is None or form.activation is None):
            self._add(roles["bias"], roles["bias"], None)
        weight = roles["float" if form is None else "weight"]
        if form is not None and self._headers[0][weight].tensor_type != "Int8":
            raise CheckpointError(f"{weight} is {self._headers[0][weight].tensor_type}, but only Int8 can be read: quantize to int8")
        row_parallel = linear in _ROW_PARALLEL
        rows_axis = None if row_parallel else (self._plain_axis(linear, weight) if linear == "lm_head" else 0)
        given = []
        for short, part in self._fused_parts(linear, weight):
            full = prefix + short
            self._add(f"{full}.weight", weight, 1 if row_parallel else rows_axis, part)
            if "weight_scale" in roles:
                if "weight_zero" in roles:
                    self._check_zero(roles["weight_zero"])
                self._add(f"{full}.weight_scale", roles["weight_scale"], rows_axis, part, _make_column)
            elif form is not None:
                self._add(f"{full}.weight_scale", roles["dequant_scale"], rows_axis, part, _decode_dequant_scale)
                self._add(f"{full}.smooth_scale", roles["input_scale"], 0 if row_parallel else None)
                self._constants[f"{full}.input_scale"] = torch.ones(1)
                self._constants[f"{full}.input_zero_point"] = self._read_input_zero(roles["input_zero"])
            given.append((full, form))
        return given

    def _fused_parts(self, linear: str, name: str) -> list[tuple[str, list[tuple[int, int]] | None]]:
        """Hugging Face names of a linear, and the rows of each in every rank's file; None: all rows.

        A rank's file fuses the rank's own parts: MindFormers fuses after slicing.
        """
        if linear == "lm_head":
            return [("lm_head", None)]
        names = _LINEAR_NAMES[linear]
        if len(names) == 1:
            return [(names[0], None)]
        ranks, shares = len(self._files), [1, 1]
        if len(names) == 3:
            heads = self._require("num_attention_heads")
            kv_heads = self.config.get("num_key_value_heads") or heads
            if heads % ranks or kv_heads % ranks:
                raise CheckpointError(
                    f"{self.path} has {ranks} ranks, but {heads} heads and {kv_heads} key-value heads do not divide by it"
                )
            shares = [heads // ranks, kv_heads // ranks, kv_heads // ranks]
        bounds: list[list[tuple[int, int]]] = [[] for _ in names]
        for header in self._headers:
            (rows, *_), first = header[name].dims, 0
            if rows % sum(shares):
                raise CheckpointError(f"{name} has {rows} rows, which do not divide into {sum(shares)} heads or halves: check the config")
            for share, found in zip(shares, bounds, strict=True):
                found.append((first, first + rows // sum(shares) * share))
                first = found[-1][1]
        return list(zip(names, bounds, strict=True))

    def _add(
        self,
        target: str,
        name: str,
        axis: int | None,
        rows: Sequence[tuple[int, int]] | None = None,
        convert: Callable[[torch.Tensor], torch.Tensor] = lambda data: data,
    ) -> None:
        self._stored[target] = _Tensor(self._build_blocks(name, axis, rows), convert)

    def _build_blocks(self, name: str, axis: int | None, rows: Sequence[tuple[int, int]] | None = None) -> tuple[_Block, ...]:
        """The tensor whose parts the ranks hold along `axis` (None: each holds the whole), of each only `rows`."""
        pieces = [(file, header[name]) for file, header in zip(self._files, self._headers, strict=True)]
        rows = rows or [(0, stored.dims[0]) for _, stored in pieces]
        blocks = [_build_block([(*piece, *part)]) for piece, part in zip(pieces, rows, strict=True)]
        if axis == 0:
            return (_build_block([(*piece, *part) for piece, part in zip(pieces, rows, strict=True)]),)
        if axis == 1:
            return tuple(blocks)
        self._check_equal(name, blocks)
        return (blocks[0],)

    def _check_equal(self, name: str, blocks: list[_Block]) -> None:
        """Ranks that hold the whole hold the same: small ones are compared, for a rank's own scale would be wrong for the others."""
        if any(block.shape != blocks[0].shape for block in blocks):
            found = " and ".join(str(list(block.shape)) for block in blocks)
            raise CheckpointError(f"{name} has the shapes {found} in {len(blocks)} files, but all of them should hold the whole of it")
        if len(blocks) == 1 or len(blocks[0].shape) > 1:
            return
        first, *others = [block.read(self._reader, 0, block.shape[0]) for block in blocks]
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(f"{name} differs in {len(blocks)} files, but each should hold the same: give the files of one run")

    def _read_vector(self, name: str) -> torch.Tensor:
        """The elements that all ranks hold, after each other."""
        (block,) = self._build_blocks(name, 0)
        return block.read(self._reader, 0, block.shape[0])

    def _check_zero(self, name: str) -> None:
        zero_points = self._read_vector(name)
        count = int(torch.count_nonzero(zero_points))
        if count:
            raise CheckpointError(
                f"{self.path}: {count} of {zero_points.numel()} zero points {name} are not 0, but only symmetric ones can be read: "
                "quantize with weight_symmetric and kvcache_symmetric True"
            )

    def _read_input_zero(self, name: str) -> torch.Tensor:
        zero_points = self._read_vector(name)
        if zero_points.dtype != torch.int8:
            # Later releases then store the reciprocal of the scale.
            raise CheckpointError(f"{name} is {self._headers[0][name].tensor_type}, but Golden Stick 0.6 writes Int8: quantize with it")
        low, high = int(zero_points.min()), int(zero_points.max())
        if low != high:
            raise CheckpointError(f"{name} holds zero points from {low} to {high}, but only one for all channels can be read")
        return zero_points[:1].clone()

    def _add_scheme(self, forms: Mapping[str, LinearScheme | None]) -> None:
        quantized: list[LinearScheme] = []
        for form in forms.values():
            if form is not None and form not in quantized:
                quantized.append(form)
        if len(quantized) > 1:
            names = [next(name for name, form in forms.items() if form == one) for one in quantized]
            raise CheckpointError(
                f"{self.path} stores {names[0]} as {quantized[0].name} and {names[1]} as {quantized[1].name}, but one form for all "
                "quantized linears is supported"
            )
        has_cache = any(name.endswith((".k_scale", ".v_scale")) for name in self._stored)
        if quantized or has_cache:
            ignore = tuple(name for name in _list_linears(forms) if forms.get(name) is None) if quantized else ()
            scheme = Scheme(quantized[0] if quantized else None, ignore, "channel" if has_cache else None)
            self.config = declare_scheme(self.config, scheme)

    def _add_dtype(self) -> None:
        if self.config.get("dtype") or self.config.get("torch_dtype"):
            return
        names = (name for name in self.tensors if name.endswith("proj.weight") and self.tensors[name].dtype.is_floating_point)
        first = next((name for name in ("model.embed_tokens.weight", *names) if name in self.tensors), None)
        if first is not None:
            self.config["torch_dtype"] = str(self.tensors[first].dtype).removeprefix("torch.")


def _split_name(name: str) -> tuple[str, str]:
    """`model.layers.N.` or `model.`, and the rest."""
    match = re.match(r"model\.(layers\.\d+\.)?", name)
    end = match.end() if match else 0
    return name[:end], name[end:]


def _build_block(pieces: Iterable[tuple[Path, StoredTensor, int, int]]) -> _Block:
    """Rows [first, stop) of each piece under each other."""
    parts: list[StoredRows] = []
    at, rows = 0, 0
    for file, stored, first, stop in pieces:
        shape, dtype = stored.dims, ELEMENT_TYPES[stored.tensor_type]
        row_bytes, passed = prod(shape[1:]) * dtype.itemsize, 0
        begin, end = first * row_bytes, stop * row_bytes
        for offset, length in stored.slices:
            low, high = max(begin, passed), min(end, passed + length)
            if low < high:
                parts.append(StoredRows(file, offset + low - passed, at, at + high - low, (), torch.uint8))
                at += high - low
            passed += length
        rows += stop - first
    return _Block(parts or [StoredRows(file, 0, 0, 0, (), torch.uint8)], (rows, *shape[1:]), dtype)


def _make_column(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(-1, 1) if scale.dim() == 1 else scale


def _decode_dequant_scale(stored: torch.Tensor) -> torch.Tensor:
    """float32 [rows, 1] of int64 [rows] whose low 32 bits are those of the float32."""
    if stored.dtype not in (torch.int64, torch.uint64):
        return _make_column(stored)
    return stored.view(torch.float32).view(-1, 2)[:, :1].contiguous()


def _list_linears(forms: Mapping[str, LinearScheme | None]) -> list[str]:
    """Full names of the linears of all layers that `forms` names, and of the head."""
    layers = dict.fromkeys(_split_name(name)[0] for name in forms if name != "lm_head")
    return [layer + name for layer in layers for name in MINDFORMERS_NAMES] + ["lm_head"]
