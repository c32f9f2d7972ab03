"""One `tandem predict` that `chaos.py` disturbs: its processes, what hits them, and what has to hold when it has ended."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROMPTS = ("The capital of France is", "Water boils at", "Two riders on one bicycle", "Once upon a time")
RUN_SECONDS = 180.0
"""A run that takes longer hangs."""
ROOT = Path(__file__).resolve().parents[2]
MARK = "TANDEM_CHAOS_RUN"
RANK_NAME = "tandem rank "
"""The name of a rank's process, before its number."""
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGSTOP)


@dataclass
class Run:
    """One `tandem predict` that is being disturbed."""

    folder: Path
    process: "subprocess.Popen[bytes]"
    mark: str
    hits: list[tuple[int, str]] = field(default_factory=list)
    """Rank and signal of each hit."""

    def find_ranks(self) -> dict[int, int]:
        """Process id of every rank that lives; a zombie has no environment, and so no mark."""
        names = {pid: read_file(pid, "comm").decode().strip() for pid in find_processes(self.mark)}
        return {int(name.removeprefix(RANK_NAME)): pid for pid, name in names.items() if name.startswith(RANK_NAME)}

    def hit(self, number: signal.Signals) -> float | None:
        """Send a signal to a random rank; when that was, or None when there is none."""
        ranks = self.find_ranks()
        if not ranks:
            return None
        rank = random.choice(sorted(ranks))
        try:
            os.kill(ranks[rank], number)
        except ProcessLookupError:
            return None
        self.hits.append((rank, number.name))
        return time.time()

    def finish(self) -> int | None:
        """Its exit code; None when it hangs, and was killed."""
        try:
            return self.process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def clean(self) -> list[int]:
        """Kill what is left of it; the processes that were."""
        left = find_processes(self.mark)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        return left

    def read(self, name: str) -> str:
        """A file of the run, empty when it is not there."""
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""


def read_file(pid: int, name: str) -> bytes:
    """A file of a process, empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def find_processes(mark: str) -> list[int]:
    """All processes that descend from a run: they inherit its mark."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if f"{MARK}={mark}\0".encode() in read_file(pid, "environ")]


def start(
    arguments: argparse.Namespace,
    parent: Path,
    max_restarts: int,
    temporary: Path,
    *options: str | Path,
    checkpoint: Path | None = None,
    output: Path | None = None,
    log_dir: Path | None = None,
    prefix: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Run:
    """Start a run in a folder of its own. `before` is called in the new process; `prefix` are words before the command."""
    folder, mark = Path(tempfile.mkdtemp(dir=parent)), uuid.uuid4().hex
    where = str(checkpoint or arguments.checkpoint)
    command = [
        *prefix,
        sys.executable,
        "-m",
        "launcher",
        "predict",
        "--format",
        "mindformers",
        "--checkpoint",
        where,
        "--workers",
        str(arguments.workers),
    ]
    command += ["--threads-per-rank", "1", "--max-new-tokens", str(arguments.tokens), "--ignore-eos", "--max-batch-size", "2"]
    command += ["--max-restarts", str(max_restarts), "--timeout", str(arguments.timeout), "--log-dir", str(log_dir or folder / "log")]
    command += ["--output", str(output or folder / "out.jsonl"), "--stats", str(folder / "stats.json"), *map(str, options)]
    for prompt in PROMPTS:
        command += ["--prompt", prompt]
    environ = {**os.environ, MARK: mark, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), **(variables or {})}
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environ, preexec_fn=before)
    return Run(folder, process, mark)


def wait_for_ranks(run: Run, count: int) -> bool:
    """Whether all ranks came to live before the run ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and run.process.poll() is None:
        if len(run.find_ranks()) == count:
            return True
        time.sleep(0.02)
    return False


def check(run: Run, code: int | None, reference: str) -> list[str]:
    """What is wrong with the end of a run."""
    hits, faults = ", ".join(f"rank {rank} {name}" for rank, name in run.hits) or "no hit", []
    if code is None:
        faults.append("it hangs")
    elif code == 0:
        if run.read("out.jsonl") != reference:
            faults.append("exit code 0 without the reference's tokens")
        if run.read("stdout").count("text_generation_text") != len(PROMPTS):
            faults.append("exit code 0, but not one line a prompt")
    elif code == 1:
        verdict = json.loads(run.read("log/verdict.json") or "{}")
        if verdict.get("first_failed_rank") not in [rank for rank, _ in run.hits]:
            faults.append(f"the verdict blames rank {verdict.get('first_failed_rank')}")
        for line in run.read("out.jsonl").splitlines():
            if line + "\n" not in reference:
                faults.append("a record that the reference does not have")
    else:
        faults.append(f"exit code {code}: {run.read('stderr')[-300:]}")
    if left := run.clean():
        faults.append(f"processes left: {left}")
    return [f"{run.folder}: {fault} ({hits})" for fault in faults]
