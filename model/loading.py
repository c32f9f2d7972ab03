"""Fills a model on meta with this rank's rows of a checkpoint, one layer at a time; strictly.

Knows the names of weights and the rows of a rank; not the format of the files.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from model.checkpoint.source import CheckpointSource
from model.config import LlamaConfig
from model.llama import DecoderLayer, LlamaForCausalLM
from model.packing import unpack_integers
from model.quantized_linear import QuantizedColumnParallelLinear, SeparateLinears, StoredLinear
from model.scheme import Scheme, read_scheme
from model.weights import FUSED, compare_tensors, plan_weights
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

    `on_progress` gets (bytes of tensors read, bytes in all). Raises CheckpointError when a tensor is missing, unexpected or of
    another shape or type, and when a file is short.
    """
    # The checkpoint's own scheme: a model may run with another key-value cache.
    check_checkpoint(source, model.config, read_scheme(source.config))
    loader = ModelLoader(model, source, num_packers=model.num_threads)
    on_progress(0, loader.total_bytes)
    # The largest tensor first: what it takes on the way is free again for the layers.
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
    """Reads this rank's rows of one checkpoint, and gives them to the layers of one model.

    With packers, threads of their own pack what was read (one product each) while the next is read: layers are whole only
    after `finish`.
    """

    def __init__(self, model: LlamaForCausalLM, source: CheckpointSource, num_packers: int = 0) -> None:
        self.reader = FileReader()
        self._num_packers, self._packing = num_packers, deque[Future[None]]()
        self._pool = ThreadPoolExecutor(num_packers, initializer=torch.set_num_threads, initargs=(1,)) if num_packers else None
        self._model, self._source = model, source
        self._specs = plan_weights(model.config, model.scheme)
        self._rank, self._world_size = model.shares.rank, model.shares.world_size
        self.done_bytes = 0
        self.total_bytes = sum(self._count_bytes(name) for name in plan_weights(model.config, read_scheme(source.config)))

    def load_embedding(self) -> None:
        """The vocabulary rows, which a tied head shares."""
        self._model.embed_tokens.assign(self._read_float("model.embed_tokens.weight"), self._model.device)

    def load_layer(self, index: int) -> None:
        """One decoder layer."""
        layer, prefix = self._model.layers[index], f"model.layers.{index}"
        assert isinstance(layer, DecoderLayer)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            getattr(layer, norm).assign(self.read(f"{prefix}.{norm}.weight"), self._model.device)
        for attribute, names in FUSED.items():
            self._fill(getattr(layer, attribute), [f"{prefix}.{name}" for name in names])
        if f"{prefix}.self_attn.k_scale" in self._specs:
            scales = [self.read(f"{prefix}.self_attn.{name}") for name in ("k_scale", "v_scale")]
            layer.assign_cache_scales(scales[0], scales[1], self._model.device)

    def load_head(self) -> None:
        """The last norm, and the output head where it is not the embedding."""
        self._model.norm.assign(self.read("model.norm.weight"), self._model.device)
        if not self._model.config.tie_word_embeddings:
            self._fill(self._model.lm_head, ["lm_head"])

    def read(self, name: str) -> torch.Tensor:
        """This rank's rows of a tensor, as they are stored."""
        self.done_bytes += self._count_bytes(name)
        return self._source.read_rows(self.reader, name, *self._specs[name].rows(self._rank, self._world_size))

    def _count_bytes(self, name: str) -> int:
        start, stop = self._specs[name].rows(self._rank, self._world_size) if name in self._specs else (0, 0)
        info = self._source.tensors[name]
        return info.num_bytes // max(1, info.shape[0]) * (stop - start)

    def _fill(self, module: nn.Module, names: Sequence[str]) -> None:
        device = self._model.device
        if isinstance(module, SeparateLinears):
            for linear, name in zip(module.linears, names, strict=True):
                self._fill(linear, [name])
        elif isinstance(module, QuantizedColumnParallelLinear):
            self._assign(module, [self._read_quantized(name, module) for name in names], device)
        else:
            self._assign(module, [self._read_float(f"{name}.weight") for name in names], device)

    def finish(self) -> None:
        """Wait until everything is packed."""
        while self._packing:
            self._packing.popleft().result()
        if self._pool is not None:
            self._pool.shutdown()
        self.reader.close()

    def _assign(self, module: Any, stored: list[Any], device: torch.device) -> None:
        if self._pool is None:
            module.assign(stored, device)
            return
        while len(self._packing) >= self._num_packers:
            self._packing.popleft().result()
        self._packing.append(self._pool.submit(module.assign, stored, device))

    def _read_quantized(self, name: str, module: QuantizedColumnParallelLinear) -> StoredLinear:
        scheme, columns = module.scheme, module.in_features
        weight = unpack_integers(self.read(f"{name}.weight_packed"), scheme.bits, columns) if scheme.packed else self.read(f"{name}.weight")
        scale = self.read(f"{name}.weight_scale").float()
        group_index = self.read(f"{name}.weight_g_idx") if scheme.act_order else None
        if not scheme.symmetric:
            self._take_off_zero_points(name, scheme.bits, weight, scheme.group_size or columns, group_index)
        return StoredLinear(
            weight=weight,
            scale=scale,
            group_index=group_index,
            input_scale=float(self.read(f"{name}.input_scale")) if scheme.activation == "tensor" else 1.0,
            input_zero_point=int(self.read(f"{name}.input_zero_point")) if f"{name}.input_zero_point" in self._specs else 0,
            smooth_scale=self.read(f"{name}.smooth_scale") if scheme.smooth else None,
        )

    def _take_off_zero_points(self, name: str, bits: int, weight: torch.Tensor, group: int, index: torch.Tensor | None) -> None:
        """Subtract the zero points from 4-bit weights in place: what is left fits 8 bits."""
        spec, per_word = self._specs[f"{name}.weight_zero_point"], 32 // bits
        first_word, end_word = spec.rows(self._rank, self._world_size)
        first_row, _ = self._specs[f"{name}.weight_packed"].rows(self._rank, self._world_size)
        packed = self.read(f"{name}.weight_zero_point")
        zero_points = unpack_integers(packed.T, bits, (end_word - first_word) * per_word).T
        skip = first_row - first_word * per_word
        mine = zero_points[skip : skip + weight.shape[0]]
        if index is None:
            weight -= mine.repeat_interleave(group, dim=1)[:, : weight.shape[1]]
        else:
            weight -= mine[:, index.long()]

    def _read_float(self, name: str) -> torch.Tensor:
        """In the compute type; a large tensor of another type in parts, so that it is not in memory twice."""
        dtype, source = self._model.dtype, self._source
        start, stop = self._specs[name].rows(self._rank, self._world_size)
        info = source.tensors[name]
        row_bytes = info.num_bytes // info.shape[0]
        if info.dtype == dtype or (stop - start) * row_bytes <= 2 * _PART_BYTES:
            return self.read(name).to(dtype)
        out = torch.empty((stop - start, *info.shape[1:]), dtype=dtype)
        step = max(1, _PART_BYTES // row_bytes)
        self.done_bytes += self._count_bytes(name)
        for first in range(start, stop, step):
            end = min(first + step, stop)
            out[first - start : end - start] = source.read_rows(self.reader, name, first, end)
        return out
