"""Decode speed of int8 A16W8 on this machine, through `tandem predict` itself, beside the machine's memory bandwidth.

    python scripts/bench/decode.py MODEL_CONFIG.json [--workers 1 2] [--layers 8] [--new-tokens 32] [--dtype bfloat16]

Writes a random int8 checkpoint in the shape of a Hugging Face config.json (of its first LAYERS layers), decodes one
prompt with each number of ranks, and prints a table; the last line is one JSON object. Batch 1 reads every weight
once a token: GB/s = bytes of weights x tokens/s, and cannot exceed the bandwidth of memory.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from tokenizers import Tokenizer, models

from model.checkpoint.folder_writing import write_json
from model.checkpoint.safetensors_file import SafetensorsWriter
from model.checkpoint.source import TensorInfo
from model.config import build_config, read_config
from model.scheme import LinearScheme, Scheme, declare_scheme
from model.weights import plan_weights

_GIB = 1 << 30


def measure_bandwidth_bytes_per_second() -> float:
    """Best of five sums over 1 GiB of float32, all threads."""
    block = torch.ones(_GIB // 4)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - started)
    return _GIB / min(seconds)


def write_random_checkpoint(folder: Path, raw: dict[str, object], dtype: torch.dtype) -> None:
    """A checkpoint of random weights, tensor by tensor, and a tokenizer of one letter."""
    config, scheme = build_config(raw), Scheme(LinearScheme(), ("lm_head",))
    infos = {}
    for name, spec in plan_weights(config, scheme).items():
        infos[name] = TensorInfo(spec.shape, dtype if len(spec.dtypes) > 1 else getattr(torch, spec.dtypes[0]))
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(folder / "model.safetensors", infos) as writer:
        for name, info in infos.items():
            if name.endswith("weight_packed"):
                value = torch.randint(-(2**31), 2**31, info.shape, generator=generator, dtype=torch.int64).to(torch.int32)
            elif name.endswith("weight_shape"):
                value = torch.tensor(infos[name.replace("_shape", "_packed")].shape) * torch.tensor([1, 4])
            elif name.endswith("weight_scale"):
                value = torch.full(info.shape, 2e-4, dtype=info.dtype)
            else:
                value = (torch.randn(info.shape, generator=generator) * 0.02).to(info.dtype)
            writer.write(name, value)
    write_json(folder / "config.json", declare_scheme(raw, scheme))
    Tokenizer(models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))


def run(folder: Path, workers: int, new_tokens: int, dtype: str) -> dict[str, float]:
    """Stats of one run of `tandem predict`."""
    stats = folder / f"stats_{workers}.json"
    command = [sys.executable, "-m", "launcher", "predict", "--checkpoint", str(folder), "--workers", str(workers)]
    command += ["--prompt", "a" * 16, "--max-new-tokens", str(new_tokens), "--ignore-eos", "--dtype", dtype]
    command += ["--stats", str(stats), "--log-dir", str(folder / "log")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return dict(json.loads(stats.read_text()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_config", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    raw = read_config(options.model_config)
    raw["num_hidden_layers"] = options.layers or raw["num_hidden_layers"]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        write_random_checkpoint(Path(name), raw, torch.bfloat16)
        for workers in options.workers:
            before = measure_bandwidth_bytes_per_second()
            stats = run(Path(name), workers, options.new_tokens, options.dtype)
            weights = sum(stats["weight_bytes"])  # type: ignore[call-overload]
            if not raw.get("tie_word_embeddings"):
                weights -= raw["vocab_size"] * raw["hidden_size"] * 2  # of the embedding, one row a token is read
            speed = stats["decode_tokens_per_second"]
            rows.append(
                {
                    "workers": workers,
                    "tokens_per_second": speed,
                    "gb_per_second": weights * speed / 1e9,
                    "memory_gb_per_second": before / 1e9,
                }
            )
            row = rows[-1]
            print(f"{workers} rank(s): {speed:.2f} tokens/s, {row['gb_per_second']:.1f} GB/s of {row['memory_gb_per_second']:.1f} GB/s")
    print(
        json.dumps(
            {
                "bench": "decode",
                "model_config": options.model_config.name,
                "layers": raw["num_hidden_layers"],
                "dtype": options.dtype,
                "machine": platform.processor() or platform.machine(),
                "cores": torch.get_num_threads(),
                "date": date.today().isoformat(),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
