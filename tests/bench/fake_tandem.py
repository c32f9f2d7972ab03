"""Stands for `tandem bench --json`: shows what it was called with, and figures that follow from the arguments."""

import argparse
import json
import sys
from pathlib import Path

WEIGHTS = {"576": 135e6, "2048": 1.1e9, "4096": 6.7e9, "8192": 69e9}


def main() -> None:
    """Answer."""
    parser = argparse.ArgumentParser()
    assert sys.argv.pop(1) == "bench"
    for name in ("json", "random-weights"):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("model-config", "checkpoint", "quantization", "dtype", "num-layers"):
        parser.add_argument(f"--{name}")
    for name in ("workers", "threads-per-rank", "prompt-tokens", "new-tokens", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--batch-size", required=True)
    options = parser.parse_args()
    raw = json.loads(Path(options.model_config).read_text())
    layers = int(options.num_layers or raw["num_hidden_layers"])
    weights = WEIGHTS[str(raw["hidden_size"])] * layers / raw["num_hidden_layers"]
    sizes = [int(size) for size in options.batch_size.split(",")]
    seconds = weights / 30e9 + layers * 5e-4 + options.prompt_tokens * 1e-6
    decode = [{"batch_size": size, "tokens_per_second": size / (seconds * (1 + size / 32))} for size in sizes]
    for row in decode:
        row |= {"tokens_per_second_min": row["tokens_per_second"], "tokens_per_second_max": row["tokens_per_second"]}
        row |= {"bytes_per_second": weights / seconds, "bandwidth_share": weights / seconds / 33e9}
    names = ("prompt_tokens", "new_tokens", "rounds", "dtype", "quantization")
    answer = {name: getattr(options, name) for name in names} | {"bench": "tandem", "version": "0", "model": "fake", "num_layers": layers}
    answer |= {"world_size": options.workers, "threads_per_rank": options.threads_per_rank, "kernel": "fake", "collectives": "fake"}
    answer |= {"device": "cpu", "machine": "fake", "cores": 2, "date": "2026-01-01", "memory_bandwidth_bytes_per_second": 33e9}
    answer |= {"weight_bytes": [int(weights / options.workers)] * options.workers, "decode_bytes_per_step": weights}
    answer |= {"load_seconds": 1.0, "prefill_tokens_per_second": 1e11 / weights, "gather_seconds": 3e-5, "decode": decode}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
