"""Ranks that are killed and runs that are stopped: the exit code, the verdict, the restart, and that no process is left."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launcher.supervision.signals import GRACE_SECONDS

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Running, Tandem

PROJECT_ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 3
LIMIT_BYTES = 1_500_000_000
VERDICT_FIELDS = {
    "first_failed_rank",
    "host",
    "pid",
    "exit_code",
    "signal",
    "exception",
    "traceback_tail",
    "others_waiting_in",
    "log_file",
    "restarts_used",
}


@dataclass
class Decoding:
    """A run on two ranks that has printed its first result and has two to go."""

    running: "Running"
    folder: Path
    first_line: str
    ranks: dict[int, int]
    """Process id of each rank."""

    def finish(self, seconds: float = 60) -> tuple[int, str, str]:
        """Wait for its end, which leaves nothing; exit code, standard output, standard error."""
        stdout, stderr = self.running.process.communicate(timeout=seconds)
        assert self.running.find_processes() == []
        assert list((self.folder / "tmp").iterdir()) == [], "the folder of the run is gone"
        return self.running.process.returncode, self.first_line + stdout, stderr


def _arguments(checkpoints: "Checkpoints") -> list[str | Path]:
    # One prompt after the other: the line of the first tells that the second is being decoded.
    options = ("--max-batch-size", "1", "--max-new-tokens", "300", "--ignore-eos", "--dtype", "float32")
    return ["--checkpoint", checkpoints.float, "--workers", "2", "--threads-per-rank", "1", *options]


def _start_decoding(tandem: "Tandem", checkpoints: "Checkpoints", *options: str) -> Decoding:
    folder = tandem.new_folder()
    (folder / "tmp").mkdir()
    running = tandem.start(tandem.predict_command(folder, *_arguments(checkpoints), *options), TMPDIR=str(folder / "tmp"))
    assert running.process.stdout is not None
    first_line = running.process.stdout.readline()
    assert first_line.startswith("'text_generation_text': "), running.process.communicate(timeout=60)
    ranks = running.find_ranks()
    assert sorted(ranks) == [0, 1], "the run was over before it could be disturbed: give it more tokens"
    return Decoding(running, folder, first_line, ranks)


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGSEGV)])
def test_a_killed_rank_ends_the_run_with_a_verdict_that_names_it(
    tandem: "Tandem", checkpoints: "Checkpoints", victim: int, number: signal.Signals
) -> None:
    decoding = _start_decoding(tandem, checkpoints, "--max-restarts", "0")
    os.kill(decoding.ranks[victim], number)
    killed = time.monotonic()
    code, _, stderr = decoding.finish()
    assert time.monotonic() - killed < 30
    assert code == 1

    logs = decoding.folder / "logs"
    verdict = json.loads((logs / "verdict.json").read_text())
    assert verdict.keys() == VERDICT_FIELDS
    assert (verdict["first_failed_rank"], verdict["signal"], verdict["exit_code"]) == (victim, number.name, None)
    assert (verdict["pid"], verdict["host"]) == (decoding.ranks[victim], socket.gethostname())
    assert (verdict["log_file"], verdict["restarts_used"]) == (str(logs / f"worker_{victim}.log"), 0)
    assert verdict["exception"] is None
    assert (verdict["traceback_tail"] is None) == (number == signal.SIGKILL), "a crash leaves its stack"
    assert list(verdict["others_waiting_in"]) == [str(1 - victim)]
    assert verdict["others_waiting_in"][str(1 - victim)] == "gather_columns"

    told = stderr[stderr.index("tandem: ") :].splitlines()
    assert len(told) == 3, stderr
    assert f"rank {victim} failed first" in told[0]
    assert number.name in told[0]
    assert str(logs / f"worker_{victim}.log") in told[2]
    assert "Traceback" not in stderr
    _check_records(decoding, tandem, checkpoints)
    assert not (decoding.folder / "stats.json").exists()
    assert oct(logs.stat().st_mode & 0o777) == "0o700"


def _check_records(decoding: Decoding, tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    """What was finished is there, whole, and what the undisturbed run has."""
    written = (decoding.folder / "results.jsonl").read_text()
    assert 1 <= len(written.splitlines()) < NUM_PROMPTS
    assert tandem.predict(*_arguments(checkpoints)).jsonl.startswith(written) and written.endswith("\n")


FAULTS = {
    "stuck in a loop": ("model.engine.generation", "Engine.step", "while True: pass", "--timeout"),
    "os._exit": ("model.engine.generation", "Engine.step", "os._exit(7)", ""),
    "exception": ("model.engine.generation", "Engine.step", "raise ValueError('boom')", "ValueError: boom"),
    "no memory": (
        "model.engine.generation",
        "Engine.step",
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 34,) * 2); bytearray(1 << 36)",
        "MemoryError",
    ),
    "exception while loading": (
        "model.decoder.loading",
        "load_model",
        "raise OSError(5, 'Input/output error')",
        "OSError: [Errno 5] Input/output error",
    ),
}
"""What goes wrong in rank 1: the module and the function in which it does, how, and what the verdict's exception has to hold."""

