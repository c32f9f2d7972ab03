"""The price of reproducibility: the linears of a decoder layer on several ranks, split as tandem does and as is fastest, same kernels.

    python scripts/bench/reproducibility.py scripts/bench/shapes/tinyllama_1.1b.json --workers 2 --rounds 5

reproducible: every weight is split over its output rows, and the ranks gather four times, so each dot product is whole and the result
does not depend on the number of ranks. split K: o_proj and down_proj are split over their input columns, and the ranks add up their
partial sums, two times a layer, as Megatron does: fewer messages, and a result that changes with the number of ranks. Attention, norms and
activations, which are the same in both, are left out. The kernels' own rules (a fixed order of sums for any batch and number of threads)
stay in both. Both run in turns in every round; the price is the median over the rounds of reproducible time / split-K time - 1.
Random int8 weights; one thread per rank. The last line is one JSON object, also written to --results.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from launcher.host.core_claims import claim_cores
from launcher.host.cores import bind_cores
from launcher.rendezvous.key_value_store import open_file_store
from model.backends.int8 import count_slices
from model.kernels.library import Kernels, find_kernels
from model.spec.config import LlamaConfig, build_config, read_config
from parallel.collectives import Collectives
from parallel.shared_memory import SharedMemoryCollectives
from tandem_bench import name_machine, slug

RESULTS = Path(__file__).resolve().with_name("results")
MODES = ("reproducible", "split K")
_LAYERS = 4
"""Layers that take turns, so that weights come from memory rather than from a cache."""
_SECONDS = 0.5


class Linear:
    """A random int8 weight [rows, columns] with a scale per row."""

    def __init__(self, kernels: Kernels, rows: int, columns: int) -> None:
        self._kernels = kernels
        self._weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        self._scale = torch.full((rows, 1), 1e-4)
        self._starts = torch.tensor([0, columns])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, columns] to [tokens, rows]."""
        return self._kernels.int8_linear(x, self._weight, self._scale, self._starts, count_slices(x.dtype), x.dtype)


def build_layer(kernels: Kernels, config: LlamaConfig, ranks: Collectives, mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """One layer's linears on this rank: hidden states [tokens, H] to those of the next layer."""
    count, rank, hidden = ranks.world_size, ranks.rank, config.hidden_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    qkv, gate_up = Linear(kernels, (query + 2 * key_value) // count, hidden), Linear(kernels, 2 * inner // count, hidden)

    def whole(linear: Linear, local: torch.Tensor) -> torch.Tensor:
        gathered = ranks.gather_columns(local, [local.shape[1]] * count)
        return ranks.gather_columns(linear(gathered), [hidden // count] * count)

    def partial(linear: Linear, local: torch.Tensor) -> torch.Tensor:
        sums = ranks.gather_columns(linear(local), [hidden] * count)
        return sums.view(len(sums), count, hidden).sum(dim=1)

    if mode == "reproducible":
        o, down, join = Linear(kernels, hidden // count, query), Linear(kernels, hidden // count, inner), whole
    else:
        o, down, join = Linear(kernels, hidden, query // count), Linear(kernels, hidden, inner // count), partial

    def run(x: torch.Tensor) -> torch.Tensor:
        attended = join(o, qkv(x)[:, : query // count].contiguous())
        return join(down, gate_up(attended)[:, : inner // count].contiguous())

    assert rank < count
    return run


def measure(layers: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, ranks: Collectives) -> float:
    """Seconds of a layer: the median of steps through all layers. Every rank takes as many steps."""
    seconds = []
    for step in range(1 << 20):
        if step % 8 == 0:
            ends = ranks.gather_columns(torch.tensor([[float(sum(seconds) > _SECONDS)]]), [1] * ranks.world_size)
            if ends.any():
                break
        started = time.perf_counter()
        for layer in layers:
            layer(x)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / len(layers)


def run_rank(rank: int, options: argparse.Namespace, folder: str, cores: Sequence[int] | None, answers: Any) -> None:
    """One rank; the first one sends the seconds by tokens, mode and round."""
    torch.set_num_threads(1)
    if cores is not None:
        bind_cores(rank, options.workers, cores)
    torch.manual_seed(rank)
    kernels, config = find_kernels(), build_config(read_config(options.config))
    if kernels is None:
        raise SystemExit("this needs the native kernels")
    store = open_file_store(Path(folder) / "store", options.workers)
    ranks = SharedMemoryCollectives(store, rank, options.workers, 60.0)
    layers = {mode: [build_layer(kernels, config, ranks, mode) for _ in range(_LAYERS)] for mode in MODES}
    found: dict[int, dict[str, list[float]]] = {tokens: {mode: [] for mode in MODES} for tokens in options.tokens}
    for index in range(-1, options.rounds):  # the first one warms up
        for tokens in options.tokens:
            x = torch.randn(tokens, config.hidden_size).to(torch.bfloat16)
            for mode in MODES if index % 2 else MODES[::-1]:
                ranks.barrier()
                seconds = measure(layers[mode], x, ranks)
                if index >= 0:
                    found[tokens][mode].append(seconds)
    if rank == 0:
        answers.put(found)
    ranks.barrier()
    ranks.close()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config.json")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=lambda words: [int(word) for word in words.split(",")], default=[1, 8, 32, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, claim_cores(options.workers, 1) as cores:
        ranks = [
            context.Process(target=run_rank, args=(rank, options, folder, None if cores is None else cores[rank], answers))
            for rank in range(options.workers)
        ]
        for one in ranks:
            one.start()
        found = answers.get(timeout=1800)
        for one in ranks:
            one.join()
    rows = {}
    for tokens, seconds in found.items():
        ratios = [whole / fastest for whole, fastest in zip(*(seconds[mode] for mode in MODES), strict=True)]
        medians = {mode: statistics.median(seconds[mode]) for mode in MODES}
        rows[tokens] = {"seconds": medians, "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        times = ", ".join(f"{mode} {medians[mode] * 1e3:.3f} ms" for mode in MODES)
        low, middle, high = (f"{one - 1:+.1%}" for one in (min(ratios), rows[tokens]["ratio"], max(ratios)))
        print(f"{tokens:>4} tokens: {times} a layer; price {middle} ({low} to {high})", flush=True)
    answer = {
        "bench": "reproducibility",
        "model": options.config.stem,
        "workers": options.workers,
        "cores_bound": cores is not None,
        "rounds": options.rounds,
        "machine": name_machine(),
        "date": date.today().isoformat(),
        "by_tokens": rows,
        "per_round": found,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"reproducibility_{slug(answer['model'])}_{slug(answer['machine'])}_{answer['date']}.json"
    file.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
