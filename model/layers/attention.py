"""Attention of sequences over their own KV caches, bitwise identical for any split of the heads and any number of threads.

The native kernel applies rotary embedding, cache update and attention in one call. Without it, PyTorch's flash kernel handles each query
head separately; it is bitwise reproducible on one thread only, so every call runs on one thread and, if there is enough work, the heads
are distributed over a thread pool.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from model.backends.interface import Backend, PagedAttention
from model.backends.paged import StoredLayer
from model.kernels.library import Kernels
from model.layers.batch import Batch
from model.layers.rotary import rotate
from model.layers.step_batch import StepBatch

_PARALLEL_WORK = 1 << 18
"""Query rows x keys x head dimension below which a second thread does not pay off."""


class Attention:
    """Causal grouped-query attention on a fixed number of threads."""

    def __init__(self, num_threads: int, backend: Backend) -> None:
        self._num_threads, self._backend = num_threads, backend
        self._pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) if num_threads > 1 else None

    def __call__(
        self,
        qkv: torch.Tensor,
        heads: int,
        kv_heads: int,
        layer: int,
        batch: Batch | StepBatch,
        scales: torch.Tensor | None,
        window: int | None = None,
        softcap: float | None = None,
        *,
        local: bool = False,
    ) -> torch.Tensor:
        """Append the keys and values of qkv [tokens, (heads + 2 kv_heads) * head_dim] and attend: [tokens, heads * head_dim].

        `layer`: index of the layer's KV cache. `scales`: stored scales of an int8 cache, float32 [2, kv_heads, 1, head_dim]. `window`:
        tokens that each token attends to, itself included; None: all earlier ones. `softcap`: limit of the scores. `local`: whether the
        layer has the angles of layers with a window.
        """
        angles = batch.angles(local=local)
        if self._backend.kernels is not None and batch.lies_in_stores:
            limits = (window or 0, softcap or 0.0)
            return _attend_natively(self._backend.kernels, qkv.contiguous(), heads, kv_heads, layer, batch, angles, scales, limits)
        paged = self._backend.paged_attention if batch.is_paged else None
        if paged is not None:
            return _attend_paged(paged, qkv, heads, kv_heads, layer, batch, angles, scales, window, softcap)
        split = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1)
        turned = rotate(split[:, : heads + kv_heads], *angles)
        query, keys, values = turned[:, :heads], turned[:, heads:], split[:, heads + kv_heads :]
        parts, first = [], 0
        for span in batch.spans:
            rows = slice(first, first + len(span.ids))
            span.cache.append(layer, keys[rows], values[rows], scales)
            keys_values = span.cache.read(layer, scales, span.cache.length + len(span.ids))
            if softcap is None:
                parts.append(self.attend(query[rows], *keys_values, window))
            else:
                parts.append(_attend_capped(query[rows], *keys_values, window, softcap))
            first = rows.stop
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None = None) -> torch.Tensor:
        """Attend with query [tokens, heads, head_dim] over keys and values [kv heads, all tokens, head_dim]: [tokens, heads * head_dim].

        The query tokens are the last tokens of the keys.
        """
        tokens, heads, head_dim = query.shape
        kv_heads, all_tokens, _ = keys.shape
        group = heads // kv_heads
        grouped = query.transpose(0, 1).reshape(kv_heads, group, tokens, head_dim)
        mask = None
        if 1 < tokens < all_tokens or (window is not None and all_tokens > window):
            mask = torch.ones((tokens, all_tokens), dtype=torch.bool, device=query.device).tril(all_tokens - tokens)
            if window is not None:
                mask = mask.triu(all_tokens - tokens + 1 - window)
        if self._pool is None or kv_heads == 1 or heads * tokens * all_tokens * head_dim < _PARALLEL_WORK:
            out = self._attend_alone(grouped, keys, values, mask)
        else:
            parts = min(self._num_threads, kv_heads)
            tasks = [
                self._pool.submit(self._backend.attend, *chunk, mask)
                for chunk in zip(grouped.chunk(parts), keys.chunk(parts), values.chunk(parts), strict=True)
            ]
            out = torch.cat([task.result() for task in tasks])
        return out.reshape(heads, tokens, head_dim).transpose(0, 1).reshape(tokens, heads * head_dim)

    def _attend_alone(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        threads = torch.get_num_threads()
        if threads == 1:
            return self._backend.attend(query, keys, values, mask)
        torch.set_num_threads(1)
        try:
            return self._backend.attend(query, keys, values, mask)
        finally:
            torch.set_num_threads(threads)


def _attend_capped(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, softcap: float) -> torch.Tensor:
    """Do what `Attention.attend` does, with limited scores: each token and head alone, so that the result depends on nothing else."""
    tokens, heads, head_dim = query.shape
    kv_heads, all_tokens, _ = keys.shape
    wide, out, threads = query.float(), torch.empty_like(query), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for head in range(heads):
            own_keys, own_values = (side[head * kv_heads // heads].float() for side in (keys, values))
            for token in range(tokens):
                stop = all_tokens - tokens + token + 1
                seen = slice(0 if window is None else max(0, stop - window), stop)
                scores = torch.mv(own_keys[seen].clone(), wide[token, head].clone()) / head_dim**0.5
                weights = torch.softmax(torch.tanh(scores / softcap) * softcap, dim=0)
                out[token, head] = torch.mv(own_values[seen].T.contiguous(), weights)
    finally:
        torch.set_num_threads(threads)
    return out.reshape(tokens, heads * head_dim)


def _attend_natively(
    kernels: Kernels,
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    layer: int,
    batch: Batch | StepBatch,
    angles: tuple[torch.Tensor, torch.Tensor],
    scales: torch.Tensor | None,
    limits: tuple[int, float],
) -> torch.Tensor:
    out = qkv.new_empty((qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads) * heads))
    for part in batch.join_stores():
        rows, store = part.rows, part.store
        token_scales = None if store.scales is None else store.scales[layer]
        fixed = scales if store.quantized and token_scales is None else None
        turned = angles[0][rows], angles[1][rows]
        kernels.attend(
            qkv[rows], heads, kv_heads, turned, store.data[layer], token_scales, fixed, part.places, part.blocks, limits, out[rows]
        )  # fmt: skip
    return out


def _attend_paged(
    operation: PagedAttention,
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    layer: int,
    batch: Batch | StepBatch,
    angles: tuple[torch.Tensor, torch.Tensor],
    scales: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend by the backend's own operation, once for each store."""
    parts, tile_tokens = [], operation.tokens_per_tile(heads, kv_heads)
    for part in batch.join_stores():
        rows, store = part.rows, part.store
        token_scales = None if store.scales is None else store.scales[layer]
        fixed = scales if store.quantized and token_scales is None else None
        turned = angles[0][rows], angles[1][rows]
        stored, paged = StoredLayer(store.data[layer], token_scales, fixed), batch.place_part(part, tile_tokens)
        parts.append(operation.attend(qkv[rows], heads, kv_heads, turned, stored, paged, window, softcap))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