FAULTY = """
import os, resource, signal, sys

if "launcher.supervision" in " ".join(sys.orig_argv):
    import {module} as module

    *owners, name = "{function}".split(".")
    owner = getattr(module, owners[0]) if owners else module
    plain, calls = getattr(owner, name), []

    def go_wrong(*arguments, **options):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) > (3 if owners else 0):
            {fault}
        return plain(*arguments, **options)

    setattr(owner, name, go_wrong)
"""


def _plant(folder: Path, text: str) -> dict[str, str]:
    """The variables of a run whose processes execute `text` when they start, and that leaves its own files in folder/tmp."""
    (folder / "sitecustomize.py").write_text(text)
    (folder / "tmp").mkdir()
    return {"PYTHONPATH": f"{folder}{os.pathsep}{PROJECT_ROOT}", "TMPDIR": str(folder / "tmp")}


@pytest.mark.parametrize("name", FAULTS)
def test_the_verdict_says_what_went_wrong_inside_a_rank(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path, name: str) -> None:
    module, function, fault, words = FAULTS[name]
    paths = _plant(tmp_path, FAULTY.format(module=module, function=function, fault=fault))
    folder = tandem.new_folder()
    running = tandem.start(
        tandem.predict_command(folder, *_arguments(checkpoints), "--max-restarts", "0", "--timeout", "4"), cwd=None, **paths
    )
    _, stderr = running.process.communicate(timeout=60)
    assert running.process.returncode == 1, stderr
    assert running.find_processes() == [] and list((tmp_path / "tmp").iterdir()) == []
    assert oct((folder / "logs").stat().st_mode & 0o777) == "0o700"
    assert len(stderr[stderr.index("tandem: ") :].splitlines()) == 3, stderr
    verdict = json.loads((folder / "logs" / "verdict.json").read_text())
    assert (verdict["first_failed_rank"], verdict["signal"]) == (1, None)
    assert verdict["exit_code"] == {"stuck in a loop": None, "os._exit": 7}.get(name, 1)
    assert verdict["others_waiting_in"].keys() == {"0"}
    assert verdict["others_waiting_in"]["0"] in (("loading", "barrier") if module == "model.decoder.loading" else ("gather_columns",))
    if words:
        assert words in verdict["exception"] and words in stderr
        assert "go_wrong" in verdict["traceback_tail"]
    else:
        assert verdict["exception"] is None


@dataclass(frozen=True)
class MemoryLimit:
    """A control group of its own, with a limit."""

    folder: Path
    limit_file: str


