"""Plan what every rank of a run will own, read and need, from sizes alone: without tensors, files or PyTorch.

`weight_bytes` and `file_bytes` are exact. `peak_bytes` models `model/decoder/loading.py` step by step, plus a constant for the process
itself; a test compares it with a real run.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from model.spec.config import DEFAULT_BLOCK_SIZE, DTYPES, PREFILL_TOKENS, LlamaConfig, count_blocks
from model.spec.linear_memory import count_linear_bytes
from model.spec.linear_scheme import run_as_one
from model.spec.lora_updates import LoraUpdate, count_adapter_bytes
from model.spec.scheme import Scheme
from model.spec.stored_form import StoredForm
from model.spec.weights import WeightSpec, has_bias, linear_shape, list_fused, list_norms, norm_size, plan_weights
from parallel.layout import TILE_ROWS, count_tiled_rows, plan_heads

PROCESS_BYTES: Mapping[str, tuple[int, int]] = {
    "float32": (200_000_000, 209_000_000),
    "bfloat16": (200_000_000, 222_000_000),
    "float16": (200_000_000, 212_000_000),
}
"""By compute dtype, memory of a rank without weights, with native kernels or floats, and with PyTorch's int8 matmul: Python, PyTorch 2.13
(CPU build), and the first kernel calls. Measured for ranks forked from the starter, including the about 150 MB that they share with it; a
rank of another launcher needs 55 to 70 MB more.
"""
_DEQUANTIZER_BYTES = 12_000_000
"""The gguf library, and its copies of the rows that it dequantizes. Measured."""
_EMBEDDING = "model.embed_tokens.weight"
_PACKED_ROWS = 48
"""PyTorch's packed int8 matrices consist of whole blocks of this many rows (measured)."""
_PACKED_ROW_BYTES = 24
"""Extra bytes per row in PyTorch's packed int8 matrices (measured)."""
_BYTES: Mapping[str, int] = {**DTYPES, "float8_e4m3fn": 1, "int8": 1, "int32": 4, "int64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """The plan of one rank."""

    rank: int
    heads: tuple[int, int]
    """Query heads [start, stop)."""
    kv_heads: tuple[int, int]
    """KV heads [start, stop); several ranks may hold the same one."""
    hidden_rows: tuple[int, int]
    """Rows of the projections back into the residual stream."""
    intermediate_rows: tuple[int, int]
    """Rows of the feed-forward intermediate dimension; of each expert, if there are any."""
    vocab_rows: tuple[int, int]
    """Rows of the embedding and of the head."""
    file_bytes: int
    """Bytes read from the checkpoint."""
    weight_bytes: int
    """Weights in memory."""
    streamed_bytes: int
    """Weights read per decoded token."""
    kv_cache_bytes: int
    """KV cache of all sequences at full length."""
    activation_bytes: int
    """Output and inputs of the largest matmul in prefill."""
    peak_bytes: int
    """Maximum resident memory, on a host that computes on CPUs."""
    adapter_bytes: int = 0
    """LoRA adapters in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The workload of a run."""

    dtype: str
    """Compute dtype: a key of DTYPES."""
    kv_cache: str | None = None
    """See `model/spec/scheme.py`; None: in `dtype`."""
    batch_size: int = 1
    """Concurrent sequences."""
    tokens: int
    """Tokens per sequence, prompt and new ones."""
    num_threads: int = 1
    """Threads per rank; as many weights are packed at once, if they need packing."""
    own_kernels: bool = True
    """Whether weights stay as stored, as native kernels use them; PyTorch's int8 matmul packs them."""
    block_size: int = DEFAULT_BLOCK_SIZE
    """Tokens per KV cache block; a sequence occupies whole blocks."""
    num_blocks: int | None = None
    """Maximum number of blocks; None: as many as the sequences need."""

    @property
    def cached_tokens(self) -> int:
        """Capacity of the KV cache in tokens."""
        filled = self.batch_size * count_blocks(self.tokens, self.block_size)
        return self.block_size * (filled if self.num_blocks is None else min(filled, self.num_blocks))


def plan_ranks(
    config: LlamaConfig,
    scheme: Scheme,
    world_size: int,
    workload: Workload,
    stored: Mapping[str, StoredForm] | None = None,
    adapters: Sequence[Mapping[str, LoraUpdate]] = (),
) -> list[RankPlan]:
    """Plan a run. `stored`: forms of the checkpoint's tensors; None: the dtype of config.json for all unquantized tensors. `adapters`: the
    updates of each LoRA adapter.

    Raises LayoutError when the model has too few units.
    """
    config.layout().check(world_size)
    runs = _find_equal_layers(config, scheme, stored or {})
    specs = plan_weights(config, scheme, layers=sorted({layer for layer, _ in runs}))
    plans = [_plan_rank(config, scheme, specs, runs, rank, world_size, workload, stored or {}) for rank in range(world_size)]
    return [_add_adapters(plan, sum(count_adapter_bytes(config, one, plan.rank, world_size) for one in adapters)) for plan in plans]


def _add_adapters(plan: RankPlan, num_bytes: int) -> RankPlan:
    return replace(plan, adapter_bytes=num_bytes, peak_bytes=plan.peak_bytes + num_bytes)


def measure_balance(config: LlamaConfig, scheme: Scheme, world_size: int) -> float:
    """Return the mean share of the weights over the largest: 1 is balanced. Computed from one layer, the embedding and the head."""
    specs = list(plan_weights(config, scheme, layers=(0,)).values())
    shares = [sum(_count_elements(spec, *spec.rows(rank, world_size)) for spec in specs) for rank in range(world_size)]
    return sum(shares) / world_size / max(shares)


def _find_equal_layers(config: LlamaConfig, scheme: Scheme, stored: Mapping[str, StoredForm]) -> list[tuple[int, int]]:
    """Return runs of identically stored layers: (index of the first layer of that kind, length of the run).

    A model has few kinds of layers, so each kind is planned only once.
    """
    types: dict[str, list[tuple[str, StoredForm]]] = {}
    for name, kind in stored.items():
        if name.startswith("model.layers."):
            number, _, rest = name.removeprefix("model.layers.").partition(".")
            types.setdefault(number, []).append((rest, kind))
    first: dict[object, int] = {}
    runs: list[tuple[int, int]] = []
    for layer in range(config.num_hidden_layers):
        fused = list_fused(config, layer).values()
        linears = tuple(scheme.find_linear(f"model.layers.{layer}.{name}") for names in fused for name in names)
        alike = first.setdefault((linears, frozenset(types.get(str(layer), ())), config.has_experts(layer)), layer)
        if runs and runs[-1][0] == alike:
            runs[-1] = (alike, runs[-1][1] + 1)
        else:
            runs.append((alike, 1))
    return runs


def _plan_rank(
    config: LlamaConfig,
    scheme: Scheme,
    specs: Mapping[str, WeightSpec],
    runs: Sequence[tuple[int, int]],
    rank: int,
    world_size: int,
    workload: Workload,
    stored: Mapping[str, StoredForm],
) -> RankPlan:
    layout, itemsize, num_threads = config.layout(), DTYPES[workload.dtype], workload.num_threads
    batch_size, tokens = workload.batch_size, workload.tokens
    heads, kv_heads = plan_heads(config.num_attention_heads, config.num_key_value_heads, rank, world_size)
    splits = {"hidden": config.hidden_size, "intermediate": config.intermediate_size, "vocab": config.vocab_size}
    rows = {name: getattr(layout, name).interval(size, rank, world_size) for name, size in splits.items()}
    if config.experts is not None:
        rows["intermediate"] = layout.experts.interval(config.experts.intermediate_size, rank, world_size)

    counts: Counter[str] = Counter()
    for layer, length in runs:
        counts[str(layer)] += length

    def file_bytes(name: str, spec: WeightSpec) -> int:
        if name.endswith(".weight_shape"):  # given in config.json, so not read
            return 0
        form = stored.get(name) or StoredForm(spec.dtypes[0] if len(spec.dtypes) == 1 else config.dtype)
        times = counts[name.split(".")[2]] if name.startswith("model.layers.") else 1
        start, stop = spec.rows(rank, world_size)
        one = (stop - start) * form.row_bytes if form.row_bytes else _count_elements(spec, start, stop) * _BYTES[form.dtype]
        return one * times

    # Without packing, weights are loaded one after another.
    num_packers = 0 if workload.own_kernels else num_threads
    steps: list[tuple[_Step, int]] = []
    products: list[_Step] = []
    skipped: dict[int, int] = {}
    for layer_steps, length in _list_steps(config, scheme, specs, runs, rank, world_size, itemsize, packs=not workload.own_kernels):
        steps += [(step, length) for step in layer_steps]
        filled = [step for step in layer_steps if step.read_bytes]
        # Of equal layers, the last ones are loaded on top of the most memory; consider as many as fit in one window.
        looked_at = min(length, num_packers + 2)
        skipped[len(products)] = (length - looked_at) * sum(step.packed_bytes for step in filled)
        products += filled * looked_at
    kept, peak = sum(step.packed_bytes * length for step, length in steps if not step.read_bytes), 0
    for index, step in enumerate(products):
        kept += skipped.get(index, 0)
        packing = products[index : index + max(1, num_packers)]
        following = products[index + num_packers : index + num_packers + 1] if num_packers else []
        # Of the weights that are packed concurrently, only the largest is counted at its peak.
        at_once = sum(other.loading_bytes for other in packing) - sum(sorted(other.read_bytes for other in packing)[:-1])
        peak = max(peak, kept + at_once + sum(other.read_bytes for other in following))
        kept += step.packed_bytes
    kv_bytes = _count_cache_bytes(config, kv_heads[1] - kv_heads[0], workload.kv_cache, itemsize) * workload.cached_tokens
    activations = _count_activation_bytes(config, scheme, rows, min(PREFILL_TOKENS, batch_size * tokens), itemsize)
    weights = sum(step.kept_bytes * length for step, length in steps)
    return RankPlan(
        rank=rank,
        heads=heads,
        kv_heads=kv_heads,
        hidden_rows=rows["hidden"],
        intermediate_rows=rows["intermediate"],
        vocab_rows=rows["vocab"],
        file_bytes=sum(file_bytes(name, spec) for name, spec in specs.items())
        + (file_bytes(_EMBEDDING, specs[_EMBEDDING]) if scheme.head is not None and config.tie_word_embeddings else 0),
        weight_bytes=weights,
        streamed_bytes=round(sum(step.kept_bytes * step.streamed_share * length for step, length in steps))
        - (0 if config.tie_word_embeddings and scheme.head is None else steps[0][0].kept_bytes),
        kv_cache_bytes=kv_bytes,
        activation_bytes=activations,
        peak_bytes=PROCESS_BYTES[workload.dtype][scheme.linear is not None and not workload.own_kernels]
        + max(peak, kept + kv_bytes + activations)
        + (_DEQUANTIZER_BYTES if any(form.encoding for form in stored.values()) else 0),
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """One layer object to load."""

    kept_bytes: int
    """Weights, as counted in stats."""
    packed_bytes: int
    """Weights including the kernel's overhead."""
    loading_bytes: int = 0
    """Peak memory while it is loaded or packed, including itself."""
    read_bytes: int = 0
    """Size of the data read for it; 0: no larger than the weights it keeps."""
    streamed_share: float = 1.0
    """Share of its weights that a decoded token needs, on average."""


def _list_steps(
    config: LlamaConfig,
    scheme: Scheme,
    specs: Mapping[str, WeightSpec],
    runs: Sequence[tuple[int, int]],
    rank: int,
    world_size: int,
    itemsize: int,
    *,
    packs: bool,
) -> Iterator[tuple[list[_Step], int]]:
    """Return the loading steps of `load_model`, in order, with their repetitions."""
    layout = config.layout()

    def local(name: str) -> int:
        # The last one is the source of a tied head that is quantized.
        spec = next(specs[key] for key in (f"{name}.weight", f"{name}.weight_scale", _EMBEDDING) if key in specs)
        start, stop = spec.rows(rank, world_size)
        return stop - start

    def linear(names: tuple[str, ...], columns: int, units: tuple[int, ...], share: float = 1.0) -> Iterator[_Step]:
        first = scheme.find_linear(names[0])
        if not run_as_one([scheme.find_linear(name) for name in names]):
            for name, unit in zip(names, units, strict=True):
                yield from linear((name,), columns, (unit,), share)
            return
        rows = [local(name) for name in names]
        if first is None or first.float8:
            size = itemsize * columns if first is None else columns + 4 * first.num_groups(columns)
            tiled = sum(count_tiled_rows(count, unit) for count, unit in zip(rows, units, strict=True)) * size
            raw = sum(rows) * size
            yield _Step(tiled, tiled, raw + (tiled if tiled != raw else 0), raw, share)
            return
        raw = sum(rows) * columns
        groups = first.num_groups(columns)
        kept = count_linear_bytes(sum(rows), columns, first, own_kernels=not packs)
        if not packs:
            # The integers of 4-bit weights are packed after they were read, a byte each.
            yield _Step(kept, kept, kept + (raw if first.bits == 4 else 0), raw, share)
            return
        blocks = -(-sum(rows) // _PACKED_ROWS) * _PACKED_ROWS
        packed = blocks * columns + sum(rows) * (_PACKED_ROW_BYTES + 4) * groups
        # The rows, joined if fused; a copy as the quantized tensor to pack; and the packed weight.
        yield _Step(kept, packed, raw + (raw if groups == 1 else raw // groups) + packed, raw, share)

    vocab = count_tiled_rows(local("model.embed_tokens"), layout.vocab.unit) * config.hidden_size * itemsize
    yield [_Step(vocab, vocab)], 1
    head_dim = config.head_dim
    units = {
        "qkv_proj": (head_dim, head_dim, head_dim),
        "o_proj": (layout.hidden.unit,),
        "gate_up_proj": (layout.intermediate.unit, layout.intermediate.unit),
        "down_proj": (layout.hidden.unit,),
    }
    expert_units = {"gate_up_proj": (layout.experts.unit, layout.experts.unit), "down_proj": units["down_proj"]}

    def small(size: int, element_bytes: int = itemsize) -> _Step:
        return _Step(size * element_bytes, size * element_bytes)

    norm_bytes = 4 if config.norm_offset else itemsize
    layers: dict[int, list[_Step]] = {}
    for layer, length in runs:
        if layer not in layers:
            layers[layer] = [small(norm_size(config, attribute), norm_bytes) for attribute in list_norms(config)]
            share = 1.0
            if config.experts is not None and config.has_experts(layer):
                size = 4 * config.hidden_size * count_tiled_rows(config.experts.count, TILE_ROWS)
                layers[layer].append(_Step(size, size))
                share = config.experts.per_token / config.experts.count
            for fused, names in list_fused(config, layer).items():
                full, columns = tuple(f"model.layers.{layer}.{name}" for name in names), linear_shape(config, names[0])[1]
                is_expert, module = fused.startswith("experts."), fused.rpartition(".")[2]
                layers[layer] += linear(full, columns, (expert_units if is_expert else units)[module], share if is_expert else 1.0)
                if has_bias(config, names[0]):
                    layers[layer].append(small(sum(local(name) for name in full)))
        yield layers[layer], length
    yield [small(config.hidden_size, norm_bytes)], 1
    if scheme.head is not None or not config.tie_word_embeddings:
        yield list(linear(("lm_head",), config.hidden_size, (layout.vocab.unit,))), 1


def _count_elements(spec: WeightSpec, start: int, stop: int) -> int:
    count = stop - start
    for size in spec.shape[1:]:
        count *= size
    return count


def _count_cache_bytes(config: LlamaConfig, kv_heads: int, kv_cache: str | None, itemsize: int) -> int:
    """Bytes per token over all layers."""
    values = config.head_dim * (itemsize if kv_cache is None else 1) + (4 if kv_cache == "token" else 0)
    return config.num_hidden_layers * 2 * kv_heads * values


def _count_activation_bytes(config: LlamaConfig, scheme: Scheme, rows: Mapping[str, tuple[int, int]], tokens: int, itemsize: int) -> int:
    """Bytes of the feed-forward, the widest part: residual stream, both halves in float32, gathered activations,
    and their integer slices.
    """
    start, stop = rows["intermediate"]
    width, share = config.intermediate_size, stop - start
    if config.experts is not None:  # the pairs of all experts, and a few rows of one expert at a time
        share *= config.experts.per_token
        width = config.experts.intermediate_size * config.experts.per_token + config.hidden_size * config.experts.per_token
    wide = width * itemsize + share * (2 * itemsize + 8)
    slices = 0 if scheme.linear is None else 4 * width * (4 if itemsize == 4 else 3)
    return tokens * (3 * config.hidden_size * itemsize + wide + slices)
