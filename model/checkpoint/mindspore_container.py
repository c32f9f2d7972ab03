"""A MindSpore checkpoint without a config: its tensors under their own names, and the inconsistencies detectable without a config.

Shapes are not compared with those of any model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.checkpoint.fused_order import OrderEvidence, weigh_orders
from model.checkpoint.mindspore_encryption import EncryptedFile
from model.checkpoint.mindspore_folder import find_files
from model.checkpoint.mindspore_header import ELEMENT_TYPES, STRING, StoredTensor
from model.checkpoint.mindspore_layout import Arrangement, arrange_ranks
from model.checkpoint.mindspore_names import CACHE_ZEROS, FORMS, FUSED_NAMES, LEFTOVERS, LINEAR_NAMES, PLAIN_NAMES, ROLES, split_name
from model.checkpoint.mindspore_order import sample_fused
from model.checkpoint.mindspore_rows import RowRuns, build_block
from model.checkpoint.mindspore_safetensors import read_any_header
from model.spec.quoting import quote_name
from model.spec.tensor_info import TensorInfo
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch

_FRAME = ("model.tok_embeddings.embedding_weight", "model.norm_out.weight")
"""Required outside the layers in every model."""


class MindSporeContainer:
    """The files of a checkpoint as a CheckpointSource of raw tensors. With several files, names start with the file's name.

    Raises CheckpointError for files that are missing, corrupt or cannot be decrypted.
    """

    def __init__(self, path: Path, key_file: Path | None = None) -> None:
        self.path = path
        self.config: dict[str, Any] = {}
        self._ranks = find_files(path)
        self.files = [file for files in self._ranks for file in files]
        reader = FileReader()
        try:
            headers = {file: read_any_header(file, reader, key_file) for file in self.files}
        finally:
            reader.close()
        self.checksums = {file: header.checksum for file, header in headers.items() if header.checksum}
        self._encrypted: dict[Path, EncryptedFile] = {file: one.encrypted for file, one in headers.items() if one.encrypted}
        self._headers = {file: header.tensors for file, header in headers.items()}
        self._stored: dict[str, tuple[Path, StoredTensor]] = {}
        for file, header in self._headers.items():
            prefix = f"{file.relative_to(path)}: " if len(self.files) > 1 else ""
            self._stored |= {prefix + name: (file, stored) for name, stored in header.items() if stored.tensor_type != STRING}
        self.tensors = {name: TensorInfo(stored.dims, ELEMENT_TYPES[stored.tensor_type]) for name, (_, stored) in self._stored.items()}

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor; a scalar is one row."""
        file, stored = self._stored[name]
        rows = StoredTensor(stored.dims or (1,), stored.tensor_type, stored.slices)
        return build_block([(file, rows, RowRuns(start, stop - start))], self._encrypted).read(reader, 0, stop - start)

    def locate_rows(self, name: str, start: int, stop: int) -> Sequence[StoredRows]:
        """Return nothing: encrypted files have no locations."""
        return []

    def tokenizer_path(self) -> Path | None:
        """Return None: running the model needs a config, and so does the tokenizer."""
        return None

    def list_problems(self) -> list[str]:
        """Describe inconsistencies: ranks that do not belong together, layers with missing names, names that no model has."""
        try:
            names = list(self._arrange().parts)
        except CheckpointError as error:
            return [str(error)]
        return [*_find_gaps(names), *_find_unknown(names)]

    def examine_order(self) -> OrderEvidence | None:
        """Return the evidence of the w_gate_hidden rows on the row order of fused weights; None if there are none."""
        reader = FileReader()
        try:
            samples = sample_fused(self._arrange().parts, FUSED_NAMES[1], None, self._encrypted, reader)
        except CheckpointError:
            return None  # reported as a separate problem
        finally:
            reader.close()
        return weigh_orders(samples) if samples else None

    def _arrange(self) -> Arrangement:
        reader = FileReader()
        try:
            return arrange_ranks(self.path, self._ranks, self._headers, {}, self._encrypted, reader)
        finally:
            reader.close()


def _find_gaps(names: Sequence[str]) -> list[str]:
    """Return names missing from layers, compared with other layers and within each linear."""
    layers: dict[int, dict[str, set[str]]] = {}
    for name in names:
        if (match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)) and not LEFTOVERS.fullmatch(name):
            linear, role = _split_linear(match[2])
            layers.setdefault(int(match[1]), {}).setdefault(linear, set()).add(role)
    if not layers:
        return ["no tensor of a layer of MindFormers' Llama (model.layers.N.)"]
    problems = [f"layer {number} is missing" for number in range(max(layers)) if number not in layers]
    every = set().union(*layers.values())
    for number, found in sorted(layers.items()):
        if lacking := sorted(every - found.keys()):
            problems.append(f"layer {number} has no {lacking[0]}, which other layers have")
        for linear, roles in found.items():
            if roles != {""} and frozenset(roles - {"bias"}) not in FORMS:
                problems.append(f"layer {number}: {linear} has only {', '.join(sorted(roles))}, which is no whole linear")
    return problems + [f"{name} is missing" for name in _FRAME if name not in names]


def _find_unknown(names: Sequence[str]) -> list[str]:
    unknown = [name for name in names if not _is_known(name)]
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return [f"{quote_name(unknown[0])}{more}: not a tensor of MindFormers' Llama"] if unknown else []


def _is_known(name: str) -> bool:
    _, rest = split_name(name)
    is_linear = rest.startswith("lm_head.") and rest.removeprefix("lm_head.") in ROLES
    return (
        is_linear
        or _split_linear(rest)[1] != ""
        or rest in PLAIN_NAMES
        or LEFTOVERS.fullmatch(name) is not None
        or name.endswith(CACHE_ZEROS)
    )


def _split_linear(rest: str) -> tuple[str, str]:
    """Split a name into the linear's name in its layer and the tensor's role; other names are returned whole, with an empty role."""
    for linear in LINEAR_NAMES:
        if rest.startswith(f"{linear}.") and (role := ROLES.get(rest[len(linear) + 1 :])):
            return linear, role
    return rest, ""