@pytest.fixture
def memory_limit() -> Iterator[MemoryLimit]:
    """A control group in which three processes have room and a fourth part of a gigabyte more has not."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    if "memory" in groups:
        limit = MemoryLimit(Path("/sys/fs/cgroup/memory", groups["memory"].lstrip("/"), f"tandem-{os.getpid()}"), "memory.limit_in_bytes")
    else:
        limit = MemoryLimit(Path("/sys/fs/cgroup", f"tandem-{os.getpid()}"), "memory.max")
    try:
        limit.folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            (limit.folder / limit.limit_file).write_text(str(LIMIT_BYTES))
        except OSError as error:
            pytest.skip(f"no control group's memory can be limited here: {error}")
        yield limit
    finally:
        limit.folder.rmdir()


def test_the_verdict_on_a_rank_that_the_kernel_ended_tells_the_limit_of_memory(
    tandem: "Tandem", checkpoints: "Checkpoints", memory_limit: MemoryLimit, tmp_path: Path
) -> None:
    fault = "import time; kept = [bytes([1]) * (1 << 24) for _ in range(1 << 8)]; time.sleep(60)"
    paths = _plant(tmp_path, FAULTY.format(module="model.engine.generation", function="Engine.step", fault=fault))
    folder = tandem.new_folder()
    command = tandem.predict_command(folder, *_arguments(checkpoints), "--max-restarts", "0")
    script = f'echo $$ > {memory_limit.folder}/cgroup.procs && exec "$@"'
    result = tandem.run_command(["sh", "-c", script, "sh", *command], cwd=None, **paths)
    assert result.returncode == 1, result.stderr
    assert list((tmp_path / "tmp").iterdir()) == []
    verdict = json.loads((folder / "logs" / "verdict.json").read_text())
    assert (verdict["first_failed_rank"], verdict["signal"], verdict["exit_code"]) == (1, "SIGKILL", None)
    for words in (verdict["exception"], result.stderr):
        assert f"out of memory: the kernel killed it (its limit is {LIMIT_BYTES / 1e9:.1f} GB)" in words


def test_a_stopped_rank_is_named_soon_after_the_timeout(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    decoding = _start_decoding(tandem, checkpoints, "--max-restarts", "0", "--timeout", "3")
    os.kill(decoding.ranks[0], signal.SIGSTOP)
    stopped = time.monotonic()
    code, _, stderr = decoding.finish()
    assert code == 1 and 2 < time.monotonic() - stopped < 8, stderr
    verdict = json.loads((decoding.folder / "logs" / "verdict.json").read_text())
    assert (verdict["first_failed_rank"], verdict["signal"]) == (0, "SIGSTOP") and "stopped" in verdict["exception"]
    assert verdict["others_waiting_in"] == {"1": "gather_columns"}


@pytest.mark.parametrize(("collectives", "seconds"), [("shm", 5), ("gloo", 18)])
def test_a_run_that_is_frozen_as_a_whole_for_longer_than_the_timeout_goes_on(
    tandem: "Tandem", checkpoints: "Checkpoints", collectives: str, seconds: float
) -> None:
    """As by a control group's freezer, docker pause, Slurm's suspend. The parent gives up after the timeout, ranks 15 s later."""
    decoding = _start_decoding(tandem, checkpoints, "--max-restarts", "0", "--timeout", "2", "--collectives", collectives)
    pids = [decoding.running.process.pid, *decoding.ranks.values()]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(seconds)
    code, stdout, stderr = decoding.finish()
    assert code == 0, stderr
    assert stdout == tandem.predict(*_arguments(checkpoints)).stdout


def test_too_few_descriptors_are_refused_before_anything_starts(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder = tandem.new_folder()
    command = tandem.predict_command(folder, *_arguments(checkpoints))
    result = tandem.run_command(["sh", "-c", 'ulimit -n 20 && exec "$@"', "sh", *command])
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr == "tandem: the limit of open files is 20, but 2 rank(s) need at least 40: raise it with ulimit -n\n"
    assert list(folder.iterdir()) == []


def test_a_parent_that_is_stopped_for_longer_than_the_timeout_blames_nobody(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    decoding = _start_decoding(tandem, checkpoints, "--max-restarts", "0", "--timeout", "2")
    decoding.running.process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    decoding.running.process.send_signal(signal.SIGCONT)
    code, stdout, stderr = decoding.finish()
    assert code == 0, stderr
    assert stdout == tandem.predict(*_arguments(checkpoints)).stdout


def test_a_slow_rank_is_no_failure_and_a_restart_gives_the_tokens_of_an_undisturbed_run(
    tandem: "Tandem", checkpoints: "Checkpoints"
) -> None:
    decoding = _start_decoding(tandem, checkpoints, "--max-restarts", "1", "--timeout", "4")
    for _ in range(2):  # slow: each halt is shorter than the timeout, all together are longer
        os.kill(decoding.ranks[0], signal.SIGSTOP)
        time.sleep(2.2)
        os.kill(decoding.ranks[0], signal.SIGCONT)
        time.sleep(0.1)
    assert decoding.running.find_ranks() == decoding.ranks, "no restart has been used, and the run is not over"
    os.kill(decoding.ranks[1], signal.SIGKILL)
    assert _wait_for_new_rank(decoding, 1)[0] == decoding.ranks[0], "rank 0 lives on"
    code, stdout, stderr = decoding.finish(90)
    assert code == 0, stderr
    assert "rank 1 failed (ended by SIGKILL); restart 1 of 1: rank 1 reloads, then all continue with the same tokens" in stderr

    undisturbed = tandem.predict(*_arguments(checkpoints))
    assert (decoding.folder / "results.jsonl").read_text() == undisturbed.jsonl
    assert stdout == undisturbed.stdout, "each result is printed once, also where it was decoded twice"
    stats = json.loads((decoding.folder / "stats.json").read_text())
    assert stats["restarts"] == 1 and len(stats["recovery_seconds"]) == 1
    assert undisturbed.stats["restarts"] == 0
    assert stats["read_bytes"] == [0, undisturbed.stats["read_bytes"][1]], "only the rank that died has read its weights again"
    assert (decoding.folder / "logs" / "worker_1.attempt_0.log").is_file()
    assert not (decoding.folder / "logs" / "verdict.json").exists()


FATAL = """
import os, signal, sys

