"""What decoding would give on ranks that this machine does not have, from sizes and a few rates: no tensor, no process.

    python scripts/bench/simulate.py scripts/bench/shapes/llama2_70b.json --ranks 8,16 --bandwidth 100 --gather-microseconds 30 --link 3

A step of decoding lasts, on the rank that has most to do, as long as reading its weights and its sequences' keys and values, or as its
multiplications where these take longer; then come the gathers, four a layer and two more, and what small operators cost a layer. The
rates are assumptions that the output repeats; scripts/bench/growth.py takes them from measurements and shows how far these are off.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.settings.approaches import QuantizeOptions, check_words, plan_recipe
from model.planning import RankPlan, Workload, plan_ranks
from model.spec.config import DTYPES, LlamaConfig, build_config, read_config
from model.spec.scheme import Scheme

GATHERS_PER_LAYER = 4
GATHERS_PER_STEP = 2
"""Beside the layers': the embedding, and the best token of every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The rates of one rank."""

    bandwidth_bytes_per_second: float
    """Of its memory, for it alone."""
    gather_seconds: float = 0.0
    """One gather of very little."""
    link_bytes_per_second: float = float("inf")
    """At which it receives the others' parts."""
    operations_per_second: float = float("inf")
    """Multiplications and additions, as its kernel has them: slices of activations are not counted twice."""
    layer_seconds: float = 0.0
    """What a layer costs beside bytes and multiplications: small operators and the interpreter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where the time of one step goes, on the rank with most to do."""

    batch_size: int
    memory_seconds: float
    compute_seconds: float
    """The longer of this and memory counts: they overlap."""
    gather_seconds: float
    link_seconds: float
    operator_seconds: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return max(self.memory_seconds, self.compute_seconds) + self.gather_seconds + self.link_seconds + self.operator_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch_size / self.seconds


def simulate_decode(
    config: LlamaConfig,
    scheme: Scheme,
    machine: Machine,
    *,
    world_size: int,
    batch_size: int = 1,
    context_tokens: int = 512,
    dtype: str = "bfloat16",
) -> Step:
    """One step with `context_tokens` behind every sequence. Raises LayoutError for more ranks than the model has units."""
    workload = Workload(dtype=dtype, kv_cache=scheme.kv_cache, batch_size=batch_size, tokens=context_tokens)
    plans = plan_ranks(config, scheme, world_size, workload)
    widest = max(plan.streamed_bytes + plan.kv_cache_bytes for plan in plans)
    operations = 2 * batch_size * max(count_multiplied_weights(config, plan) for plan in plans)
    shared = world_size > 1
    gathers = (GATHERS_PER_LAYER * config.num_hidden_layers + GATHERS_PER_STEP) * shared
    received = batch_size * DTYPES[dtype] * max(count_received_elements(config, plan, world_size) for plan in plans)
    return Step(
        batch_size=batch_size,
        memory_seconds=widest / machine.bandwidth_bytes_per_second,
        compute_seconds=operations / machine.operations_per_second,
        gather_seconds=gathers * machine.gather_seconds,
        link_seconds=received / machine.link_bytes_per_second,
        operator_seconds=config.num_hidden_layers * machine.layer_seconds,
    )


def count_multiplied_weights(config: LlamaConfig, plan: RankPlan) -> int:
    """Weights of a rank that every token is multiplied by: all but the embedding, and the head."""
    query, hidden, inner, vocab = (stop - start for start, stop in (plan.heads, plan.hidden_rows, plan.intermediate_rows, plan.vocab_rows))
    key_value = plan.kv_heads[1] - plan.kv_heads[0]
    attention = (query + 2 * key_value) * config.head_dim * config.hidden_size + hidden * config.num_attention_heads * config.head_dim
    feed_forward = 2 * inner * config.hidden_size + hidden * config.intermediate_size
    return config.num_hidden_layers * (attention + feed_forward) + vocab * config.hidden_size


def count_received_elements(config: LlamaConfig, plan: RankPlan, world_size: int) -> int:
    """Of one token: what a rank takes from the others in all gathers of a step."""
    query, hidden, inner = (stop - start for start, stop in (plan.heads, plan.hidden_rows, plan.intermediate_rows))
    heads = (config.num_attention_heads - query) * config.head_dim
    layer = heads + 2 * (config.hidden_size - hidden) + config.intermediate_size - inner
    return config.num_hidden_layers * layer + (world_size - 1) * config.hidden_size


def build_scheme(config: LlamaConfig, quantization: str) -> Scheme:
    """How `tandem quantize -a` keeps a model; none: float."""
    if quantization == "none":
        return Scheme()
    options = QuantizeOptions(approach=quantization)
    return plan_recipe(options, check_words(options), None).build_scheme(config)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_config", type=Path)
    parser.add_argument("--ranks", default="8,16", help="one number, or several with commas")
    parser.add_argument("--quantization", default="rtn-a16w8", help="as tandem quantize -a, or none")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="tokens behind every sequence")
    parser.add_argument("--bandwidth", type=float, required=True, help="GB/s of each rank's memory")
    parser.add_argument("--gather-microseconds", type=float, default=0.0, help="one gather of very little")
    parser.add_argument("--link", type=float, default=float("inf"), help="GB/s at which a rank receives")
    parser.add_argument("--compute", type=float, default=float("inf"), help="GFLOP/s of each rank")
    parser.add_argument("--layer-microseconds", type=float, default=0.0, help="small operators of a layer")
    options = parser.parse_args(arguments)
    config = build_config(read_config(options.model_config), str(options.model_config))
    scheme = build_scheme(config, options.quantization)
    machine = Machine(
        bandwidth_bytes_per_second=options.bandwidth * 1e9,
        gather_seconds=options.gather_microseconds * 1e-6,
        link_bytes_per_second=options.link * 1e9,
        operations_per_second=options.compute * 1e9,
        layer_seconds=options.layer_microseconds * 1e-6,
    )
    words = {"batch_size": options.batch_size, "context_tokens": options.context, "dtype": options.dtype}
    steps = {size: simulate_decode(config, scheme, machine, world_size=size, **words) for size in map(int, options.ranks.split(","))}
    print(f"{'ranks':>6}{'tokens/s':>10}{'memory ms':>11}{'compute ms':>12}{'gathers ms':>12}{'link ms':>9}{'operators ms':>14}")
    for size, step in steps.items():
        parts = (step.memory_seconds, step.compute_seconds, step.gather_seconds, step.link_seconds, step.operator_seconds)
        cells = (f"{1e3 * part:>{width}.2f}" for part, width in zip(parts, (11, 12, 12, 9, 14), strict=True))
        print(f"{size:>6}{step.tokens_per_second:>10.2f}", *cells, sep="")
    rows = [{"world_size": size, "tokens_per_second": step.tokens_per_second, **asdict(step)} for size, step in steps.items()]
    # JSON has no infinity: what was not given is null.
    rates = {name: value if value != float("inf") else None for name, value in asdict(machine).items()}
    print(json.dumps({"bench": "simulate", "model": options.model_config.stem, "scheme": scheme.name, **words, **rates, "rows": rows}))


if __name__ == "__main__":
    main()
