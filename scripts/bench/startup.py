"""How soon a command gives its first token and a run decodes again after a death, in this tree and in another one, side by side.

    python scripts/bench/startup.py CHECKPOINT --against PATH --rounds 5
    python scripts/bench/startup.py CHECKPOINT --workers 2,8 --only first_token

PATH is another checkout of this project with its kernels built. Each round measures both trees one after the other, in changing order; a
ratio is the median over the rounds of this tree's figure divided by the other's. The files are read once before, so they are warm.

first_token: seconds from the start of `tandem predict` to its first output, and CPU seconds of all its processes, by --workers.
refusal: CPU seconds of --help, of a path that does not exist, and of more ranks than the model has units.
memory: largest private memory of a rank of an idle server beyond its weights and cache, ranks 1 to N-1.
recovery: seconds from the kill of a random rank to the next new token.

Prints a table; the last line is one JSON object.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 300


def start(tree: Path, *arguments: object, **streams: object) -> "subprocess.Popen[bytes]":
    """Start a command of a tree in a folder of its own."""
    environ = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "launcher", *map(str, arguments)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environ, **streams)  # type: ignore[call-overload,no-any-return]


def wait(process: "subprocess.Popen[bytes]") -> float:
    """Wait for the end of a command and return the CPU seconds of all its processes."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def measure_first_token(tree: Path, checkpoint: Path, workers: int, folder: Path) -> dict[str, float]:
    """Run one prompt to its first token."""
    options = ("--workers", workers, "--prompt", "The capital of France is", "--max-new-tokens", 1, "--log-dir", folder / "log")
    began = time.perf_counter()
    process = start(tree, "predict", "--checkpoint", checkpoint, *options, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        first = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
    cpu = wait(process)
    if process.returncode or not first:
        raise SystemExit(f"predict of {tree} ended with {process.returncode}")
    return {f"first token, {workers} ranks, s": seconds, f"the same, CPU s of all processes, {workers} ranks": cpu}


def measure_refusal(tree: Path, checkpoint: Path, workers: int, folder: Path) -> dict[str, float]:
    """Run commands that start nothing."""
    commands = {
        "--help": ("--help",),
        "no such path": ("predict", "--checkpoint", folder / "nothing", "--prompt", "a"),
        "too many ranks": ("predict", "--checkpoint", checkpoint, "--prompt", "a", "--workers", 100_000),
    }
    return {f"{name}, CPU s": wait(start(tree, *command)) for name, command in commands.items()}


def measure_memory(tree: Path, checkpoint: Path, workers: int, folder: Path) -> dict[str, float]:
    """Serve until the ranks are idle, and read their memory."""
    options = ("--workers", workers, "--port", 0, "--num-blocks", 16, "--log-dir", folder / "log")
    process = start(tree, "serve", "--checkpoint", checkpoint, *options, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        address = ""
        for line in process.stderr:
            if line.startswith((b"listening on ", b"listening at ")):
                address = line.split()[2].rstrip(b":").decode()
            if b"ready" in line or b"serving" in line:
                break
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            status = json.load(urllib.request.urlopen(f"{address}/status"))
            if status["state"] == "ready":
                break
            time.sleep(0.1)
        time.sleep(1)
        private = []
        for rank in status["ranks"][1:]:
            rows = (line.split() for line in Path(f"/proc/{rank['pid']}/smaps_rollup").read_text().splitlines()[1:])
            kilobytes = sum(int(row[1]) for row in rows if row[0] in ("Private_Clean:", "Private_Dirty:"))
            private.append(kilobytes * 1024 - rank["weight_bytes"] - rank["kv_cache_bytes"])
        return {"private memory of an idle rank, MB": max(private) / 1e6}
    finally:
        process.send_signal(signal.SIGTERM)
        process.stderr.close()
        process.wait(_SECONDS)


def find_ranks(run: "subprocess.Popen[bytes]") -> list[int]:
    """Process ids of the ranks of a run: those of its descendants that have mapped the memory through which ranks gather."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    below, found = {run.pid}, []
    while new := {pid for pid, parent in parents.items() if parent in below and pid not in below}:
        below |= new
    for pid in below - {run.pid}:
        try:
            if "/memfd:tandem " in Path(f"/proc/{pid}/maps").read_text():
                found.append(pid)
        except OSError:
            continue
    return found


def measure_recovery(tree: Path, checkpoint: Path, workers: int, folder: Path) -> dict[str, float]:
    """Kill a rank of a run that decodes."""
    stats = folder / "stats.json"
    # One prompt after the other: a tree that prints whole texts prints the first while it decodes the second.
    prompts = ("--prompt", "Once upon a time", "--prompt", "A llama is", "--max-batch-size", 1)
    options = ("--workers", workers, *prompts, "--max-new-tokens", 200, "--ignore-eos", "--threads-per-rank", 1)
    process = start(
        tree, "predict", "--checkpoint", checkpoint, *options, "--stats", stats, "--log-dir", folder / "log", stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout:
        process.stdout.read(1)
        os.kill(random.choice(find_ranks(process)), signal.SIGKILL)
        process.stdout.read()
    wait(process)
    return {f"kill to next token, {workers} ranks, s": json.loads(stats.read_text())["recovery_seconds"][0]}


MEASUREMENTS: dict[str, Callable[[Path, Path, int, Path], dict[str, float]]] = {
    "first_token": measure_first_token,
    "refusal": measure_refusal,
    "memory": measure_memory,
    "recovery": measure_recovery,
}
ONCE = ("refusal", "memory", "recovery")
"""Measured with the first number of --workers only."""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--against", type=Path, help="another checkout; without it there are no ratios")
    parser.add_argument("--workers", default="2,8", help="numbers of ranks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="this measurement; repeatable")
    arguments = parser.parse_args()
    trees = {"this": ROOT, **({"other": arguments.against.resolve()} if arguments.against else {})}
    workers = [int(word) for word in arguments.workers.split(",")]
    for file in arguments.checkpoint.rglob("*"):
        if file.is_file():
            file.read_bytes()
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        for number in range(arguments.rounds):
            for what in arguments.only or MEASUREMENTS:
                for count in workers[:1] if what in ONCE else workers:
                    for tree in sorted(trees, reverse=bool(number % 2)):
                        found = MEASUREMENTS[what](trees[tree], arguments.checkpoint.resolve(), count, Path(name))
                        for row, value in found.items():
                            figures.setdefault(row, {}).setdefault(tree, []).append(value)
                            print(f"round {number + 1} of {arguments.rounds}, {tree}: {row} {value:.2f}", file=sys.stderr, flush=True)
    result = {}
    for row, by_tree in figures.items():
        result[row] = {tree: statistics.median(values) for tree, values in by_tree.items()}
        words = ", ".join(f"{tree} {value:.2f}" for tree, value in result[row].items())
        if "other" in by_tree:
            ratios = [mine / theirs for mine, theirs in zip(by_tree["this"], by_tree["other"], strict=True)]
            result[row]["ratio"] = statistics.median(ratios)
            words += f"; ratio {result[row]['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{row}: {words}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
