"""Loading and resharding on this machine, cold and warm, beside what `tandem plan` said.

    python scripts/bench/loading.py MODEL_CONFIG.json [--layers 2] [--workers 1 2 8] [--reshard 8] [--dtype bfloat16]

Writes a random int8 checkpoint in the shape of a Hugging Face config.json (of its first LAYERS layers), reshards it, loads both
with each number of ranks, and decodes a prompt: the tokens have to be the same everywhere. Cold: the files are taken out of the
page cache first. Every run stands beside plain reads of the same files, once, in the same state, into fresh memory, by as many
processes as there are cores: loading is what the stats say, from a rank's first step with PyTorch imported to its last weight;
the first token is counted from the start of the command, Python and PyTorch included, with the end of the command.
"""

import argparse
import json
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from model.spec.config import read_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme, declare_scheme
from random_checkpoint import write_random_checkpoint

_NEW_TOKENS = 8
_READ_BYTES = 8 << 20


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(folder: Path) -> float:
    """Seconds to read a folder's weights once: each process a part of every file."""
    num_processes = len(os.sched_getaffinity(0))
    started = time.perf_counter()
    pids = []
    for number in range(num_processes):
        if not (pid := os.fork()):
            for file in folder.glob("*.safetensors"):
                _read_part(file, number, num_processes)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        if os.waitpid(pid, 0)[1]:
            raise SystemExit("plain reads failed")
    return time.perf_counter() - started


def _read_part(file: Path, number: int, num_parts: int) -> None:
    first, end = (file.stat().st_size * part // num_parts for part in (number, number + 1))
    with mmap.mmap(-1, max(1, end - first)) as memory, memoryview(memory) as view, file.open("rb", buffering=0) as opened:
        memory.madvise(mmap.MADV_HUGEPAGE)
        done = 0
        while done < end - first:
            with view[done : min(done + _READ_BYTES, end - first)] as place:
                done += os.preadv(opened.fileno(), [place], first + done)


def call(*arguments: str | Path) -> str:
    """Standard output of a `tandem` command, which has to succeed."""
    command = [sys.executable, "-m", "launcher", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def measure(checkpoint: Path, workers: int, dtype: str, folder: Path) -> dict[str, Any]:
    """Load and decode a few tokens; stats, seconds from start to first token, ids and plan."""
    stats, output = folder / "stats.json", folder / "output.jsonl"
    options = ("--checkpoint", checkpoint, "--workers", str(workers), "--dtype", dtype)
    run = ("--prompt", "a" * 16, "--max-new-tokens", str(_NEW_TOKENS), "--ignore-eos", "--stats", stats, "--output", output)
    started = time.perf_counter()
    call("predict", *options, *run, "--log-dir", folder / "log")
    seconds = time.perf_counter() - started
    plan = json.loads(call("plan", *options, "--tokens", "24", "--json"))
    found = json.loads(stats.read_text())
    found["first_token_seconds"] = seconds - (_NEW_TOKENS - 1) / found["decode_tokens_per_second"]
    found["ids"] = json.loads(output.read_text())["token_ids"]
    found["planned_peak_bytes"] = [rank["peak_bytes"] for rank in plan["ranks"]]
    return dict(found)


def main() -> None:
    """Print one line a run, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--reshard", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    raw = {**read_config(options.config), "num_hidden_layers": options.layers, "torch_dtype": options.dtype}
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, ranks = folder / "whole", folder / "ranks"
        write_random_checkpoint(whole, declare_scheme(raw, Scheme(LinearScheme(), ("lm_head",))))
        Tokenizer(models.BPE({"a": 0}, [])).save(str(whole / "tokenizer.json"))
        size = sum(file.stat().st_size for file in whole.iterdir())
        for state in ("cold", "warm"):
            if state == "cold":
                forget(whole)
            started = time.perf_counter()
            call("reshard", whole, ranks, "--workers", str(options.reshard), "--overwrite")
            seconds = time.perf_counter() - started
            print(f"reshard 1 -> {options.reshard}, {state}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s")
        for checkpoint in (whole, ranks):
            for workers in options.workers:
                for state in ("cold", "warm"):
                    if state == "cold":
                        forget(checkpoint)
                    plain = read_plainly(checkpoint)
                    if state == "cold":
                        forget(checkpoint)
                    found = measure(checkpoint, workers, options.dtype, folder)
                    results.append({"checkpoint": checkpoint.name, "state": state, "plain_read_seconds": plain, **found})
                    read, peak = sum(found["read_bytes"]), max(found["peak_rss_bytes"])
                    error = max(abs(p / f - 1) for p, f in zip(found["planned_peak_bytes"], found["peak_rss_bytes"], strict=True))
                    seconds, first = found["load_seconds"], found["first_token_seconds"]
                    print(
                        f"{checkpoint.name}, {workers} ranks, {state}: loaded in {seconds:.2f} s, {read / 1e9 / seconds:.2f} GB/s, "
                        f"first token {first:.2f} s after the start; plain reads {plain:.2f} s, "
                        f"so {seconds / plain:.2f} x loading alone and {first / plain:.2f} x in all; "
                        f"{read / size:.3f} of the file read, peak {peak / 1e6:.0f} MB a rank, the plan is off by {error:.1%}",
                        flush=True,
                    )
    same = len({tuple(result["ids"]) for result in results}) == 1
    print(f"the same tokens everywhere: {same}")
    print(json.dumps({"date": date.today().isoformat(), "cpu": platform.processor() or platform.machine(), "same": same, "runs": results}))
    sys.exit(not same)


if __name__ == "__main__":
    main()
