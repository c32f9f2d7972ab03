"""Kills ranks at random and looks at what comes of it: how soon there is a verdict, how soon it decodes again, and that nothing is lost.

    python scripts/bench/chaos.py verdict CHECKPOINT --kills 50 --workers 4
    python scripts/bench/chaos.py recovery CHECKPOINT --kills 10 --workers 2
    python scripts/bench/chaos.py soak CHECKPOINT --kills 200 --workers 3 --seconds 3600

verdict: no restarts; seconds from the signal to the exit of the whole run. recovery: seconds from the death to the next new token.
soak: kills at any moment of runs with 0 to 2 restarts; every run has to end with the reference's tokens, or with a verdict that
names a rank that was hit. Anything else, a process or a folder left behind included, is listed and makes the exit code 1.
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
import uuid
from dataclasses import dataclass, field
from pathlib import Path

PROMPTS = ("The capital of France is", "Water boils at", "Two riders on one bicycle", "Once upon a time")
RUN_SECONDS = 180.0
"""A run that takes longer hangs."""
MARK = "TANDEM_CHAOS_RUN"
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
        """Process id of every rank that lives and has told its rank to the system."""
        ranks = {}
        for pid in find_processes(self.mark):
            variables = read_environ(pid)
            if (
                b"launcher.supervision.rank_process" in read_file(pid, "cmdline")
                and "RANK" in variables
                and read_file(pid, "stat").split()[2:3] != [b"Z"]
            ):
                ranks[int(variables["RANK"])] = pid
        return ranks

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


def read_environ(pid: int) -> dict[str, str]:
    """The environment of a process."""
    return dict(entry.split("=", 1) for entry in read_file(pid, "environ").decode(errors="replace").split("\0") if "=" in entry)


def find_processes(mark: str) -> list[int]:
    """All processes that descend from a run: they inherit its mark."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if f"{MARK}={mark}\0".encode() in read_file(pid, "environ")]


def start(arguments: argparse.Namespace, parent: Path, max_restarts: int, temporary: Path) -> Run:
    """Start a run in a folder of its own."""
    folder, mark = Path(tempfile.mkdtemp(dir=parent)), uuid.uuid4().hex
    command = [sys.executable, "-m", "launcher", "predict", "--checkpoint", arguments.checkpoint, "--workers", str(arguments.workers)]
    command += ["--threads-per-rank", "1", "--max-new-tokens", str(arguments.tokens), "--ignore-eos", "--max-batch-size", "2"]
    command += ["--max-restarts", str(max_restarts), "--timeout", str(arguments.timeout), "--log-dir", str(folder / "log")]
    command += ["--output", str(folder / "out.jsonl"), "--stats", str(folder / "stats.json")]
    for prompt in PROMPTS:
        command += ["--prompt", prompt]
    environ = {**os.environ, MARK: mark, "TMPDIR": str(temporary), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        return Run(folder, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environ), mark)


def wait_for_ranks(run: Run, count: int) -> bool:
    """Whether all ranks came to live before the run ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and run.process.poll() is None:
        if len(run.find_ranks()) == count:
            return True
        time.sleep(0.02)
    return False


def describe(seconds: list[float]) -> str:
    """Median and worst."""
    if not seconds:
        return "no figures"
    return f"{len(seconds)} kills: median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s"


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


def main() -> int:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("verdict", "recovery", "soak"))
    parser.add_argument("checkpoint")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=100, help="new tokens of each of 4 prompts")
    parser.add_argument("--timeout", type=float, default=20, help="--timeout of the runs, seconds")
    parser.add_argument("--seconds", type=float, default=3600, help="end after that time, whatever has been done")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    deadline = time.monotonic() + arguments.seconds
    kills, seconds, faults, ended = 0, [], [], {0: 0, 1: 0}
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        temporary = Path(name) / "tmp"
        temporary.mkdir()
        undisturbed = start(arguments, Path(name), 0, temporary)
        began = time.monotonic()
        if undisturbed.finish() != 0:
            print(undisturbed.read("stderr"), file=sys.stderr)
            return 2
        length, reference = time.monotonic() - began, undisturbed.read("out.jsonl")
        print(f"undisturbed: {length:.1f} s", file=sys.stderr)
        while kills < arguments.kills and time.monotonic() < deadline:
            restarts = {"verdict": 0, "recovery": 1, "soak": random.randrange(3)}[arguments.what]
            run = start(arguments, Path(name), restarts, temporary)
            if arguments.what == "soak":
                for _ in range(restarts + random.randrange(2)):
                    time.sleep(random.uniform(0, length))
                    kills += run.hit(random.choice(SIGNALS)) is not None
            else:
                # At any moment from the start of the ranks to shortly before their end.
                started = wait_for_ranks(run, arguments.workers)
                low, high = (0.0, 0.6) if arguments.what == "verdict" else (0.35, 0.7)
                time.sleep(random.uniform(low, high) * length if started else 0)
                at = run.hit(signal.SIGKILL)
            code = run.finish()
            finished_at = time.time()
            if arguments.what != "soak" and at is not None:
                kills += 1
                if arguments.what == "verdict" and code == 1:
                    seconds.append(finished_at - at)
                elif arguments.what == "recovery" and code == 0:
                    seconds += json.loads(run.read("stats.json"))["recovery_seconds"]
            faults += check(run, code, reference)
            ended[code or 0] = ended.get(code or 0, 0) + 1
            print(f"{kills} kills, {sum(ended.values())} runs, {len(faults)} faults", file=sys.stderr, flush=True)
        left = [path.name for path in temporary.iterdir()]
        if left:
            faults.append(f"folders left: {left}")
        for fault in faults:
            print(fault)
    print(f"{arguments.what}: {describe(seconds)}" if arguments.what != "soak" else f"soak: {kills} kills", end="; ")
    print(f"{ended[0]} runs ended with all tokens, {ended[1]} with a verdict, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
