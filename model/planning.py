"""What every rank of a run will own, read and need, from sizes alone: no tensor, no file, no PyTorch.

`weight_bytes` and `file_bytes` are exact. `peak_bytes` follows `model/decoder/loading.py` step by step, on top of a constant for the
process itself; a test holds it against a real run. Knows the layout, the table of weights, and how linears are kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from model.spec.config import DEFAULT_BLOCK_SIZE, DTYPES, PREFILL_TOKENS, LlamaConfig, count_blocks
from model.spec.scheme import Scheme
from model.spec.weights import FUSED, WeightSpec, linear_shape, plan_weights
from parallel.layout import count_tiled_rows, plan_heads

PROCESS_BYTES: Mapping[str, tuple[int, int]] = {
    "float32": (254_000_000, 263_000_000),
    "bfloat16": (268_000_000, 280_000_000),
    "float16": (268_000_000, 280_000_000),
}
"""By compute type, a rank without its weights, in our kernels or with floats, and in PyTorch's int8 product: Python, an imported
PyTorch 2.13 (CPU build), what the first calls of kernels take. Measured."""
_PACKED_ROWS = 48
"""PyTorch's packed int8 matrices have whole blocks of so many rows (measured)."""
_PACKED_ROW_BYTES = 24
"""What it keeps of each row beside its weights (measured)."""
_BYTES: Mapping[str, int] = {**DTYPES, "int8": 1, "int32": 4, "int64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """One rank."""

    rank: int
    heads: tuple[int, int]
    """Query heads [start, stop)."""
    kv_heads: tuple[int, int]
    """Key-value heads [start, stop); several ranks may keep the same one."""
    hidden_rows: tuple[int, int]
    """Rows of the projections back into the residual stream."""
    intermediate_rows: tuple[int, int]
    """Rows of the feed-forward's inner dimension."""
    vocab_rows: tuple[int, int]
    """Rows of the embedding and of the head."""
    file_bytes: int
    """What it reads of the checkpoint."""
    weight_bytes: int
    """Its weights as they are kept."""
    streamed_bytes: int
    """Weights that each decoded token reads."""
    kv_cache_bytes: int
    """Keys and values of all sequences at their full length."""
    activation_bytes: int
    """The largest product of a prefill, with what it is made of."""
    peak_bytes: int
    """Largest resident size, on a host whose processors compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a run does with a model."""

    dtype: str
    """Type to compute in: a key of DTYPES."""
    kv_cache: str | None = None
    """See `model/spec/scheme.py`; None: in `dtype`."""
    batch_size: int = 1
    """Sequences that run together."""
    tokens: int
    """Of each sequence, prompt and new ones."""
    num_threads: int = 1
    """Of each rank; as many products are packed at once, where they are."""
    own_kernels: bool = True
    """Whether weights stay as they are stored, as the project's kernels take them; PyTorch's int8 product packs them."""
    block_size: int = DEFAULT_BLOCK_SIZE
    """Tokens of a block of keys and values; a sequence fills whole ones."""
    num_blocks: int | None = None
    """Such blocks at most; None: as many as the sequences fill."""

    @property
    def cached_tokens(self) -> int:
        """Tokens that there is memory for."""
        filled = self.batch_size * count_blocks(self.tokens, self.block_size)
        return self.block_size * (filled if self.num_blocks is None else min(filled, self.num_blocks))


def plan_ranks(
    config: LlamaConfig, scheme: Scheme, world_size: int, workload: Workload, stored: Mapping[str, str] | None = None
) -> list[RankPlan]:
    """Plan a run. `stored`: the types of the checkpoint's tensors; None: config.json's for all that is not quantized.

    Raises LayoutError when the model has too few units.
    """
    config.layout().check(world_size)
    specs = plan_weights(config, scheme)
    return [_plan_rank(config, scheme, specs, rank, world_size, workload, stored or {}) for rank in range(world_size)]


def measure_balance(config: LlamaConfig, scheme: Scheme, world_size: int) -> float:
    """Mean over largest share of the weights: 1 is even. From one layer, the embedding and the head."""
    specs = [spec for name, spec in plan_weights(config, scheme).items() if not name.startswith("model.layers.") or ".layers.0." in name]
    shares = [sum(_count_elements(spec, *spec.rows(rank, world_size)) for spec in specs) for rank in range(world_size)]
    return sum(shares) / world_size / max(shares)


def _plan_rank(
    config: LlamaConfig,
    scheme: Scheme,
    specs: Mapping[str, WeightSpec],
    rank: int,
    world_size: int,
    workload: Workload,
    stored: Mapping[str, str],
) -> RankPlan:
    layout, itemsize, num_threads = config.layout(), DTYPES[workload.dtype], workload.num_threads
    batch_size, tokens = workload.batch_size, workload.tokens
    heads, kv_heads = plan_heads(config.num_attention_heads, config.num_key_value_heads, rank, world_size)
    splits = {"hidden": config.hidden_size, "intermediate": config.intermediate_size, "vocab": config.vocab_size}
    rows = {name: getattr(layout, name).interval(size, rank, world_size) for name, size in splits.items()}

    def file_bytes(name: str, spec: WeightSpec) -> int:
        if name.endswith(".weight_shape"):  # config.json says the same, so nobody reads it
            return 0
        kind = stored.get(name) or (spec.dtypes[0] if len(spec.dtypes) == 1 else config.dtype)
        return _count_elements(spec, *spec.rows(rank, world_size)) * _BYTES[kind]

    steps = list(_list_steps(config, scheme, specs, rank, world_size, itemsize, packs=not workload.own_kernels))
    products = [step for step in steps if step.read_bytes]
    kept, peak = sum(step.packed_bytes for step in steps if not step.read_bytes), 0
    # Where nothing is packed, one product is filled after another.
    num_packers = 0 if workload.own_kernels else num_threads
    for index, step in enumerate(products):
        packing = products[index : index + max(1, num_packers)]
        following = products[index + num_packers : index + num_packers + 1] if num_packers else []
        # Of those that are packed at once only the largest is taken at its worst moment.
        at_once = sum(other.loading_bytes for other in packing) - sum(sorted(other.read_bytes for other in packing)[:-1])
        peak = max(peak, kept + at_once + sum(other.read_bytes for other in following))
        kept += step.packed_bytes
    kv_bytes = _count_cache_bytes(config, kv_heads[1] - kv_heads[0], workload.kv_cache, itemsize) * workload.cached_tokens
    activations = _count_activation_bytes(config, scheme, rows, min(PREFILL_TOKENS, batch_size * tokens), itemsize)
    weights = sum(step.kept_bytes for step in steps)
    return RankPlan(
        rank=rank,
        heads=heads,
        kv_heads=kv_heads,
        hidden_rows=rows["hidden"],
        intermediate_rows=rows["intermediate"],
        vocab_rows=rows["vocab"],
        file_bytes=sum(file_bytes(name, spec) for name, spec in specs.items()),
        weight_bytes=weights,
        streamed_bytes=weights - (0 if config.tie_word_embeddings else steps[0].kept_bytes),
        kv_cache_bytes=kv_bytes,
        activation_bytes=activations,
        peak_bytes=PROCESS_BYTES[workload.dtype][scheme.linear is not None and not workload.own_kernels]
        + max(peak, kept + kv_bytes + activations),
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """One layer object that loading fills."""

    kept_bytes: int
    """Weights, as the stats count them."""
    packed_bytes: int
    """Weights with what the kernel adds."""
    loading_bytes: int = 0
    """Largest need while it is filled or a thread packs it, itself included."""
    read_bytes: int = 0
    """What is read for it; 0: it takes no more than it keeps."""


def _list_steps(
    config: LlamaConfig, scheme: Scheme, specs: Mapping[str, WeightSpec], rank: int, world_size: int, itemsize: int, *, packs: bool
) -> Iterator[_Step]:
    """What `load_model` fills, in its order."""
    layout = config.layout()

    def local(name: str) -> int:
        spec = next(specs[key] for key in (f"{name}.weight_scale", f"{name}.weight") if key in specs)
        start, stop = spec.rows(rank, world_size)
        return stop - start

    def linear(names: tuple[str, ...], columns: int, units: tuple[int, ...]) -> Iterator[_Step]:
        first = scheme.find_linear(names[0])
        apart = first is not None and (first.smooth or first.act_order or first.activation == "tensor")
        if len(names) > 1 and (apart or any(scheme.find_linear(name) != first for name in names)):
            for name, unit in zip(names, units, strict=True):
                yield from linear((name,), columns, (unit,))
            return
        rows = [local(name) for name in names]
        if first is None:
            tiled = sum(count_tiled_rows(count, unit) for count, unit in zip(rows, units, strict=True)) * columns * itemsize
            raw = sum(rows) * columns * itemsize
            yield _Step(tiled, tiled, raw + (tiled if tiled != raw else 0), raw)
            return
        raw = sum(rows) * columns
        groups = first.num_groups(columns)
        kept = raw + sum(rows) * 4 * groups
        if not packs:
            yield _Step(kept, kept, kept, raw)
            return
        blocks = -(-sum(rows) // _PACKED_ROWS) * _PACKED_ROWS
        packed = blocks * columns + sum(rows) * (_PACKED_ROW_BYTES + 4) * groups
        # The rows, joined where they are fused; a copy as the quantized tensor that the kernel packs; and packed.
        yield _Step(kept, packed, raw + (raw if groups == 1 else raw // groups) + packed, raw)

    vocab = count_tiled_rows(local("model.embed_tokens"), layout.vocab.unit) * config.hidden_size * itemsize
    yield _Step(vocab, vocab)
    head_dim = config.head_dim
    units = {
        "qkv_proj": (head_dim, head_dim, head_dim),
        "o_proj": (layout.hidden.unit,),
        "gate_up_proj": (layout.intermediate.unit, layout.intermediate.unit),
        "down_proj": (layout.hidden.unit,),
    }
    norm = _Step(config.hidden_size * itemsize, config.hidden_size * itemsize)
    for layer in range(config.num_hidden_layers):
        yield from (norm, norm)
        for fused, names in FUSED.items():
            columns = linear_shape(config, names[0])[1]
            yield from linear(tuple(f"model.layers.{layer}.{name}" for name in names), columns, units[fused])
    yield norm
    if not config.tie_word_embeddings:
        yield from linear(("lm_head",), config.hidden_size, (layout.vocab.unit,))


def _count_elements(spec: WeightSpec, start: int, stop: int) -> int:
    count = stop - start
    for size in spec.shape[1:]:
        count *= size
    return count


def _count_cache_bytes(config: LlamaConfig, kv_heads: int, kv_cache: str | None, itemsize: int) -> int:
    """Of one token in all layers."""
    values = config.head_dim * (itemsize if kv_cache is None else 1) + (4 if kv_cache == "token" else 0)
    return config.num_hidden_layers * 2 * kv_heads * values


def _count_activation_bytes(config: LlamaConfig, scheme: Scheme, rows: Mapping[str, tuple[int, int]], tokens: int, itemsize: int) -> int:
    """Of the feed-forward, the widest part: residual stream, both halves in float32, what is gathered, and its slices as integers."""
    start, stop = rows["intermediate"]
    wide = config.intermediate_size * itemsize + (stop - start) * (2 * itemsize + 8)
    slices = 0 if scheme.linear is None else 4 * config.intermediate_size * (4 if itemsize == 4 else 3)
    return tokens * (3 * config.hidden_size * itemsize + wide + slices)
