"""The forward pass of a decoder on one rank, from top to bottom.

Shapes: T tokens of all sequences, concatenated; H the full hidden size; *_local the part that this rank owns. Each layer gathers four
times: attention heads, output projection, feed-forward, down projection. Every matmul covers the whole inner dimension, so the result
does not depend on the number of ranks (see `model/layers/linear.py`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from model.backends.interface import Backend
from model.backends.registry import find_backend
from model.decoder.fused_layers import FusedLayers
from model.decoder.shares import Shares
from model.decoder.step_graph import StepGraphs
from model.layers.activation import gelu_multiply, limit
from model.layers.attention import Attention
from model.layers.batch import Batch, Span
from model.layers.cache import KeyValueCache, KeyValueStore
from model.layers.experts import Expert, ExpertLayer
from model.layers.linear import BiasedLinear, RowBlock, VocabParallelEmbedding
from model.layers.lora import LoraLayer
from model.layers.norm import RMSNorm
from model.layers.quantized_linear import QuantizedColumnParallelLinear, build_linear
from model.layers.rotary import Rotary
from model.layers.step_batch import StepBatch
from model.spec.config import BLOCK_MULTIPLE, LlamaConfig, count_blocks
from model.spec.scheme import Scheme
from model.spec.weights import has_bias, list_fused
from parallel.collectives import Collectives


def is_fusible(config: LlamaConfig, index: int) -> bool:
    """Return whether the native call for whole layers implements this layer, whatever its weights."""
    extras = (config.qk_norm, config.norm_offset, config.sandwich_norms, config.attention_softcap, config.local_rope_theta)
    return not config.has_experts(index) and config.hidden_act == "silu" and config.query_scale == 1 and not any(extras)


def list_plain_features(config: LlamaConfig) -> tuple[str, ...]:
    """Return what the native kernels lack of a model."""
    features = {
        "biases": config.attention_bias or config.output_bias or config.mlp_bias,
        "norms of heads": config.qk_norm,
        "experts": config.experts is not None,
        "GELU and norms around layers": config.sandwich_norms or config.norm_offset or config.hidden_act != "silu",
    }
    return tuple(words for words, used in features.items() if used)


class DecoderLayer(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, index: int, scheme: Scheme, shares: Shares, dtype: torch.dtype, backend: Backend) -> None:
        super().__init__()
        fused_names = list_fused(config, index)

        def linear(in_features: int, fused: str, blocks: Sequence[RowBlock]) -> nn.Module:
            names = fused_names[fused]
            schemes = [scheme.find_linear(f"model.layers.{index}.{name}") for name in names]
            product = build_linear(in_features, blocks, schemes, dtype, backend)
            return BiasedLinear(product, sum(block.num_rows for block in blocks), dtype) if has_bias(config, names[0]) else product

        def expert(number: int, size: int) -> Expert:
            inner = shares.block("experts")
            gate_up = linear(config.hidden_size, f"experts.{number}.gate_up_proj", (inner, inner))
            return Expert(gate_up, linear(size, f"experts.{number}.down_proj", (shares.block("hidden"),)))

        self.shares, self.head_dim, self.window = shares, config.head_dim, config.find_window(index)
        key_value = shares.block("key_value", "head")
        query_size = config.num_attention_heads * config.head_dim
        self.is_local = self.window is not None and config.local_rope_theta is not None
        self.is_fusible = is_fusible(config, index)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, config.rms_norm_eps, dtype, backend, offset=config.norm_offset)

        self.input_layernorm = norm(config.hidden_size)
        self.qkv_proj = linear(config.hidden_size, "qkv_proj", (shares.block("query", "head"), key_value, key_value))
        self.o_proj = linear(query_size, "o_proj", (shares.block("hidden"),))
        self.post_attention_layernorm = norm(config.hidden_size)
        self.attention_norm = norm(config.hidden_size) if config.sandwich_norms else None
        self.feed_forward_norm = norm(config.hidden_size) if config.sandwich_norms else None
        self.experts: ExpertLayer | None = None
        if config.experts is not None and config.has_experts(index):
            members = [expert(number, config.experts.intermediate_size) for number in range(config.experts.count)]
            self.experts = ExpertLayer(config.experts, config.hidden_size, members, backend)
        else:
            inner = shares.block("intermediate")
            self.gate_up_proj = linear(config.hidden_size, "gate_up_proj", (inner, inner))
            self.down_proj = linear(config.intermediate_size, "down_proj", (shares.block("hidden"),))
        self.q_norm, self.k_norm = (norm(config.head_dim) if config.qk_norm else None for _ in range(2))
        self.cache_scales: torch.Tensor | None = None

    def assign_cache_scales(self, keys: torch.Tensor, values: torch.Tensor, device: torch.device) -> None:
        """Set the scales of an int8 KV cache: [1], or one per local row of the key and value projections."""
        scales = torch.stack((keys, values)).float().expand(2, self.shares.key_value)
        self.cache_scales = scales.reshape(2, -1, 1, self.head_dim).contiguous().to(device)


class LlamaForCausalLM(nn.Module):
    """The decoder. Built on the meta device; `model/decoder/loading.py` loads its weights."""

    def __init__(
        self,
        config: LlamaConfig,
        scheme: Scheme,
        collectives: Collectives,
        *,
        dtype: str,
        device: torch.device,
        num_threads: int = 1,
    ) -> None:
        super().__init__()
        self.config, self.scheme, self.collectives, self.device, self.num_threads = config, scheme, collectives, device, num_threads
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.backend = backend = find_backend(device.type)
        self.shares = shares = Shares(config, collectives.rank, collectives.world_size)
        self.rotary, self.attention = Rotary(config), Attention(num_threads, backend)
        self._local_rotary = None if config.local_rope_theta is None else Rotary(config, local=True)
        self._activate = backend.silu_multiply if config.hidden_act == "silu" else gelu_multiply
        self.fuses_layers = True
        """Whether layers may run in one native call; turned off where each step has to be observable."""
        self._fused: FusedLayers | None = None
        self._graphs: StepGraphs | None = None
        self.adapters: dict[str, int] = {}
        """Number of each LoRA adapter, from 1, by its name."""
        self._updates: dict[tuple[int, int, str], LoraLayer] = {}
        """By adapter, layer and fused linear."""
        self.embed_tokens = VocabParallelEmbedding(config.hidden_size, shares.first_id, shares.block("vocab"), self.dtype, backend)
        self.layers = nn.ModuleList(self.build_layer(index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, self.dtype, backend, offset=config.norm_offset)
        self.lm_head: nn.Module = self.embed_tokens.rows
        if scheme.head is not None or not config.tie_word_embeddings:
            self.lm_head = build_linear(config.hidden_size, (shares.block("vocab"),), (scheme.find_linear("lm_head"),), self.dtype, backend)

    @property
    def batch_invariant(self) -> bool:
        """Whether the result of a row is bitwise identical for every batch size."""
        return self.backend.batch_invariant

    @property
    def plain_features(self) -> tuple[str, ...]:
        """What the native kernels lack, so that layers run step by step and these steps in PyTorch; empty without native kernels."""
        return list_plain_features(self.config) if self.backend.kernels is not None else ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on this rank."""
        floats = sum(tensor.nbytes for tensor in self.parameters())
        return floats + sum(layer.weight_bytes for layer in self.modules() if isinstance(layer, QuantizedColumnParallelLinear))

    @property
    def adapter_bytes(self) -> int:
        """Bytes of all adapters on this rank."""
        return sum(update.num_bytes for update in self._updates.values())

    def add_adapter(self, name: str, updates: Mapping[tuple[int, str], LoraLayer]) -> None:
        """Add a LoRA adapter: its updates by layer and path of the fused linear."""
        self.adapters[name] = number = len(self.adapters) + 1
        self._updates.update({(number, *place): update for place, update in updates.items()})

    def build_layer(self, index: int) -> DecoderLayer:
        """Build a decoder layer without weights."""
        return DecoderLayer(self.config, index, self.scheme, self.shares, self.dtype, self.backend)

    def build_store(self, num_blocks: int, block_size: int) -> KeyValueStore:
        """Allocate a KV cache store of `num_blocks` blocks."""
        config, shares = self.config, self.shares
        sizes = (config.num_hidden_layers, num_blocks, block_size, shares.num_kv_heads, config.head_dim)
        return KeyValueStore(*sizes, self.dtype, self.device, self.scheme.kv_cache, for_kernels=self.backend.kernels is not None)

    def build_cache(self, capacity: int) -> KeyValueCache:
        """Build an empty cache for one sequence of up to `capacity` tokens, in its own store."""
        return KeyValueCache(self.build_store(1, count_blocks(capacity, BLOCK_MULTIPLE) * BLOCK_MULTIPLE), [0])

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """Return the hidden states [T, H] of the new tokens of all spans, after the final norm."""
        graphs = self._find_graphs()
        if graphs is not None and (replayed := graphs.run(spans)) is not None:
            return replayed
        batch = Batch(spans, self.rotary, self.device, self._local_rotary)
        hidden = self.embed([token for span in spans for token in span.ids])
        delta = self._run_fused(hidden, batch)
        if delta is None:
            for index in range(len(self.layers)):
                delta = self._run_layer(index, hidden, delta, batch)
        batch.advance()
        normed: torch.Tensor = self.norm(hidden, delta)
        return normed

    @torch.inference_mode()
    def run_layer(self, index: int, hidden: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Run a single layer: hidden states [T, H] of the new tokens of all spans before the layer to those after it."""
        hidden = hidden.clone()
        return hidden + self._run_layer(index, hidden, None, Batch(spans, self.rotary, self.device, self._local_rotary))

    @torch.inference_mode()
    def logits_local(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [rows, vocab_local] over this rank's part of the vocabulary, for hidden states [rows, H]."""
        logits: torch.Tensor = self.lm_head(hidden)
        softcap = self.config.logit_softcap
        return logits.float() if softcap is None else limit(logits.float(), softcap)

    def _find_graphs(self) -> StepGraphs | None:
        """Return the recorded steps; None where the device records none, or a step waits for the host within."""
        waits = self.shares.world_size > 1 or self.config.experts is not None
        recorder = self.backend.recorder
        if recorder is None or waits or not self.fuses_layers:
            return None
        if self._graphs is None:
            rotaries = [self.rotary] if self._local_rotary is None else [self.rotary, self._local_rotary]
            self._graphs = StepGraphs(recorder, rotaries, self.config.head_dim, self.device, self._run_step)
        return self._graphs

    def _run_step(self, batch: StepBatch) -> torch.Tensor:
        hidden, delta = self.embed_rows(batch.tokens.long()), None
        for index in range(len(self.layers)):
            delta = self._run_layer(index, hidden, delta, batch)
        normed: torch.Tensor = self.norm(hidden, delta)
        return normed

    def _run_fused(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        """Run all layers in one native call; None if the weights, caches or collectives do not support it."""
        kernels = self.backend.kernels
        if kernels is None or not self.fuses_layers or batch.adapted or not batch.lies_in_stores or len(batch.join_stores()) > 1:
            return None
        if self._fused is None:
            self.fuses_layers = FusedLayers.fits(self.layers)
            if not self.fuses_layers:
                return None
            self._fused = FusedLayers(list(self.layers), self.config, self.shares, self.collectives, self.dtype, kernels)
        return self._fused.run(hidden, batch, batch.join_stores()[0])

    def _run_layer(self, index: int, hidden: torch.Tensor, delta: torch.Tensor | None, batch: Batch | StepBatch) -> torch.Tensor:
        """Add the previous layer's `delta` and this layer's attention to `hidden`; return the feed-forward output as the next delta."""
        layer = self.layers[index]
        assert isinstance(layer, DecoderLayer)
        attended = self._attend(layer, index, layer.input_layernorm(hidden, delta), batch)
        if layer.attention_norm is not None:
            attended = layer.attention_norm(attended)
        output = self._feed_forward(layer, index, layer.post_attention_layernorm(hidden, attended), batch)
        return output if layer.feed_forward_norm is None else layer.feed_forward_norm(output)

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Return embeddings [T, H]. Each rank looks up all ids in its own rows, and the owner's row is selected for each id."""
        return self.embed_rows(torch.tensor(ids, device=self.device))

    def embed_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return embeddings [T, H] of token ids int64 [T]."""
        local = self.scale_embeddings(self.embed_tokens(tokens))
        shares = self.shares
        if shares.world_size == 1:
            return local
        size = self.config.hidden_size
        parts = self.collectives.gather_columns(local, [size] * shares.world_size).view(len(tokens), shares.world_size, size)
        owner = torch.bucketize(tokens, torch.tensor(shares.ends, device=self.device), right=True)
        return parts[torch.arange(len(tokens), device=self.device), owner]

    def scale_embeddings(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply embeddings of the model's dtype by the model's factor, rounded to that dtype."""
        scale = self.config.embedding_scale
        return rows if scale == 1 else rows * torch.full((), scale, dtype=rows.dtype, device=rows.device)

    def _attend(self, layer: DecoderLayer, index: int, x: torch.Tensor, batch: Batch | StepBatch) -> torch.Tensor:
        shares, qkv = self.shares, self._multiply(layer, index, "qkv_proj", x, batch)
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv = self._normalize_heads(qkv, layer.q_norm, layer.k_norm)
        if self.config.query_scale != 1:
            size = shares.num_heads * self.config.head_dim
            qkv = torch.cat((qkv[:, :size] * self.config.query_scale, qkv[:, size:]), dim=1)
        heads, kv_heads, softcap = shares.num_heads, shares.num_kv_heads, self.config.attention_softcap
        local = self.attention(qkv, heads, kv_heads, index, batch, layer.cache_scales, layer.window, softcap, local=layer.is_local)
        attended = self.collectives.gather_columns(local, shares.query)
        return self.collectives.gather_columns(self._multiply(layer, index, "o_proj", attended, batch), shares.hidden)

    def _multiply(self, layer: DecoderLayer, index: int, name: str, x: torch.Tensor, batch: Batch | StepBatch) -> torch.Tensor:
        """Run a fused linear, and add the updates of the adapters that the batch uses. Rows of other sequences keep their bits."""
        out: torch.Tensor = getattr(layer, name)(x)
        for number, rows in batch.adapted:
            if (update := self._updates.get((number, index, name))) is not None:
                update.add(x, out, rows)
        return out

    def _normalize_heads(self, qkv: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> torch.Tensor:
        """Normalize each head of queries and keys of [T, heads of queries, keys and values]."""
        heads, kv_heads, width = self.shares.num_heads, self.shares.num_kv_heads, self.config.head_dim
        parts = torch.split(qkv, [heads * width, kv_heads * width, kv_heads * width], dim=1)
        query, keys = (
            norm(part.contiguous().view(-1, width)).view(part.shape) for norm, part in zip((q_norm, k_norm), parts, strict=False)
        )
        return torch.cat((query, keys, parts[2]), dim=1)

    def _feed_forward(self, layer: DecoderLayer, index: int, x: torch.Tensor, batch: Batch | StepBatch) -> torch.Tensor:
        shares = self.shares
        if layer.experts is not None:
            routing = layer.experts.route(x)
            inner = layer.experts.expand(x, routing, self._activate)
            full = self.collectives.gather_columns(inner, shares.experts)
            return self.collectives.gather_columns(layer.experts.contract(full, routing), shares.hidden)
        inner = self._activate(self._multiply(layer, index, "gate_up_proj", x, batch))
        full = self.collectives.gather_columns(inner, shares.intermediate)
        return self.collectives.gather_columns(self._multiply(layer, index, "down_proj", full, batch), shares.hidden)
