"""Load this rank's rows of a checkpoint into a model on the meta device, one layer at a time, with strict checks.

Depends on weight names and on the rows of a rank; does not depend on the file format.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.source import CheckpointSource
from model.decoder.llama import DecoderLayer, LlamaForCausalLM
from model.layers.float8_linear import Float8ColumnParallelLinear
from model.layers.linear import BiasedLinear, ColumnParallelLinear
from model.layers.quantized_linear import QuantizedColumnParallelLinear, SeparateLinears, StoredLinear
from model.layers.rounding import quantize_rows
from model.spec.linear_scheme import LinearScheme
from model.spec.packing import unpack_integers
from model.spec.scheme import read_scheme
from model.spec.weights import list_fused, list_norms, plan_weights
from parallel.file_slices import Convert, FileReader, ask_for_huge_pages

_EMBEDDING = "model.embed_tokens.weight"
_PART_BYTES = 8 << 20
_ROUNDED_BYTES = 1 << 20
"""Rows that are quantized at a time: the arithmetic takes several copies of them."""


def load_model(
    model: LlamaForCausalLM, source: CheckpointSource, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Load this rank's rows into `model` and return the number of bytes read.

    `on_progress` is called with (tensor bytes read, total bytes). Raises CheckpointError when a tensor is missing, unexpected or of
    another shape or dtype, and when a file is truncated.
    """
    # Use the checkpoint's own scheme: the model may run with a different KV cache type.
    check_checkpoint(source, model.config, read_scheme(source.config))
    # Native kernels use weights as stored; only the packing of the other kernels is worth distributing over threads.
    packs = model.backend.kernels is None
    loader = ModelLoader(model, source, **{"num_packers" if packs else "num_readers": model.num_threads})
    on_progress(0, loader.total_bytes)
    # Load the largest tensor first, so that its temporary memory is free again for the layers.
    loader.load_embedding()
    for index in range(len(model.layers)):
        loader.load_layer(index)
        on_progress(loader.done_bytes, loader.total_bytes)
    loader.load_head()
    loader.finish()
    on_progress(loader.total_bytes, loader.total_bytes)
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not left, left
    return loader.reader.read_bytes