if "launcher.supervision" in " ".join(sys.orig_argv):
    import launcher.worker.rank
    from parallel.watched_collectives import WatchedCollectives

    plain, gather = launcher.worker.rank.load_model, WatchedCollectives.gather_columns

    def place():
        return os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]

    def load_model(*arguments, **options):
        if place() == ("0", "1"):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **options)

    def gather_columns(*arguments, **options):  # for the first time in the first prefill
        if place() == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return gather(*arguments, **options)

    launcher.worker.rank.load_model, WatchedCollectives.gather_columns = load_model, gather_columns
"""
"""Rank 1 is killed while the first attempt loads, rank 0 in the first prefill of the second."""


def test_kills_while_loading_and_in_prefill_are_made_up_for(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    paths = _plant(tmp_path, FATAL)
    folder = tandem.new_folder()
    arguments = (*_arguments(checkpoints), "--max-restarts", "2")
    result = tandem.run_command(tandem.predict_command(folder, *arguments), cwd=None, **paths)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "tmp").iterdir()) == []
    # Rank 0 may have been loading, or have waited for rank 1 with its weights.
    said = (
        r"rank 1 failed \(ended by SIGKILL\); restart 1 of 2: (all ranks reload and|rank 1 reloads, then all) continue with the same tokens"
    )
    assert re.search(said, result.stderr), result.stderr
    assert "rank 0 failed (ended by SIGKILL); restart 2 of 2: rank 0 reloads, then all continue with the same tokens" in result.stderr
    undisturbed = tandem.predict(*_arguments(checkpoints))
    assert (folder / "results.jsonl").read_text() == undisturbed.jsonl
    assert result.stdout == undisturbed.stdout
    stats = json.loads((folder / "stats.json").read_text())
    assert stats["restarts"] == 2
    assert stats["recovery_seconds"] and all(0 < seconds < 60 for seconds in stats["recovery_seconds"])
    kept = {path.name for path in (folder / "logs").iterdir()} - {"worker_0.attempt_0.log"}
    assert kept == {"worker_1.attempt_0.log", "worker_1.log", "worker_0.attempt_1.log", "worker_0.log"}, "one log for each process"


def test_the_verdict_after_a_restart_names_the_rank_that_failed_last_time(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    """Rank 1 is killed, and rank 0 of the second attempt: what was noticed in the first attempt must not speak for the second."""
    decoding = _start_decoding(tandem, checkpoints, "--max-restarts", "1")
    os.kill(decoding.ranks[1], signal.SIGKILL)
    again = _wait_for_new_rank(decoding, 1)
    os.kill(again[0], signal.SIGKILL)
    code, _, stderr = decoding.finish()
    assert code == 1, stderr
    verdict = json.loads((decoding.folder / "logs" / "verdict.json").read_text())
    assert (verdict["first_failed_rank"], verdict["pid"], verdict["signal"]) == (0, again[0], "SIGKILL")
    assert verdict["restarts_used"] == 1
    assert "0" not in verdict["others_waiting_in"]


def _wait_for_new_rank(decoding: Decoding, rank: int) -> dict[int, int]:
    """The ranks of the next attempt, once the new one has mapped the memory of all, and so waits for the other one or decodes."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ranks = decoding.running.find_ranks()
        if len(ranks) == 2 and ranks[rank] != decoding.ranks[rank]:
            if "memfd:tandem " in Path(f"/proc/{ranks[rank]}/maps").read_text():
                return ranks
        assert decoding.running.process.poll() is None, decoding.running.process.communicate()
        time.sleep(0.02)
    raise AssertionError("the rank was not started again")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_and_every_rank(tandem: "Tandem", checkpoints: "Checkpoints", number: signal.Signals, expected: int) -> None:
    decoding = _start_decoding(tandem, checkpoints)
    decoding.running.process.send_signal(number)
    sent = time.monotonic()
    code, stdout, stderr = decoding.finish(30)
    assert code == expected and time.monotonic() - sent < 5, stderr
    assert len(stdout.splitlines()) < NUM_PROMPTS, "it was stopped, not left to finish"
    assert "Traceback" not in stderr and f"stopped by {number.name}" in stderr
    _check_records(decoding, tandem, checkpoints)
    assert not (decoding.folder / "logs" / "verdict.json").exists()


