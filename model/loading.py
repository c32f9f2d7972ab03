"""Fills a model on meta with this rank's rows of a checkpoint, one layer at a time; strictly.

Knows the names of weights and the rows of a rank; not the format of the files.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from model.checkpoint.source import CheckpointSource
from model.config import LlamaConfig
from model.linear import Int8ColumnParallelLinear
from model.llama import FUSED, DecoderLayer, LlamaForCausalLM
from model.scheme import Scheme, unpack_int8
from model.weights import compare_tensors, plan_weights
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader

_PART_BYTES = 8 << 20


def check_checkpoint(source: CheckpointSource, config: LlamaConfig, scheme: Scheme) -> None:
    """Raise CheckpointError, listing ten of each kind, unless the checkpoint holds exactly what the model needs."""
    report = compare_tensors(plan_weights(config, scheme), source.tensors, tied=config.tie_word_embeddings)
    words = report.describe()
    if words:
        raise CheckpointError(f"{source.path} does not fit its config.json: {words}")


def load_model(
    model: LlamaForCausalLM, source: CheckpointSource, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Read this rank's rows into `model`; give the bytes that were read.

    `on_progress` gets (layers done, layers in all). Raises CheckpointError when a tensor is missing, unexpected or of
    another shape or type, and when a file is short.
    """
    check_checkpoint(source, model.config, model.scheme)
    specs = plan_weights(model.config, model.scheme)
    shares, device, reader = model.shares, model.device, FileReader()

    def read(name: str) -> torch.Tensor:
        return source.read_rows(reader, name, *specs[name].rows(shares.rank, shares.world_size))

    def read_float(name: str) -> torch.Tensor:
        """In the compute type; a large tensor of another type in parts, so that it is not in memory twice."""
        start, stop = specs[name].rows(shares.rank, shares.world_size)
        info = source.tensors[name]
        row_bytes = info.num_bytes // info.shape[0]
        if info.dtype == model.dtype or (stop - start) * row_bytes <= 2 * _PART_BYTES:
            return read(name).to(model.dtype)
        out = torch.empty((stop - start, *info.shape[1:]), dtype=model.dtype)
        step = max(1, _PART_BYTES // row_bytes)
        for first in range(start, stop, step):
            end = min(first + step, stop)
            out[first - start : end - start] = source.read_rows(reader, name, first, end)
        return out

    def fill(module: nn.Module, names: Sequence[str]) -> None:
        if isinstance(module, Int8ColumnParallelLinear):
            weights = [unpack_int8(read(f"{name}.weight_packed"), module.in_features) for name in names]
            module.assign(weights, [read(f"{name}.weight_scale") for name in names], device)
        elif any(f"{name}.weight_packed" in specs for name in names):
            raise CheckpointError(f"{', '.join(names)} run as one product and must be quantized together, or all be in 'ignore'")
        else:
            module.assign([read_float(f"{name}.weight") for name in names], device)  # type: ignore[operator]

    total = len(model.layers) + 1
    # The largest tensor first: what it takes on the way is free again for the layers.
    model.embed_tokens.assign(read_float("model.embed_tokens.weight"), device)
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        prefix = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            getattr(layer, norm).assign(read(f"{prefix}.{norm}.weight"), device)
        for attribute, names in FUSED.items():
            fill(getattr(layer, attribute), [f"{prefix}.{name}" for name in names])
        on_progress(index + 1, total)
    model.norm.assign(read("model.norm.weight"), device)
    if not model.config.tie_word_embeddings:
        fill(model.lm_head, ["lm_head"])
    on_progress(total, total)
    reader.close()
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not left, left
    return reader.read_bytes
