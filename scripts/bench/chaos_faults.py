"""Faults other than killed ranks, for `chaos.py faults`: what is done to a run, and how it may end.

Every run ends with the tokens of an undisturbed one, or with an exit code and words that name the cause. It leaves no process, no
segment in /dev/shm and, unless its parent was killed, no temporary folder.
"""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chaos_places import MissingError, full_disk, memory_limit, network
from chaos_run import PROMPTS, RUN_SECONDS, Run, find_processes, start, wait_for_ranks

NO_SPACE = "No space left on device"
GROWING = """
import os, sys, time

def grow():
    kept = []
    while True:
        if os.path.exists({flag!r}):
            kept.append(bytes([1]) * (1 << 24))
        else:
            time.sleep(0.05)

if "launcher.supervision" in " ".join(sys.orig_argv):
    import threading
    import launcher.worker.run

    plain = launcher.worker.run.run_task

    def run_task(me):
        if os.environ["RANK"] == "1":
            threading.Thread(target=grow, daemon=True).start()
        plain(me)

    launcher.worker.run.run_task = run_task
"""
"""Rank 1 takes memory without end once a file is there."""


@dataclass(frozen=True)
class Bench:
    """What every fault has at hand."""

    arguments: argparse.Namespace
    folder: Path
    temporary: Path
    """TMPDIR of the runs."""
    reference: str
    """Results of an undisturbed run."""
    length: float
    """Seconds that it took."""

    def start(self, max_restarts: int, *options: str | Path, **how: object) -> Run:
        """Start a run."""
        return start(self.arguments, self.folder, max_restarts, self.temporary, *options, **how)  # type: ignore[arg-type]

    def start_decoding(self, max_restarts: int, *options: str | Path, **how: object) -> Run:
        """Start a run and wait for some moment between the start of its ranks and shortly before its end."""
        run = self.start(max_restarts, *options, **how)
        if wait_for_ranks(run, self.arguments.workers):
            time.sleep(random.uniform(0.3, 0.6) * self.length)
        return run

    def copy_checkpoint(self) -> Path:
        """One that may be damaged."""
        copy = self.folder / "checkpoint"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.arguments.checkpoint, copy)
        return copy

    def judge(self, run: Run, *, cause: str | None = None, codes: tuple[int, ...] = (1,), tokens: bool = True) -> tuple[str, list[str]]:
        """Wait for the end of a run: how it ended in a word, and what is wrong with that.

        `cause`: a pattern that standard error holds where it ends with one of `codes`; None: it may not. `tokens`: whether it may end well.
        """
        code, faults, word = run.finish(), [], "hung"
        words = run.read("stderr")
        if code is None:
            faults.append("it hangs")
        elif code == 0:
            word = "tokens"
            if not tokens:
                faults.append("it ended well")
            elif run.read("out.jsonl") != self.reference or run.read("stdout").count("text_generation_text") != len(PROMPTS):
                faults.append("exit code 0 without the reference's tokens")
        else:
            word = f"exit {code}"
            if cause is None or code not in codes or not re.search(cause, words) or "Traceback" in words:
                faults.append(f"exit code {code}: {words[-400:]!r}")
        if left := run.clean():
            faults.append(f"processes left: {left}")
        return word, faults


def freeze(bench: Bench) -> tuple[str, list[str]]:
    """All processes stop for longer than the timeout, and go on."""
    run = bench.start_decoding(0)
    pids = find_processes(run.mark)
    _signal_all(pids, signal.SIGSTOP)
    time.sleep(bench.arguments.timeout + 3)
    _signal_all(pids, signal.SIGCONT)
    return bench.judge(run)


def stop_parent(bench: Bench) -> tuple[str, list[str]]:
    """The parent alone stops for longer than the timeout, and goes on."""
    run = bench.start_decoding(0)
    _signal_all([run.process.pid], signal.SIGSTOP)
    time.sleep(bench.arguments.timeout + 3)
    _signal_all([run.process.pid], signal.SIGCONT)
    return bench.judge(run)


def replace_checkpoint(bench: Bench) -> tuple[str, list[str]]:
    """Its files are replaced while a run decodes; then a rank dies."""

    def replace(file: Path) -> None:
        new = file.with_suffix(".new")
        new.write_bytes(file.read_bytes()[::-1])
        new.rename(file)

    return _damage(bench, replace, "not restarted: the checkpoint was replaced")