def test_a_second_signal_ends_a_run_at_once_that_cannot_finish_its_token(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    decoding = _start_decoding(tandem, checkpoints)
    os.kill(decoding.ranks[1], signal.SIGSTOP)  # so that the first signal alone would wait GRACE_SECONDS
    time.sleep(0.3)
    decoding.running.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert decoding.running.find_ranks() == decoding.ranks, "the first one waits for the token"
    decoding.running.process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    code, _, stderr = decoding.finish(30)
    assert time.monotonic() - sent < GRACE_SECONDS - 1, "at once"
    assert code == 130 and "stopped by SIGINT" in stderr and "Traceback" not in stderr
    _check_records(decoding, tandem, checkpoints)


def test_no_rank_outlives_a_parent_that_is_killed_and_the_next_run_removes_its_folder(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    decoding = _start_decoding(tandem, checkpoints)
    decoding.running.process.kill()
    assert decoding.running.wait_until_gone(10) == []
    stdout, _ = decoding.running.process.communicate()
    assert decoding.running.process.returncode == -signal.SIGKILL
    assert len(stdout.splitlines()) < NUM_PROMPTS - 1
    _check_records(decoding, tandem, checkpoints)
    (left,) = (decoding.folder / "tmp").iterdir()
    assert oct(left.stat().st_mode & 0o777) == "0o700"
    again = tandem.run("predict", *_arguments(checkpoints), "--max-new-tokens", "1", "--prompt", "x", TMPDIR=str(decoding.folder / "tmp"))
    assert again.returncode == 0, again.stderr
    assert list((decoding.folder / "tmp").iterdir()) == []
