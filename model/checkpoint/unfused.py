"""A view of a checkpoint of a family that stores linears of the same input as one (`Architecture.fused`): as separate linears.

Rows of the stored linear are the rows of the linears in turn, so every tensor with rows is cut between them. The view has the config of
the family whose checkpoints hold the same model unfused, and so has every checkpoint that is written from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.checkpoint.notes import HasNotes
from model.checkpoint.source import CheckpointSource, Checksum
from model.checkpoint.stored_facts import ChecksLinears
from model.spec.architecture import Architecture
from model.spec.config import build_config
from model.spec.families import list_architectures
from model.spec.quoting import quote, quote_name
from model.spec.tensor_info import TensorInfo
from model.spec.weights import linear_shape
from parallel.errors import CheckpointError, ConfigError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch

_SHARED = ("weight_g_idx", "input_scale", "input_zero_point", "smooth_scale")
"""Tensors that belong to the input, and so to each of the linears."""
_PACKED_ROWS, _SCALE = "weight_zero_point", "weight_scale"


@dataclass(frozen=True, slots=True)
class _Part:
    """Where one tensor is stored."""

    name: str
    """Of the stored tensor."""
    first: int
    """Its first row there."""
    rows: int
    """Its number of rows."""


def unfuse(source: CheckpointSource) -> CheckpointSource:
    """Return the source itself, or a view of it if its family stores fused linears. Raises ConfigError for an invalid config."""
    kind = source.config.get("model_type")
    family = list_architectures().get(kind) if isinstance(kind, str) else None
    return source if family is None or family.stored_as is None else UnfusedSource(source, family)


class UnfusedSource:
    """The view. Raises CheckpointError for tensors whose rows cannot be cut."""

    def __init__(self, whole: CheckpointSource, family: Architecture) -> None:
        self._whole, self._family = whole, family
        self.path: Path = whole.path
        self.files: Sequence[Path] = whole.files
        self.checksums: Mapping[Path, Checksum] = whole.checksums
        self.notes = tuple(whole.notes) if isinstance(whole, HasNotes) else ()
        self._config = build_config(whole.config, str(whole.path / "config.json"))
        self.config = _rewrite_config(whole.config, family)
        self._parts: dict[str, _Part] = {}
        self._shapes: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in whole.tensors.items():
            self._add(name, info)

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor."""
        if name in self._shapes:
            return self._shapes[name][start:stop]
        part = self._parts[name]
        return self._whole.read_rows(reader, part.name, part.first + start, part.first + stop)

    def locate_rows(self, name: str, start: int, stop: int) -> Sequence[StoredRows]:
        """Return where the rows are stored."""
        if name in self._shapes:
            return []
        part = self._parts[name]
        return [
            cut
            for stored in self._whole.locate_rows(part.name, part.first + start, part.first + stop)
            if (cut := _cut(stored, part.first, part.first + part.rows)) is not None
        ]

    def check_linear(self, reader: FileReader, linear: str) -> None:
        """Raise CheckpointError if stored zero points or groups contradict the settings."""
        if isinstance(self._whole, ChecksLinears):
            layer, short = linear.rsplit(".", 2)[0], ".".join(linear.split(".")[-2:])
            stored = next((fused for fused, names in self._family.fused.items() if short in names), None)
            self._whole.check_linear(reader, linear if stored is None else f"{layer}.{stored}")

    def tokenizer_path(self) -> Path | None:
        """Return the tokenizer of the checkpoint."""
        return self._whole.tokenizer_path()

    def _add(self, name: str, info: TensorInfo) -> None:
        owner, _, part = name.rpartition(".")
        layer, short = owner.rpartition(".")[0].rpartition(".")[0], ".".join(owner.split(".")[-2:])
        linears = self._family.fused.get(short)
        if linears is None:
            self._parts[name] = _Part(name, 0, info.shape[0] if info.shape else 1)
            self.tensors[name] = info
            return
        sizes = [linear_shape(self._config, linear) for linear in linears]
        first, total = 0, sum(rows for rows, _ in sizes)
        for linear, (rows, columns) in zip(linears, sizes, strict=True):
            target = f"{layer}.{linear}.{part}"
            if part == "weight_shape":
                self._shapes[target], self.tensors[target] = torch.tensor([rows, columns]), info
            elif part in _SHARED or (part == _SCALE and info.shape == (1,)):
                self._parts[target], self.tensors[target] = _Part(name, 0, info.shape[0] if info.shape else 1), info
            else:
                per_row = self._find_rows_per_row(name, part, info, total)
                if first % per_row or rows % per_row:
                    raise CheckpointError(
                        f"{self.path}: {quote_name(name)} packs rows of {linears[0]} and others together: unpack it first"
                    )
                self._parts[target] = _Part(name, first // per_row, rows // per_row)
                self.tensors[target] = TensorInfo((rows // per_row, *info.shape[1:]), info.dtype)
            first += rows

    def _find_rows_per_row(self, name: str, part: str, info: TensorInfo, total: int) -> int:
        """Return the number of output rows that a stored row holds."""
        found = info.shape[0] if info.shape else 1
        if part == _SCALE and 0 < found < total and total % found == 0:  # FP8 blocks
            return total // found
        if part == _PACKED_ROWS and found in (-(-total // 8), -(-total // 4)):
            return 8 if found == -(-total // 8) else 4
        if found != total:
            raise CheckpointError(f"{self.path}: {quote_name(name)} has {found} rows, but the config needs {total}")
        return 1


def _cut(stored: StoredRows, first: int, last: int) -> StoredRows | None:
    """Return the rows of a location that are in [first, last), counted from `first`; None if there are none."""
    start, stop = max(stored.start, first), min(stored.stop, last)
    if start >= stop:
        return None
    offset = stored.offset_bytes + (start - stored.start) * stored.row_bytes
    return replace(stored, offset_bytes=offset, start=start - first, stop=stop - first)


def _rewrite_config(raw: Mapping[str, Any], family: Architecture) -> dict[str, Any]:
    """Return the values of the config of the family that stores the same model unfused."""
    target = list_architectures()[str(family.stored_as)]
    config = {**family.defaults, **{key: value for key, value in raw.items() if value is not None}}
    for key in ("auto_map", "original_max_position_embeddings"):
        config.pop(key, None)
    config |= {"model_type": target.model_type, "architectures": [target.class_names[0]]}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and isinstance(quantization.get("ignore"), list):
        ignore = [name for entry in quantization["ignore"] for name in _split_names(entry, family)]
        config["quantization_config"] = {**quantization, "ignore": ignore}
    return config


def _split_names(entry: Any, family: Architecture) -> list[Any]:
    """Return the linears that an entry of `ignore` names."""
    fused = next((name for name in family.fused if isinstance(entry, str) and name.rpartition(".")[2] in entry), None)
    if fused is None:
        return [entry]
    if not entry.endswith(f".{fused}") or entry.startswith("re:"):
        raise ConfigError(f"quantization_config: ignore {quote(entry)} names fused linears by a pattern: give their full names")
    return [entry.removesuffix(fused) + linear for linear in family.fused[fused]]