def truncate_checkpoint(bench: Bench) -> tuple[str, list[str]]:
    """Its files are cut while a run decodes; then a rank dies."""
    return _damage(bench, lambda file: os.truncate(file, file.stat().st_size // 2), "not restarted: the checkpoint was replaced")


def _damage(bench: Bench, damage: Callable[[Path], None], cause: str) -> tuple[str, list[str]]:
    copy = bench.copy_checkpoint()
    run = bench.start_decoding(1, checkpoint=copy)
    for file in copy.glob("*.safetensors"):
        damage(file)
    run.hit(signal.SIGKILL)
    word, faults = bench.judge(run, cause=cause, tokens=not run.hits)
    shutil.rmtree(copy)
    return word, faults


def fill_output(bench: Bench) -> tuple[str, list[str]]:
    """No space for the results."""
    with full_disk(bench.folder, 4096) as place:
        (place / "filler").write_bytes(bytes(4096))
        return bench.judge(bench.start(0, output=place / "out.jsonl"), cause=NO_SPACE, codes=(1, 2), tokens=False)


def fill_logs(bench: Bench) -> tuple[str, list[str]]:
    """No space for log files; a run whose ranks log nothing may end well."""
    with full_disk(bench.folder, 4096) as place:
        (place / "filler").write_bytes(bytes(4096))
        return bench.judge(bench.start(0, log_dir=place / "log"), cause=NO_SPACE, codes=(1, 2))


def exhaust_descriptors(bench: Bench) -> tuple[str, list[str]]:
    """Few open files are allowed."""
    limit = random.randrange(6, 60)
    run = bench.start(0, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
    word, faults = bench.judge(run, cause="Too many open files|limit of open files", codes=(1, 2))
    return word, [f"{limit} descriptors: {fault}" for fault in faults]


def kill_parent_early(bench: Bench) -> tuple[str, list[str]]:
    """The parent is killed while the ranks start; they end within a second."""
    run = bench.start(0)
    deadline = time.monotonic() + 60
    while len(find_processes(run.mark)) < 2 and time.monotonic() < deadline and run.process.poll() is None:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 2))
    run.process.kill()
    run.process.wait()
    killed = time.monotonic()
    while (left := find_processes(run.mark)) and time.monotonic() < killed + RUN_SECONDS:
        time.sleep(0.01)
    seconds = time.monotonic() - killed
    run.clean()
    for folder in bench.temporary.iterdir():  # the next run would remove it
        shutil.rmtree(folder)
    return f"gone after {seconds:.2f} s", [f"processes left: {left}"] if left else [f"after {seconds:.1f} s"] if seconds > 1 else []


def run_out_of_memory(bench: Bench) -> tuple[str, list[str]]:
    """A rank takes all memory of the run's control group."""
    flag, site = bench.folder / "grow", bench.folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(GROWING.format(flag=str(flag)))
    root = Path(__file__).resolve().parents[2]
    with memory_limit(3_000_000_000) as procs:
        prefix = ("sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh")
        run = bench.start_decoding(0, prefix=prefix, variables={"PYTHONPATH": f"{site}{os.pathsep}{root}"})
        flag.touch()
        word, faults = bench.judge(run, cause=r"rank 1 failed first.*SIGKILL: out of memory: the kernel killed it", tokens=False)
        flag.unlink()
        time.sleep(0.2)  # until the kernel has emptied the group
    return word, faults


def partition_briefly(bench: Bench) -> tuple[str, list[str]]:
    """The link between two nodes is down for less than the timeout."""
    return _partition(bench, 0.5 * bench.arguments.timeout, None)


def partition(bench: Bench) -> tuple[str, list[str]]:
    """The link between two nodes is down for longer than the timeout."""
    return _partition(bench, RUN_SECONDS, "node . was lost: no heartbeat")


def _partition(bench: Bench, seconds: float, cause: str | None) -> tuple[str, list[str]]:
    with network() as net:
        runs = []
        for number, prefix in enumerate(net.prefixes):
            where = ("--nnodes", "2", "--node-rank", str(number), "--master-addr", net.address, "--master-port", "8118")
            runs.append(bench.start(0, *where, prefix=prefix))
        deadline = time.monotonic() + 60
        while not runs[0].read("out.jsonl") and time.monotonic() < deadline and runs[0].process.poll() is None:
            time.sleep(0.05)
        net.set_link("down")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(run.process.poll() is None for run in runs):
            time.sleep(0.05)
        net.set_link("up")
        if cause is None:
            word, faults = bench.judge(runs[0])
            code = runs[1].finish()
            return word, faults + ([f"node 1: exit code {code}"] if code else []) + [f"node 1 left {left}" for left in runs[1].clean()]
        ended = [bench.judge(run, cause=cause, tokens=False) for run in runs]
    return " and ".join(word for word, _ in ended), [fault for _, faults in ended for fault in faults]


FAULTS: Mapping[str, Callable[[Bench], tuple[str, list[str]]]] = {
    "freeze": freeze,
    "stopped parent": stop_parent,
    "replaced checkpoint": replace_checkpoint,
    "truncated checkpoint": truncate_checkpoint,
    "full disk, output": fill_output,
    "full disk, logs": fill_logs,
    "descriptors": exhaust_descriptors,
    "parent killed early": kill_parent_early,
    "out of memory": run_out_of_memory,
    "short partition": partition_briefly,
    "long partition": partition,
}


def run_faults(bench: Bench, names: list[str], rounds: int, deadline: float) -> int:
    """Make each fault `rounds` times and print a table; the number of what was wrong."""
    wrong = 0
    for name in names:
        words: list[str] = []
        faults: list[str] = []
        for _ in range(rounds):
            if time.monotonic() > deadline:
                words.append("out of time")
                break
            segments = set(os.listdir("/dev/shm"))
            try:
                word, found = FAULTS[name](bench)
            except MissingError as error:
                words.append(f"skipped: {error}")
                break
            found += [f"left in /dev/shm: {segment}" for segment in set(os.listdir("/dev/shm")) - segments]
            found += [f"left in TMPDIR: {path.name}" for path in bench.temporary.iterdir()]
            words.append(word)
            faults += found
        counted = ", ".join(f"{words.count(word)} x {word}" for word in dict.fromkeys(words))
        print(f"| {name} | {counted} | {len(faults)} |", flush=True)
        for fault in faults:
            print(f"  {name}: {fault}", file=sys.stderr, flush=True)
        wrong += len(faults)
    return wrong


def _signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
