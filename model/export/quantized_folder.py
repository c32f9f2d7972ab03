"""Combine the quantized layers in a work folder with the tensors that stay float, into a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.checkpoint.folder_writing import write_json
from model.checkpoint.hf_folder import HuggingFaceFolder
from model.checkpoint.source import CheckpointSource
from model.export.conversion import read_whole, write_checkpoint
from model.export.mindspore import write_mindspore
from model.quantization.work_folder import WorkFolder
from model.spec.config import LlamaConfig
from model.spec.packing import pack_integers
from model.spec.scheme import Scheme, declare_scheme
from model.spec.tensor_info import TensorInfo
from model.spec.weights import WeightSpec, plan_weights
from parallel.element_type import ElementType
from parallel.file_slices import FileReader
from parallel.lazy_torch import torch

REPORT_FILE = "quantization_report.json"


def write_quantized(
    source: CheckpointSource,
    config: LlamaConfig,
    scheme: Scheme,
    work: WorkFolder,
    target: Path,
    report: dict[str, Any],
    on_progress: Callable[[int, int], None],
    float_dtype: str | None = None,
    ckpt: str | None = None,
) -> None:
    """Write the checkpoint atomically. Memory: one layer as integers. `float_dtype`: of the weights that stay float; None: as stored.

    Also writes `report`, with the bytes of the tensors under "written_bytes". `ckpt`: path in the folder of a MindSpore file with the
    same tensors; None for none.
    """
    is_untied = config.tie_word_embeddings and scheme.is_quantized("lm_head")
    config = replace(config, tie_word_embeddings=config.tie_word_embeddings and not is_untied)
    specs, floats = plan_weights(config, scheme), plan_weights(config, Scheme())
    layers = {name: _layer_of(name, config) for name in specs}
    dtypes = {name: dtype for layer in range(config.num_hidden_layers + 1) for name, dtype in work.read_dtypes(layer).items()}
    tensors: dict[str, TensorInfo] = {}
    groups: list[tuple[str, tuple[str, ...]]] = []
    reader = FileReader()
    loaded: tuple[int, dict[str, torch.Tensor]] = (-1, {})

    def plain_dtype(name: str) -> ElementType:
        return ElementType.named(float_dtype) if float_dtype else source.tensors[name].dtype

    def info(name: str, spec: WeightSpec) -> TensorInfo:
        dtype = dtypes.get(name) or (ElementType.named(spec.dtypes[0]) if len(spec.dtypes) == 1 else plain_dtype(name))
        return TensorInfo(spec.shape, ElementType.INT32 if name.endswith("weight_zero_point") else dtype)

    by_layer: dict[int, list[str]] = {}
    for name, layer in layers.items():
        by_layer.setdefault(layer, []).append(name)
    for layer in range(-1, config.num_hidden_layers + 1):
        names = by_layer.get(layer, ())
        tensors.update({name: info(name, specs[name]) for name in names})
        groups += [(name, (name,)) for name in names]

    def layer_tensors(layer: int) -> dict[str, torch.Tensor]:
        nonlocal loaded
        if loaded[0] != layer:
            loaded = (-1, {})
            loaded = (layer, _join_ranks(work.read_ranks(layer), floats | specs))
        return loaded[1]

    def read(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        found = layer_tensors(layers[name]) if layers[name] >= 0 else {}
        linear = name.rpartition(".")[0]
        quantized = scheme.find_linear(linear)
        if name in found and not name.endswith("zero_point"):
            yield name, found[name]
        elif name.endswith(".weight_packed") and quantized:
            yield name, pack_integers(found[f"{linear}.weight"], quantized.bits)
        elif name.endswith(".weight_shape"):
            yield name, torch.tensor(found[f"{linear}.weight"].shape)
        elif name.endswith(".weight_zero_point") and quantized:
            yield name, pack_integers(found[name].T.contiguous(), quantized.bits).T.contiguous()
        elif name in found:
            yield name, found[name]
        else:
            yield name, read_whole(source, reader, name).to(plain_dtype(name).torch_dtype)

    report["written_bytes"] = sum(tensor.num_bytes for tensor in tensors.values())
    raw = declare_scheme(source.config, scheme)
    if is_untied:
        raw["tie_word_embeddings"] = False
    if float_dtype is not None:
        raw.pop("dtype", None)  # see convert_checkpoint
        raw["torch_dtype"] = float_dtype

    def add_files(folder: Path) -> None:
        write_json(folder / REPORT_FILE, report)
        if ckpt is not None:
            write_mindspore(HuggingFaceFolder(folder), config, scheme, folder / ckpt, None, on_progress)

    write_checkpoint(source, target, raw, tensors, read, groups, on_progress, add_files)
    reader.close()


def _layer_of(name: str, config: LlamaConfig) -> int:
    """Return the index of the work folder's layer that holds a tensor: -1 for the embedding; the head and its norm come last."""
    if name.startswith("model.layers."):
        return int(name.split(".")[2])
    return -1 if name.startswith("model.embed_tokens.") else config.num_hidden_layers


def _join_ranks(ranks: list[dict[str, torch.Tensor]], specs: dict[str, WeightSpec]) -> dict[str, torch.Tensor]:
    """Join the ranks' parts of one layer. KV heads held by several ranks are taken once."""
    whole = {}
    for name, first in ranks[0].items():
        # Unpacked integers and zero points are split like the scales.
        spec = specs.get(f"{name.rpartition('.')[0]}.weight_scale") if name.endswith((".weight", ".weight_zero_point")) else None
        spec = spec or specs[name]
        parts, end = [], 0
        for rank, tensors in enumerate(ranks):
            start, stop = spec.rows(rank, len(ranks))
            if stop > end:
                parts.append(tensors[name][end - start :])
                end = stop
        whole[name] = first if len(parts) == 1 else torch.cat(parts)
    return whole
