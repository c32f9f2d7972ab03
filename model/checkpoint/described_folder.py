"""Folders of Golden Stick 1.4 and ModelSlim: Hugging Face names, int8 weights, and a JSON file that describes every tensor.

    X.weight         int8 [rows, columns]    W8A16, W8A8, W8A8_DYNAMIC; float if described as FLOAT
    X.weight_scale   float [rows, 1]         W8A16, W8A8_DYNAMIC
    X.weight_offset  float [rows, 1]         zeros: only symmetric weights are supported
    X.input_scale, X.input_offset  [1]       W8A8: activations as round(x / scale + offset)
    X.deq_scale      float32, or int64 with its bits, [rows]   W8A8: input scale times weight scale
    X.quant_bias     int32 [rows]            W8A8: -offset times the sum of the row; implied by the offset here

They are exposed under the names of `model/spec/scheme.py`. Opening reads the description, headers, offsets and a few rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.checkpoint.checksum_file import read_sha256sums
from model.checkpoint.hf_folder import untie_head
from model.checkpoint.mindspore_rows import decode_dequant_scale, make_column
from model.checkpoint.safetensors_file import StoredTensor, read_header
from model.spec.config import build_config, read_config
from model.spec.linear_scheme import LinearScheme
from model.spec.quoting import quote, quote_name
from model.spec.scheme import declare_scheme, group_linears
from model.spec.tensor_info import TensorInfo
from model.spec.weights import stored_linear_names
from parallel.element_type import ElementType
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch

_DESCRIPTION = re.compile(r"quant(ization|_model)_description.*\.json")
_FORMS: Mapping[str, LinearScheme | None] = {
    "FLOAT": None,
    "W8A16": LinearScheme(packed=False),
    "W8A8_DYNAMIC": LinearScheme(packed=False, activation="token"),
    "W8A8": LinearScheme(packed=False, activation="tensor", activation_symmetric=False),
}
"""By the value in the description; None: float."""
_PARTS: Mapping[str, tuple[str, ...]] = {
    "W8A16": ("weight", "weight_scale"),
    "W8A8_DYNAMIC": ("weight", "weight_scale"),
    "W8A8": ("weight", "input_scale", "input_offset", "deq_scale", "quant_bias"),
}
"""Required tensors of a linear of each form."""
_OPTIONAL = ("weight_offset", "weight_scale")
_INDEX_SUFFIX = ".safetensors.index.json"
_OWN_FILES = ("quant",)
"""Start of the names that Golden Stick and ModelSlim give to files of weights."""
_SAMPLED_ROWS = 4


def is_described(path: Path) -> bool:
    """Return whether a folder holds safetensors and a description of its tensors."""
    return path.is_dir() and _find_description(path) is not None and any(path.glob("*.safetensors"))


class DescribedFolder:
    """Such a folder as a CheckpointSource.

    Raises CheckpointError for missing or truncated files and for unsupported forms and offsets; ConfigError for config.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_config(path / "config.json")
        description = _read_description(path)
        self.files = _find_files(path)
        self.checksums = read_sha256sums(path, self.files)
        self._stored: dict[str, tuple[Path, StoredTensor]] = {}
        for file in self.files:
            for name, stored in read_header(file).items():
                if name in self._stored:
                    raise CheckpointError(f"{name} is in both {self._stored[name][0]} and {file}: copy the checkpoint again")
                self._stored[name] = (file, stored)
        self.notes = untie_head(config, self._stored, path)
        self._convert: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {}
        self._constants: dict[str, torch.Tensor] = {}
        forms = self._find_forms([*stored_linear_names(build_config(config)), "lm_head"], description)
        taken = self._add_linears(forms)
        for name in self._stored:
            if name not in taken:
                self._convert[name] = (name, _same)
        self.tensors = {name: TensorInfo.of(tensor) for name, tensor in self._constants.items()}
        for name, (source, convert) in self._convert.items():
            info = self._stored[source][1].info
            sample = convert(torch.empty((0, *info.shape[1:]), dtype=info.dtype.torch_dtype))
            self.tensors[name] = replace(TensorInfo.of(sample), shape=(*info.shape[:1], *sample.shape[1:]))
        quantized = {name: linear for name, form in forms.items() if (linear := _FORMS[form]) is not None}
        ignore = tuple(name for name in forms if name not in quantized) if quantized else ()
        self.config: dict[str, Any] = declare_scheme(config, group_linears(quantized, ignore))

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor."""
        if name in self._constants:
            return self._constants[name][start:stop].clone()
        source, convert = self._convert[name]
        file, stored = self._stored[source]
        return convert(reader.read_rows([stored.stored_rows(file)], start, stop))

    def locate_rows(self, name: str, start: int, stop: int) -> Sequence[StoredRows]:
        """Return where the rows are stored, for tensors that are not converted."""
        if name in self._constants or self._convert[name][1] is not _same:
            return []
        file, stored = self._stored[self._convert[name][0]]
        return [stored.stored_rows(file)]

    def tokenizer_path(self) -> Path:
        """Return the folder itself."""
        return self.path

    def _find_forms(self, linears: list[str], description: Mapping[str, str]) -> dict[str, str]:
        """Return the form of each linear present."""
        forms: dict[str, str] = {}
        for linear in linears:
            if f"{linear}.weight" not in self._stored:
                continue  # a tied head, or a missing tensor, which is reported elsewhere
            form = description.get(f"{linear}.weight")
            if form is None:
                raise CheckpointError(f"{self.path}: its description does not say how {linear}.weight is stored: copy the checkpoint again")
            if form not in _FORMS:
                raise CheckpointError(
                    f"{self.path} stores {linear} as {quote(form)}, but only {', '.join(_FORMS)} can be read: quantize to one of them"
                )
            forms[linear] = form
        return forms

    def _add_linears(self, forms: Mapping[str, str]) -> set[str]:
        """Add the tensors of quantized linears; return the stored names they use."""
        taken: set[str] = set()
        reader = FileReader()
        try:
            for linear, form in forms.items():
                if form == "FLOAT":
                    continue
                missing = [part for part in _PARTS[form] if f"{linear}.{part}" not in self._stored]
                if missing:
                    raise CheckpointError(f"{self.path} describes {linear} as {form}, but holds no {linear}.{missing[0]}: copy it again")
                taken |= {f"{linear}.{part}" for part in (*_PARTS[form], *_OPTIONAL)}
                self._check_weight(reader, linear)
                self._convert[f"{linear}.weight"] = (f"{linear}.weight", _same)
                if form == "W8A8":
                    self._add_static(reader, linear)
                else:
                    self._convert[f"{linear}.weight_scale"] = (f"{linear}.weight_scale", make_column)
        finally:
            reader.close()
        return taken

    def _check_weight(self, reader: FileReader, linear: str) -> None:
        """Check that the weight is int8 and its offsets are zero."""
        info = self._stored[f"{linear}.weight"][1].info
        if info.dtype != ElementType.INT8 or len(info.shape) != 2:
            raise CheckpointError(
                f"{self.path}: {linear}.weight is {info.dtype_name} {list(info.shape)}, but int8 [rows, columns] is needed"
            )
        for part in ("weight_scale", "weight_offset", "deq_scale", "quant_bias"):
            found = self._stored.get(f"{linear}.{part}")
            if found is not None and found[1].info.shape not in ((info.shape[0],), (info.shape[0], 1)):
                raise CheckpointError(
                    f"{self.path}: {linear}.{part} has the shape {list(found[1].info.shape)}, but one value for each of {info.shape[0]} "
                    "rows is needed: quantize by channel"
                )
        offset = f"{linear}.weight_offset"
        if offset in self._stored and (count := int(self._read(reader, offset).count_nonzero())):
            raise CheckpointError(
                f"{self.path}: {count} of {info.shape[0]} values of {offset} are not 0, but only symmetric int8 weights can be read: "
                "quantize with symmetric weights"
            )

    def _add_static(self, reader: FileReader, linear: str) -> None:
        scale, offset = (self._read(reader, f"{linear}.{part}").flatten() for part in ("input_scale", "input_offset"))
        if len(scale) != 1 or len(offset) != 1:
            raise CheckpointError(f"{self.path}: {linear}.input_scale has {len(scale)} values, but one for all channels is needed")
        zero = float(offset[0])
        if not (zero.is_integer() and -128 <= zero <= 127 and float(scale[0]) > 0):
            raise CheckpointError(
                f"{self.path}: {linear}.input_offset is {zero} and input_scale {float(scale[0])}, but a whole number from -128 to 127 and "
                "a positive scale are needed: copy the checkpoint again"
            )
        self._check_bias(reader, linear, int(zero))
        divisor = float(scale[0])
        self._constants[f"{linear}.input_scale"] = scale.float()
        self._constants[f"{linear}.input_zero_point"] = offset.to(torch.int8)
        self._convert[f"{linear}.weight_scale"] = (f"{linear}.deq_scale", lambda stored: decode_dequant_scale(stored).float() / divisor)

    def _check_bias(self, reader: FileReader, linear: str, zero: int) -> None:
        """Check in a few rows that the bias only compensates for the zero point; checking all would read the whole weight."""
        file, stored = self._stored[f"{linear}.weight"]
        bias, rows = self._read(reader, f"{linear}.quant_bias").flatten(), stored.info.shape[0]
        for row in sorted({number * (rows - 1) // max(1, _SAMPLED_ROWS - 1) for number in range(_SAMPLED_ROWS)}):
            total = int(reader.read_rows([stored.stored_rows(file)], row, row + 1).sum(dtype=torch.int64))
            if int(bias[row]) != -zero * total:
                raise CheckpointError(
                    f"{self.path}: {linear}.quant_bias is {int(bias[row])} in row {row}, but its input_offset gives {-zero * total}: the "
                    "linear has a bias of its own, which is not supported"
                )

    def _read(self, reader: FileReader, name: str) -> torch.Tensor:
        file, stored = self._stored[name]
        return reader.read_rows([stored.stored_rows(file)], 0, stored.info.shape[0] if stored.info.shape else 1)


def _same(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _find_description(path: Path) -> Path | None:
    found = sorted(file for file in path.glob("quant*_description*.json") if _DESCRIPTION.fullmatch(file.name))
    return found[0] if found else None


def _read_description(path: Path) -> dict[str, str]:
    file = _find_description(path)
    if file is None:
        raise CheckpointError(f"{path} holds no quantization_description.json or quant_model_description*.json: copy the whole checkpoint")
    try:
        named = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): str(form) for name, form in named.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{file} does not hold the form of each tensor as a JSON object: copy it again") from None


def _find_files(path: Path) -> list[Path]:
    """Return the files of the index, or else all files; those of the quantizer, where a folder also holds the original's."""
    files = sorted(path.glob("*.safetensors"))
    own = [file for file in files if file.name.startswith(_OWN_FILES)]
    maps = {index: _read_weight_map(index) for index in sorted(path.glob(f"*{_INDEX_SUFFIX}"))}
    whole = {index: names for index, names in maps.items() if all((path / name).is_file() for name in names.values())}
    if len(whole) > 1:
        whole = {index: names for index, names in whole.items() if all(name.startswith(_OWN_FILES) for name in names.values())} or whole
    if not maps or (own and not any(name.startswith(_OWN_FILES) for names in maps.values() for name in names.values())):
        return own or files
    index, names = next(iter((whole or maps).items()))
    files = [path / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} of its {len(files)} files, {quote_name(missing[0])} first: copy them")
    headers = {file.name: read_header(file) for file in files}
    wrong = [name for name, file in names.items() if name not in headers[file]]
    if wrong:
        raise CheckpointError(
            f"{index} lists {quote_name(wrong[0])}, which is not in {quote_name(names[wrong[0]])}: copy the checkpoint again"
        )
    return files


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} has no readable weight_map") from None
    outside = next((file for file in names.values() if not re.fullmatch(r"[^/\\\0]+\.safetensors", file)), None)
    if outside is not None:
        raise CheckpointError(f"{index} names {quote(outside)}, which is no safetensors file of its folder")
    return names
