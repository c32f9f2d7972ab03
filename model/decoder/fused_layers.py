"""All decoder layers in one native call (`model/kernels/layers.c`): the same steps as in LlamaForCausalLM, with bitwise identical results.

With few tokens, the Python overhead between kernels would take a tenth of the time. Requires that every linear is a single matmul with a
plain weight, and that ranks gather through shared memory (or that there is only one rank).
"""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from model.decoder.shares import Shares
from model.kernels.library import DTYPES, KernelInputs, Kernels, PackedInt4
from model.layers.batch import Batch, StoreRows
from model.layers.linear import ColumnParallelLinear
from model.layers.quantized_linear import QuantizedColumnParallelLinear
from model.spec.config import LlamaConfig
from parallel.collectives import Collectives
from parallel.shared_memory import SharedSlots, SharesSlots

_TOGETHER_TOKENS = 64
"""With more tokens, layers are called one by one, since a native call cannot be interrupted."""
_SIZE, _POINTER, _INT, _LONG = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_CHECK = ctypes.CFUNCTYPE(_INT)


class _Linear(ctypes.Structure):
    _fields_ = (
        [(name, _POINTER) for name in ("weight", "scale", "starts", "zeros")]
        + [(name, _SIZE) for name in ("groups", "columns", "rows")]
        + [("inputs", KernelInputs)]
    )


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", _POINTER),
        ("post_norm", _POINTER),
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
        ("fixed_scales", _POINTER),
        ("window", _SIZE),
    ]


class _Ranks(ctypes.Structure):
    _fields_ = [
        ("rank", _SIZE),
        ("world_size", _SIZE),
        ("flags", _POINTER),
        ("flag_words", _SIZE),
        ("slots", _POINTER),
        ("slot_bytes", _SIZE),
        ("sequence", _LONG),
        ("check", _CHECK),
        *((name, _POINTER) for name in ("beats", "operation", "entered", "gathered")),
        ("gathering", _LONG),
        ("computing", _LONG),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        ("dtype", _INT),
        *((name, _SIZE) for name in ("tokens", "hidden_size", "heads", "kv_heads", "head_dim")),
        ("epsilon", ctypes.c_float),
        *((name, _POINTER) for name in ("cosine", "sine", "cache")),
        ("cache_stride", _SIZE),
        ("token_scales", _POINTER),
        ("scales_stride", _SIZE),
        ("block_size", _SIZE),
        ("spans", _POINTER),
        ("num_spans", _SIZE),
        ("blocks", _POINTER),
        *((name, _POINTER) for name in ("query_widths", "hidden_widths", "inner_widths")),
        *((name, _POINTER) for name in ("hidden", "delta", "x", "qkv", "local", "whole", "gate_up")),
        ("has_delta", _INT),
        ("threads", _INT),
    ]


