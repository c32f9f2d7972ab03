"""The work folder of a quantization, next to its output: collects finished layers, so that an interrupted run can resume.

    recipe.json                        description of the work; a different one starts over
    layer_0003.rank_1_of_2.safetensors rows quantized by one rank, unpacked
    layer_0003.json                    report of the layer; written last
    hidden_0004.safetensors            input of layer 4, for all samples

All writes are atomic. Does not depend on the contents of the files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from model.checkpoint.folder_writing import write_json
from model.checkpoint.safetensors_file import SafetensorsWriter, read_header
from model.spec.tensor_info import TensorInfo
from parallel.element_type import ElementType
from parallel.lazy_torch import torch

_RECIPE_FILE = "recipe.json"


class WorkFolder:
    """The work of `world_size` ranks."""

    def __init__(self, path: Path, world_size: int) -> None:
        self.path, self._world_size = path, world_size

    def open(self, description: Mapping[str, Any]) -> int:
        """Start or resume the work described by `description` (JSON); return the number of finished layers."""
        text = json.loads(json.dumps(description))
        file = self.path / _RECIPE_FILE
        try:
            same = json.loads(file.read_text(encoding="utf-8")) == text
        except (OSError, ValueError):
            same = False
        if not same:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            write_json(file, text)
        return self.count_done()

    def count_done(self) -> int:
        """Return the number of finished layers, counted from the first one."""
        done = 0
        while self._report_file(done).exists():
            done += 1
        return done

    def write_rank(self, layer: int, rank: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one rank's part of a layer."""
        _write(self._rank_file(layer, rank), tensors)

    def finish_layer(self, layer: int, report: list[dict[str, Any]], hidden: torch.Tensor | None) -> None:
        """Mark a layer as finished, once all ranks have written it. `hidden`: input of the next one."""
        if hidden is not None:
            _write(self._hidden_file(layer + 1), {"hidden": hidden})
        partial = self._report_file(layer).with_suffix(".partial")
        write_json(partial, report)
        partial.rename(self._report_file(layer))
        self._hidden_file(layer).unlink(missing_ok=True)

    def read_hidden(self, layer: int) -> torch.Tensor:
        """Return the input of `layer`."""
        with safe_open(self._hidden_file(layer), framework="pt") as file:
            hidden: torch.Tensor = file.get_tensor("hidden")
        return hidden

    def read_reports(self) -> list[dict[str, Any]]:
        """Return the reports of all layers, concatenated."""
        reports: list[dict[str, Any]] = []
        for layer in range(self.count_done()):
            reports += json.loads(self._report_file(layer).read_text(encoding="utf-8"))
        return reports

    def read_ranks(self, layer: int) -> list[dict[str, torch.Tensor]]:
        """Return the tensors of a layer, memory-mapped, one dict per rank."""
        ranks = []
        for rank in range(self._world_size):
            with safe_open(self._rank_file(layer, rank), framework="pt") as file:
                ranks.append({name: file.get_tensor(name) for name in file.keys()})
        return ranks

    def read_dtypes(self, layer: int) -> dict[str, ElementType]:
        """Return the dtypes of a layer's tensors."""
        return {name: stored.info.dtype for name, stored in read_header(self._rank_file(layer, 0)).items()}

    def remove(self) -> None:
        """Delete the folder when the work is finished."""
        shutil.rmtree(self.path)

    def _rank_file(self, layer: int, rank: int) -> Path:
        return self.path / f"layer_{layer:04d}.rank_{rank}_of_{self._world_size}.safetensors"

    def _report_file(self, layer: int) -> Path:
        return self.path / f"layer_{layer:04d}.json"

    def _hidden_file(self, layer: int) -> Path:
        return self.path / f"hidden_{layer:04d}.safetensors"


def describe_samples(samples: list[tuple[int, ...]]) -> str:
    """Hash the samples, to detect different ones."""
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, infos) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
