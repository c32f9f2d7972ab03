"""A LoRA adapter in PEFT's format: adapter_config.json with adapter_model.safetensors. Opening it reads the headers only.

Every tensor of the file has to belong to a linear of the base model, and every linear that the config names has to have its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from model.checkpoint.fingerprint import Fingerprint, read_fingerprint
from model.checkpoint.hf_folder import check_link
from model.checkpoint.safetensors_file import StoredTensor, read_header
from model.spec.config import DTYPES, LlamaConfig
from model.spec.families import list_architectures
from model.spec.lora_config import CONFIG_FILE, read_lora_config
from model.spec.lora_updates import LoraUpdate, count_adapter_bytes, plan_linears
from model.spec.quoting import quote_name
from model.spec.tensor_info import TensorInfo
from model.spec.weights import WeightSpec
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?:model\.)?(?:language_model\.)?(?:model\.)?(layers\.\d{1,5}\..+)\.lora_(A|B)\.weight")
_UNSUPPORTED = {
    "lora_magnitude_vector": "DoRA is not supported",
    "lora_embedding_": "adapters of embeddings are not supported",
    "embed_tokens": "adapters of embeddings are not supported",
    "lm_head": "adapters of the output head are not supported",
    ".experts.": "adapters of experts are not supported",
    ".gate.": "adapters of routers are not supported",
    ".bias": "trained biases are not supported",
    "norm": "trained norms are not supported",
}
"""Explanations of tensors that are not of a linear, by a part of the name."""


class LoraFolder:
    """An opened adapter. Raises CheckpointError for one that is incomplete, that cannot be served, or that does not fit the base model."""

    def __init__(self, path: Path, base: LlamaConfig, *, follow_links: bool = False) -> None:
        """`base`: the model that it is added to. `follow_links`: see `check_link`."""
        self.path = path
        self.settings = read_lora_config(path)
        self.config: dict[str, Any] = asdict(self.settings)
        file = path / WEIGHTS_FILE
        if not file.is_file():
            raise CheckpointError(_explain_absence(path))
        check_link(file, follow_links=follow_links)
        self.files = [file]
        self._base = base
        self._stored: dict[str, StoredTensor] = {}
        """By the name of the stored linear and "A" or "B"."""
        for name, stored in read_header(file).items():
            match = _TENSOR.fullmatch(name)
            if match is None:
                self._refuse_tensor(name)
            self._stored[f"model.{match[1]}.{match[2]}"] = stored
        self.tensors: Mapping[str, TensorInfo] = {name: stored.info for name, stored in self._stored.items()}
        if not self._stored:
            raise CheckpointError(f"{file} holds no tensors")
        self.updates: Mapping[str, LoraUpdate] = self._plan_updates()
        """The update of each linear that it changes, by full name."""
        self._check_complete()

    @property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of config and weights."""
        return read_fingerprint(self, self.settings)

    def count_bytes(self, rank: int, world_size: int) -> int:
        """Return the bytes that a rank keeps."""
        return count_adapter_bytes(self._base, self.updates, rank, world_size)

    def read_a(self, reader: FileReader, stored: str) -> torch.Tensor:
        """Return lora_A of a stored linear, float32 [rank, columns]."""
        name = f"{stored}.A"
        return self.read_rows(reader, name, 0, self.tensors[name].shape[0]).float()

    def read_b(self, reader: FileReader, update: LoraUpdate, start: int, stop: int) -> torch.Tensor:
        """Return lora_B of rows [start, stop) of a linear, float32 [rows, rank]."""
        return self.read_rows(reader, f"{update.stored}.B", update.first_row + start, update.first_row + stop).float()

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor, as stored."""
        return reader.read_rows(self.locate_rows(name, start, stop), start, stop)

    def locate_rows(self, name: str, start: int, stop: int) -> list[StoredRows]:
        """Return where the rows are stored."""
        return [self._stored[name].stored_rows(self.files[0])]

    def _refuse_tensor(self, name: str) -> NoReturn:
        words = next((words for part, words in _UNSUPPORTED.items() if part in name), "only lora_A and lora_B of linears are supported")
        raise CheckpointError(f"{self.files[0]} holds {quote_name(name)}, but {words}: merge the adapter into its base model instead")

    def _plan_updates(self) -> dict[str, LoraUpdate]:
        specs = plan_linears(self._base)
        updates: dict[str, LoraUpdate] = {}
        fused = {one: parts for family in list_architectures().values() for one, parts in family.fused.items()}
        for stored in sorted({name.rpartition(".")[0] for name in self._stored}):
            prefix, short = stored.rsplit(".", 2)[0], ".".join(stored.split(".")[-2:])
            names = [stored] if stored in specs or short not in fused else [f"{prefix}.{part}" for part in fused[short]]
            unknown = next((name for name in names if name not in specs), None)
            if unknown is not None:
                if ".experts." in stored or short.endswith(".gate"):
                    self._refuse_tensor(f"{stored}.")
                raise CheckpointError(
                    f"{self.files[0]} changes {quote_name(stored)}, which the base model does not have{self._name_base()}"
                )
            self._check_shapes(stored, [specs[name] for name in names])
            first, scale, rank = 0, self.settings.find_scale(stored), self.settings.find_rank(stored)
            for name in names:
                if name in updates:
                    raise CheckpointError(f"{self.files[0]} changes {name} twice, also as {updates[name].stored}")
                updates[name] = LoraUpdate(name=name, rank=rank, scale=scale, stored=stored, first_row=first)
                first += specs[name].shape[0]
        return updates

    def _check_shapes(self, stored: str, specs: list[WeightSpec]) -> None:
        rank, columns, rows = self.settings.find_rank(stored), specs[0].shape[1], sum(spec.shape[0] for spec in specs)
        for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            info = self.tensors.get(f"{stored}.{letter}")
            if info is None:
                raise CheckpointError(f"{self.files[0]} lacks lora_{letter} of {stored}: copy it again")
            if info.dtype_name not in DTYPES:
                raise CheckpointError(
                    f"{self.files[0]}: lora_{letter} of {stored} is {info.dtype_name}, but {' or '.join(DTYPES)} is needed"
                )
            if info.shape != shape:
                words = "" if info.shape[:2] != shape and rank not in info.shape else self._name_base()
                reason = f"rank {rank} and the base model need {list(shape)}"
                raise CheckpointError(f"{self.files[0]}: lora_{letter} of {stored} has shape {list(info.shape)}, but {reason}{words}")

    def _name_base(self) -> str:
        return f"; the adapter was trained on {quote_name(self.settings.base)}" if self.settings.base else ""

    def _check_complete(self) -> None:
        """Check the tensors against the names in the config."""
        file, settings = self.path / CONFIG_FILE, self.settings
        changed = {update.stored for update in self.updates.values()}
        for name in changed:
            if settings.changes(name) is False:
                raise CheckpointError(f"{self.files[0]} changes {name}, which the target_modules of {file} do not name")
        if settings.targets is None:
            return
        # The adapter may know several linears as one.
        fused = {".".join(name.split(".")[3:]) for name in changed - self.updates.keys()}
        known = {f"model.layers.{layer}.{name}" for layer in range(self._base.num_hidden_layers) for name in fused}
        known |= {name for name in plan_linears(self._base) if name not in self.updates}
        missing = next((name for name in sorted(known) if settings.changes(name) and name not in changed), None)
        if missing is not None:
            raise CheckpointError(f"{self.files[0]} holds no update of {missing}, which the target_modules of {file} name: copy it again")
        for target in settings.targets:
            if not any(name == target or name.endswith(f".{target}") for name in changed) and settings.layers is None:
                raise CheckpointError(f"{file}: target_modules names {quote_name(target)}, but no linear of the base model has this name")


def _explain_absence(path: Path) -> str:
    if (path / _PICKLE_FILE).is_file():
        return f"{path} holds {_PICKLE_FILE}, a pickle: load it with PEFT and save it again, which writes {WEIGHTS_FILE}"
    return f"{path} has no {WEIGHTS_FILE}, which PEFT's save_pretrained writes"