class FusedLayers:
    """The layers of one fully loaded model."""

    def __init__(
        self,
        layers: Sequence[Any],
        config: LlamaConfig,
        shares: Shares,
        collectives: Collectives,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        self._config, self._shares, self._collectives, self._dtype, self._run = config, shares, collectives, dtype, kernels.run_layers
        self._kept: list[torch.Tensor] = []  # keeps alive what the structures point to
        self._layers = (_Layer * len(layers))(*(self._describe(layer) for layer in layers))
        self._widths = [torch.tensor(widths) for widths in (shares.query, shares.hidden, shares.intermediate)]
        self._check: Any = None
        self._errors: list[BaseException] = []
        self._buffers: dict[int, list[torch.Tensor]] = {}

    @staticmethod
    def fits(layers: Iterable[Any]) -> bool:
        """Return whether these layers meet the requirements."""
        names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
        return all(layer.is_fusible and all(_is_plain(getattr(layer, name)) for name in names) for layer in layers)

    def run(self, hidden: torch.Tensor, batch: Batch, part: StoreRows) -> torch.Tensor | None:
        """Run all layers on `hidden` [tokens, H] in place and return the delta left to add to it; None if the collectives do not support
        it.
        """
        tokens = hidden.shape[0]
        slots = None
        if self._shares.world_size > 1:
            slots = self._collectives.share_slots() if isinstance(self._collectives, SharesSlots) else None
            if slots is None:
                return None
        ranks = self._describe_ranks(slots)
        delta = torch.empty_like(hidden)
        work = self._find_buffers(tokens)
        one = self._describe_pass(hidden, delta, batch, part, work)
        count = len(self._layers)
        step = count if tokens <= _TOGETHER_TOKENS else 1
        self._errors.clear()
        for first in range(0, count, step):
            failed = self._run(self._layers, first, min(step, count - first), ctypes.byref(one), ctypes.byref(ranks))
            if slots is not None:
                slots.set_sequence(ranks.sequence)
            if failed:
                raise self._errors[0] if self._errors else MemoryError("a kernel found no memory for its work space")
        return delta

    def _describe(self, layer: Any) -> _Layer:
        scales = layer.cache_scales
        self._kept += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight, *([] if scales is None else [scales])]
        return _Layer(
            layer.input_layernorm.weight.data_ptr(),
            layer.post_attention_layernorm.weight.data_ptr(),
            *(self._describe_linear(getattr(layer, name)) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
            None if scales is None else scales.data_ptr(),
            layer.window or 0,
        )

    def _describe_linear(self, linear: ColumnParallelLinear | QuantizedColumnParallelLinear) -> _Linear:
        if isinstance(linear, ColumnParallelLinear):
            self._kept.append(linear.weight)
            return _Linear(linear.weight.data_ptr(), None, None, None, 0, linear.in_features, linear.weight.shape[0], KernelInputs())
        whole, inputs = linear.find_whole(), linear.describe_inputs(self._dtype)
        if isinstance(whole, PackedInt4):
            kept, rows, groups = [whole.packed, whole.scale, whole.starts, whole.zeros], whole.rows, whole.starts.shape[0] - 1
        else:
            kept, rows, groups = list(whole), whole[0].shape[0], whole[2].shape[0] - 1
        self._kept += kept
        pointers = [tensor.data_ptr() for tensor in kept] + [None] * (4 - len(kept))
        return _Linear(*pointers, groups, linear.in_features, rows, inputs)

    def _describe_ranks(self, slots: SharedSlots | None) -> _Ranks:
        shares = self._shares
        if slots is None:
            return _Ranks(shares.rank, shares.world_size)

        def check() -> int:
            try:
                slots.check(ranks.sequence)
            except BaseException as error:  # raised again after the native call has returned
                self._errors.append(error)
                return 1
            return 0

        self._check = _CHECK(check)
        ranks = _Ranks(
            shares.rank, shares.world_size, slots.flags, slots.flag_words, slots.slots, slots.slot_bytes, slots.sequence, self._check,
            *slots.line, slots.gathering, slots.computing,
        )  # fmt: skip
        return ranks

    def _find_buffers(self, tokens: int) -> list[torch.Tensor]:
        buffers = self._buffers.get(tokens)
        if buffers is None:
            shares, config = self._shares, self._config
            query, inner = sum(shares.query), sum(shares.intermediate)
            head_rows = (shares.num_heads + 2 * shares.num_kv_heads) * config.head_dim
            widest = max(query, inner, config.hidden_size)
            widths = (config.hidden_size, head_rows, widest, widest, 2 * shares.intermediate[shares.rank])
            buffers = [torch.empty((tokens, width), dtype=self._dtype) for width in widths]
            if tokens <= _TOGETHER_TOKENS:
                self._buffers[tokens] = buffers
        return buffers

    def _describe_pass(
        self, hidden: torch.Tensor, delta: torch.Tensor, batch: Batch, part: StoreRows, work: Sequence[torch.Tensor]
    ) -> _Pass:
        config, shares, store = self._config, self._shares, part.store
        scales = store.scales
        return _Pass(
            DTYPES[hidden.dtype], hidden.shape[0], hidden.shape[1], shares.num_heads, shares.num_kv_heads, config.head_dim,
            config.rms_norm_eps, batch.cos.data_ptr(), batch.sin.data_ptr(),
            store.data.data_ptr(), store.data.stride(0) * store.data.element_size(),
            None if scales is None else scales.data_ptr(), 0 if scales is None else scales.stride(0), store.block_size,
            part.places.data_ptr(), part.places.shape[0], part.blocks.data_ptr(),
            *(widths.data_ptr() for widths in self._widths), hidden.data_ptr(), delta.data_ptr(), *(one.data_ptr() for one in work),
            0, torch.get_num_threads(),
        )  # fmt: skip


def _is_plain(linear: Any) -> bool:
    if isinstance(linear, QuantizedColumnParallelLinear):
        return linear.is_whole
    return isinstance(linear, ColumnParallelLinear) and linear.is_plain