class ModelLoader:
    """Reads this rank's rows of a checkpoint and assigns them to the layers of a model.

    Rows are read directly into their place in the fused weight if the stored format is the final one. With packers, extra threads pack
    each weight while the next one is read, so layers are complete only after `finish`.
    """

    def __init__(self, model: LlamaForCausalLM, source: CheckpointSource, *, num_readers: int = 1, num_packers: int = 0) -> None:
        self.reader = FileReader(num_readers)
        self._num_packers, self._packing = num_packers, deque[Future[None]]()
        self._pool = ThreadPoolExecutor(num_packers, initializer=torch.set_num_threads, initargs=(1,)) if num_packers else None
        self._model, self._source = model, source
        self._specs = plan_weights(model.config, model.scheme)
        self._rank, self._world_size = model.shares.rank, model.shares.world_size
        self.done_bytes = 0
        self.total_bytes = sum(self._count_bytes(name) for name in plan_weights(model.config, read_scheme(source.config)))
        if model.scheme.head is not None and model.config.tie_word_embeddings:
            self.total_bytes += self._count_bytes(_EMBEDDING)

    def load_embedding(self) -> None:
        """Load the vocabulary rows, which a tied output head shares."""
        weight = self._read_joined([_EMBEDDING], self._model.config.hidden_size, self._model.dtype)
        self._model.embed_tokens.assign(weight, self._model.device)

    def load_layer(self, index: int) -> None:
        """Load one decoder layer."""
        layer, prefix, config = self._model.layers[index], f"model.layers.{index}", self._model.config
        assert isinstance(layer, DecoderLayer)
        for attribute, name in list_norms(config).items():
            getattr(layer, attribute).assign(self.read(f"{prefix}.{name}.weight"), self._model.device)
        if layer.experts is not None:
            layer.experts.router.assign(self.read(f"{prefix}.{config.architecture.experts.router}.weight"), self._model.device)
        for path, names in list_fused(config, index).items():
            self._fill(layer.get_submodule(path), [f"{prefix}.{name}" for name in names])
        if f"{prefix}.self_attn.k_scale" in self._specs:
            scales = [self.read(f"{prefix}.self_attn.{name}") for name in ("k_scale", "v_scale")]
            layer.assign_cache_scales(scales[0], scales[1], self._model.device)

    def load_head(self) -> None:
        """Load the final norm, and the output head unless it is tied and used as stored."""
        self._model.norm.assign(self.read("model.norm.weight"), self._model.device)
        if self._model.scheme.head is not None:
            self._round_head(_EMBEDDING if self._model.config.tie_word_embeddings else "lm_head.weight")
        elif not self._model.config.tie_word_embeddings:
            self._fill(self._model.lm_head, ["lm_head"])

    def _round_head(self, name: str) -> None:
        """Quantize this rank's rows of the tensor `name`, as `tandem quantize` would, to be the output head."""
        (start, stop), info = self._rows(name), self._source.tensors[name]
        weight = torch.empty((stop - start, info.shape[1]), dtype=torch.int8)
        scale = torch.empty((stop - start, 1))
        step = info.count_step_rows(_ROUNDED_BYTES)
        for first in range(start, stop, step):
            end = min(first + step, stop)
            integers, scales = quantize_rows(self._source.read_rows(self.reader, name, first, end))
            weight[first - start : end - start], scale[first - start : end - start] = integers, scales
        self.done_bytes += self._count_bytes(name)
        self._assign(self._model.lm_head, StoredLinear(weight=weight, scale=scale), self._model.device)

    def read(self, name: str) -> torch.Tensor:
        """Read this rank's rows of a tensor, as stored."""
        self.done_bytes += self._count_bytes(name)
        return self._source.read_rows(self.reader, name, *self._rows(name))

    def _rows(self, name: str) -> tuple[int, int]:
        return self._specs[name].rows(self._rank, self._world_size) if name in self._specs else (0, 0)

    def _count_bytes(self, name: str) -> int:
        start, stop = self._rows(name)
        info = self._source.tensors[name]
        return info.num_bytes // max(1, info.shape[0]) * (stop - start)

    def _fill(self, module: nn.Module, names: Sequence[str]) -> None:
        device = self._model.device
        if isinstance(module, BiasedLinear):
            module.assign_bias(torch.cat([self.read(f"{name}.bias") for name in names]), device)
            self._fill(module.linear, names)
        elif isinstance(module, SeparateLinears):
            for linear, name in zip(module.linears, names, strict=True):
                self._fill(linear, [name])
        elif isinstance(module, QuantizedColumnParallelLinear):
            self._assign(module, self._read_quantized(names, module), device)
        elif isinstance(module, Float8ColumnParallelLinear):
            weight = self._read_joined([f"{name}.weight" for name in names], module.in_features, torch.float8_e4m3fn)
            module.assign(weight, torch.cat([self._read_float8_scale(name, module.scheme) for name in names]), device)
        else:
            assert isinstance(module, ColumnParallelLinear)
            weights = [f"{name}.weight" for name in names]
            self._assign(module, self._read_joined(weights, module.in_features, self._model.dtype), device)

    def finish(self) -> None:
        """Wait until all weights are packed."""
        while self._packing:
            self._packing.popleft().result()
        if self._pool is not None:
            self._pool.shutdown()
        self.reader.close()

    def _assign(self, module: Any, stored: Any, device: torch.device) -> None:
        if self._pool is None:
            module.assign(stored, device)
            return
        while len(self._packing) >= self._num_packers:
            self._packing.popleft().result()
        self._packing.append(self._pool.submit(module.assign, stored, device))

    def _read_quantized(self, names: Sequence[str], module: QuantizedColumnParallelLinear) -> StoredLinear:
        scheme, columns, first = module.scheme, module.in_features, names[0]
        if scheme.packed:
            weights = [f"{name}.weight_packed" for name in names]
            weight = self._read_joined(weights, columns, torch.int8, lambda rows: unpack_integers(rows, scheme.bits, columns))
        else:
            weight = self._read_joined([f"{name}.weight" for name in names], columns, torch.int8)
        # Linears with their own input parameters are never fused, so those of the first linear apply to all.
        group_index = self.read(f"{first}.weight_g_idx") if scheme.act_order else None
        if not scheme.symmetric:
            parts = torch.split(weight, [block.num_rows for block in module.blocks])
            for name, part in zip(names, parts, strict=True):
                self._take_off_zero_points(name, scheme.bits, part, scheme.group_size or columns, group_index)
        return StoredLinear(
            weight=weight,
            scale=torch.cat([self.read(f"{name}.weight_scale").float() for name in names]),
            group_index=group_index,
            input_scale=float(self.read(f"{first}.input_scale")) if scheme.activation == "tensor" else 1.0,
            input_zero_point=int(self.read(f"{first}.input_zero_point")) if f"{first}.input_zero_point" in self._specs else 0,
            smooth_scale=self.read(f"{first}.smooth_scale") if scheme.smooth else None,
        )

    def _read_float8_scale(self, name: str, scheme: LinearScheme) -> torch.Tensor:
        """Read the scales of this rank's rows: float32 [rows, groups]."""
        start, stop = self._rows(f"{name}.weight")
        scale = self.read(f"{name}.weight_scale").float()
        if scheme.row_block is None:
            return scale.view(1, 1).expand(stop - start, 1)
        first = start // scheme.row_block * scheme.row_block
        return scale.repeat_interleave(scheme.row_block, dim=0)[start - first : stop - first]

    def _take_off_zero_points(self, name: str, bits: int, weight: torch.Tensor, group: int, index: torch.Tensor | None) -> None:
        """Subtract the zero points from 4-bit weights in place; the results fit into int8."""
        spec, per_word = self._specs[f"{name}.weight_zero_point"], 32 // bits
        first_word, end_word = spec.rows(self._rank, self._world_size)
        first_row, _ = self._rows(f"{name}.weight_packed")
        packed = self.read(f"{name}.weight_zero_point")
        zero_points = unpack_integers(packed.T, bits, (end_word - first_word) * per_word).T
        skip = first_row - first_word * per_word
        mine = zero_points[skip : skip + weight.shape[0]]
        if index is None:
            weight -= mine.repeat_interleave(group, dim=1)[:, : weight.shape[1]]
        else:
            weight -= mine[:, index.long()]

    def _read_joined(self, names: Sequence[str], columns: int, dtype: torch.dtype, convert: Convert | None = None) -> torch.Tensor:
        """Read this rank's rows of several tensors, concatenated, converted to `dtype`."""
        source, rows = self._source, [self._rows(name) for name in names]
        located = [source.locate_rows(name, *interval) for name, interval in zip(names, rows, strict=True)]
        if len(names) == 1 and not located[0] and (convert or source.tensors[names[0]].dtype.torch_dtype == dtype):
            return convert(self.read(names[0])) if convert else self.read(names[0])
        out = torch.empty((sum(stop - start for start, stop in rows), columns), dtype=dtype)
        ask_for_huge_pages(out)
        places = torch.split(out, [stop - start for start, stop in rows])
        for name, (start, stop), parts, place in zip(names, rows, located, places, strict=True):
            self.done_bytes += self._count_bytes(name)
            if parts:
                self.reader.read_into(place, parts, start, convert)
                continue
            info = source.tensors[name]
            # Convert rows of another dtype in small batches, so that two full copies never exist.
            step = max(1, stop - start) if convert or info.dtype.torch_dtype == dtype else info.count_step_rows(_PART_BYTES)
            for first in range(start, stop, step):
                found = source.read_rows(self.reader, name, first, min(first + step, stop))
                place[first - start : first - start + len(found)] = convert(found) if convert else found
        return out
