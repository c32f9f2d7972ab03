"""Common base of GPTQ and AWQ folders: linears stored as [inputs, outputs] with integers packed in int32 words, read by output row.

    X.qweight  int32 [inputs, outputs], packed along one of the two, depending on the format
    X.qzeros   int32 [groups, ceil(outputs * bits / 32)]
    X.scales   float [groups, outputs]
    X.g_idx    int32 [inputs]; GPTQ only
    X.bias     float [outputs]; zeros, which AutoGPTQ stores for every linear

They are exposed under the names of `model/spec/scheme.py`. A rank's output rows are columns here, so bytes are read by column. The
meaning of the settings and the packing order are up to the formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model.checkpoint.hf_folder import HuggingFaceFolder
from model.spec.config import build_config, read_config
from model.spec.linear_scheme import LinearScheme
from model.spec.packing import unpack_integers
from model.spec.quoting import quote
from model.spec.scheme import declare_scheme, group_linears
from model.spec.tensor_info import TensorInfo
from model.spec.weights import FLOAT_DTYPES, has_bias, stored_linear_names
from parallel.element_type import ElementType
from parallel.errors import CheckpointError, ConfigError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch

_STORED = ("qweight", "qzeros", "scales", "g_idx", "bias")
"""Stored tensors of a quantized linear, which are not exposed under these names."""


class ColumnFolder(HuggingFaceFolder):
    """A Hugging Face folder that can also read columns."""

    def read_columns(self, reader: FileReader, name: str, first: int, last: int) -> torch.Tensor:
        """Return columns [first, last) of all rows of a two-dimensional tensor."""
        file, stored = self._stored[name]
        return reader.read_columns(stored.stored_rows(file), first, last)


class ColumnPackedFolder(ABC):
    """A checkpoint of one of these formats; opening it reads the headers, and the biases, which have to be zero.

    `linears` and `shapes` hold the scheme and [output rows, inputs] of every quantized linear by its full name. Raises CheckpointError
    for tensors that are missing or have another shape or dtype, and for nonzero biases.
    """

    def __init__(self, folder: ColumnFolder, linears: Mapping[str, LinearScheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        self.path, self.files, self.checksums, self.notes = folder.path, folder.files, folder.checksums, folder.notes
        self._folder, self._linears, self._shapes = folder, linears, shapes
        if not shapes:
            raise CheckpointError(
                f"{self.path} declares quantized weights, but 0 of its tensors are a qweight; give the quantized checkpoint"
            )
        model = build_config(folder.config)
        ignore = tuple(name for name in (*stored_linear_names(model), "lm_head") if name not in shapes)
        self.config: dict[str, Any] = declare_scheme(folder.config, group_linears(linears, ignore))
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in folder.tensors.items():
            owner, _, part = name.rpartition(".")
            if owner not in shapes or part not in _STORED or (part == "bias" and has_bias(model, owner)):
                self.tensors[name] = info
            elif part == "qweight":
                self._check_stored(owner)
                given = self._canonical_tensors(owner)
                double = next((name for name in given if name in folder.tensors), None)
                if double is not None:
                    raise CheckpointError(f"{self.path} holds both {owner}.qweight and {double}: give the checkpoint as it was written")
                self.tensors.update(given)
        self._check_biases()

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor.

        Raises CheckpointError when zero points or groups of these rows contradict the settings.
        """
        owner, _, part = name.rpartition(".")
        if owner not in self._shapes or name in self._folder.tensors:
            return self._folder.read_rows(reader, name, start, stop)
        if start == stop:
            return torch.empty((0, *self.tensors[name].shape[1:]), dtype=self.tensors[name].dtype.torch_dtype)
        if part == "weight_packed":
            if self._linears[owner].symmetric:
                self._check_symmetric(reader, owner, start, stop)
            self._check_groups(reader, owner)
            return self._read_weight(reader, owner, start, stop)
        if part == "weight_scale":
            return self._folder.read_columns(reader, f"{owner}.scales", start, stop).T.contiguous()
        if part == "weight_zero_point":
            return self._order_zero_points(
                self._folder.read_columns(reader, f"{owner}.qzeros", start, stop), self._linears[owner].bits
            ).T.contiguous()
        if part == "weight_g_idx":
            return self._read_group_index(reader, owner, start, stop)
        return torch.tensor(self._shapes[owner])[start:stop]

    def check_linear(self, reader: FileReader, linear: str) -> None:
        """Raise CheckpointError if zero points or groups of a linear contradict the settings."""
        if linear not in self._shapes:
            return
        rows, columns = self._shapes[linear]
        if self._linears[linear].symmetric:
            self._check_symmetric(reader, linear, 0, rows)
        self._check_groups(reader, linear)
        if self._linears[linear].act_order:
            self._read_group_index(reader, linear, 0, columns)

    def locate_rows(self, name: str, start: int, stop: int) -> Sequence[StoredRows]:
        """Return where the rows are stored, for tensors that are not packed."""
        owner = name.rpartition(".")[0]
        return self._folder.locate_rows(name, start, stop) if owner not in self._shapes or name in self._folder.tensors else []

    def tokenizer_path(self) -> Path:
        """Return the folder itself."""
        return self._folder.tokenizer_path()

    @abstractmethod
    def _advise_zero_points(self, shifted: set[int], middle: int) -> str:
        """Advise on the zero points of a symmetric checkpoint. `shifted`: their common distance from `middle`, if there is one."""

    @abstractmethod
    def _read_weight(self, reader: FileReader, linear: str, start: int, stop: int) -> torch.Tensor:
        """Return output rows [start, stop) packed along the inputs: int32 [stop - start, ceil(inputs * bits / 32)]."""

    @abstractmethod
    def _order_zero_points(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        """Reorder words of qzeros (any columns) so that the zero point of the first output row, without offset, is in the lowest bits."""

    def _canonical_tensors(self, linear: str) -> dict[str, TensorInfo]:
        (rows, columns), per_word, groups = self._shapes[linear], 32 // self._linears[linear].bits, self._num_groups(linear)
        out = {
            f"{linear}.weight_packed": TensorInfo((rows, -(-columns // per_word)), ElementType.INT32),
            f"{linear}.weight_scale": TensorInfo((rows, groups), self._folder.tensors[f"{linear}.scales"].dtype),
            f"{linear}.weight_shape": TensorInfo((2,), ElementType.INT64),
        }
        if not self._linears[linear].symmetric:
            out[f"{linear}.weight_zero_point"] = TensorInfo((-(-rows // per_word), groups), ElementType.INT32)
        if self._linears[linear].act_order:
            out[f"{linear}.weight_g_idx"] = TensorInfo((columns,), ElementType.INT32)
        return out

    def _num_groups(self, linear: str) -> int:
        return self._linears[linear].num_groups(self._shapes[linear][1])

    def _check_stored(self, linear: str) -> None:
        (rows, columns), groups, integers = self._shapes[linear], self._num_groups(linear), ("int32",)
        needed: dict[str, tuple[tuple[int, ...], tuple[str, ...], bool]] = {
            "scales": ((groups, rows), FLOAT_DTYPES, True),
            "qzeros": ((groups, -(-rows * self._linears[linear].bits // 32)), integers, not self._linears[linear].symmetric),
            "g_idx": ((columns,), integers, self._linears[linear].act_order),
            "bias": ((rows,), FLOAT_DTYPES, False),
        }
        for part, (shape, dtypes, required) in needed.items():
            info = self._folder.tensors.get(f"{linear}.{part}")
            if info is None and required:
                raise CheckpointError(f"{self.path} holds {linear}.qweight, but no {linear}.{part}; copy the whole checkpoint")
            if info is not None and (info.shape != shape or info.dtype_name not in dtypes):
                raise CheckpointError(
                    f"{self.path}: {linear}.{part} is {_describe(info)}, but {dtypes[-1]} {list(shape)} belongs to this "
                    f"qweight and group_size {self._linears[linear].group_size or -1}; compare group_size with the checkpoint"
                )

    def _check_biases(self) -> None:
        reader = FileReader()
        try:
            for linear in self._shapes:
                name = f"{linear}.bias"
                if name not in self._folder.tensors or name in self.tensors:
                    continue
                rows = self._shapes[linear][0]
                wrong = int(self._folder.read_rows(reader, name, 0, rows).count_nonzero())
                if wrong:
                    raise CheckpointError(
                        f"{self.path}: {wrong} of {rows} values of {name} are not 0, but attention_bias and mlp_bias of config.json "
                        "declare none: give the config.json of this checkpoint"
                    )
        finally:
            reader.close()

    def _check_symmetric(self, reader: FileReader, linear: str, start: int, stop: int) -> None:
        name, per_word = f"{linear}.qzeros", 32 // self._linears[linear].bits
        if name not in self._folder.tensors:
            return
        first = start // per_word
        words = self._order_zero_points(self._folder.read_columns(reader, name, first, -(-stop // per_word)), 32 // per_word)
        zero_points = unpack_integers(words, self._linears[linear].bits, stop - first * per_word)[:, start - first * per_word :]
        wrong = int(zero_points.count_nonzero())
        if wrong:
            middle = 1 << (self._linears[linear].bits - 1)
            shifted = {int(zero_points[0, 0])} if bool((zero_points == zero_points[0, 0]).all()) else set()
            raise CheckpointError(
                f"{self.path} declares symmetric weights, but {wrong} of {zero_points.numel()} zero points that {name} holds for rows "
                f"{start} to {stop} are not {middle}{self._advise_zero_points(shifted, middle)}"
            )

    def _check_groups(self, reader: FileReader, linear: str) -> None:
        name, columns = f"{linear}.g_idx", self._shapes[linear][1]
        if name not in self._folder.tensors or self._linears[linear].act_order:
            return
        found = self._folder.read_rows(reader, name, 0, columns)
        wrong = int((found != torch.arange(columns, dtype=torch.int32) // (self._linears[linear].group_size or columns)).count_nonzero())
        if wrong:
            raise CheckpointError(
                f"{self.path} declares groups in the order of the inputs, but {wrong} of {columns} entries of {name} are others; "
                "set desc_act to true"
            )

    def _read_group_index(self, reader: FileReader, linear: str, start: int, stop: int) -> torch.Tensor:
        groups = self._num_groups(linear)
        found = self._folder.read_rows(reader, f"{linear}.g_idx", start, stop)
        wrong = found[(found < 0) | (found >= groups)]
        if len(wrong):
            raise CheckpointError(f"{self.path}: {linear}.g_idx names group {int(wrong[0])}, but there are {groups}; copy it again")
        return found


def quantized_linears(folder: ColumnFolder) -> dict[str, tuple[int, int]]:
    """Return the shape of `qweight` by the full name of its linear. Raises CheckpointError for one that is not int32 [a, b]."""
    out = {}
    for name, info in folder.tensors.items():
        if name.endswith(".qweight"):
            if len(info.shape) != 2 or 0 in info.shape or info.dtype != ElementType.INT32:
                raise CheckpointError(f"{folder.path}: {name} is {_describe(info)}, but int32 of 2 dimensions is needed; export it again")
            out[name.removesuffix(".qweight")] = (info.shape[0], info.shape[1])
    return out


def declares_method(path: Path, method: str, settings_file: str, *, by_default: bool = True) -> bool:
    """Return whether a folder's config.json, or else its settings file, declares this `quant_method`; False if it cannot be read.

    A settings file that names no method is of this one `by_default`. If config.json names one, it takes precedence.
    """
    try:
        declared = read_config(path / "config.json").get("quantization_config")
        named = declared.get("quant_method") if isinstance(declared, dict) else None
        if named is None:
            named = read_config(path / settings_file).get("quant_method", method if by_default else None)
        return isinstance(named, str) and named.lower() == method
    except (ConfigError, OSError):
        return False


def read_settings(folder: ColumnFolder, settings_file: str) -> dict[str, Any]:
    """Return `quantization_config` of config.json, or else of the settings file. Raises ConfigError when there is neither."""
    declared = folder.config.get("quantization_config")
    if declared is not None and not isinstance(declared, dict):
        raise ConfigError(f"quantization_config is {quote(declared)}, but an object is needed")
    return declared or read_config(folder.path / settings_file)


def read_bits(settings: Mapping[str, Any], keys: Iterable[str], allowed: tuple[int, ...]) -> int:
    """Return the bits per weight, from the first of `keys` that is set. Raises ConfigError for values other than `allowed`."""
    bits = _first(settings, keys)
    if type(bits) is not int or bits not in allowed:
        words = " and ".join(map(str, allowed))
        raise ConfigError(
            f"quantization_config: weights of {quote(bits)} bits are not supported; there {'are' if len(allowed) > 1 else 'is'} {words}"
        )
    return bits


def read_group_size(settings: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    """Return the number of inputs that share a scale; None for -1 (the whole row). Raises ConfigError for any other value."""
    size = _first(settings, keys)
    if type(size) is not int or (size < 1 and size != -1):
        raise ConfigError(f"quantization_config: group_size is {quote(size)}, but a whole number of at least 1 is needed, or -1")
    return None if size == -1 else size


def _first(settings: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((settings[key] for key in keys if key in settings), None)


def _describe(info: TensorInfo) -> str:
    return f"{info.dtype_name} {list(info.shape)}"
