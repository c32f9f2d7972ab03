"""Ranks that are killed and runs that are stopped: the exit code, the verdict, the restart, and that no process is left."""

import json
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Running, Tandem

PROJECT_ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 3
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
        """Wait for its end; exit code, standard output, standard error."""
        stdout, stderr = self.running.process.communicate(timeout=seconds)
        return self.running.process.returncode, self.first_line + stdout, stderr


def _arguments(checkpoints: "Checkpoints") -> list[str | Path]:
    # One prompt after the other: the line of the first tells that the second is being decoded.
    options = ("--max-batch-size", "1", "--max-new-tokens", "500", "--ignore-eos", "--dtype", "float32")
    return ["--checkpoint", checkpoints.float, "--workers", "2", "--threads-per-rank", "1", *options]


def _start_decoding(tandem: "Tandem", checkpoints: "Checkpoints", *options: str) -> Decoding:
    folder = tandem.new_folder()
    running = tandem.start(tandem.predict_command(folder, *_arguments(checkpoints), *options))
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
    assert decoding.running.find_processes() == []

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
    "stuck in a loop": ("model.generation", "Engine.step", "while True: pass", "--timeout"),
    "os._exit": ("model.generation", "Engine.step", "os._exit(7)", ""),
    "exception": ("model.generation", "Engine.step", "raise ValueError('boom')", "ValueError: boom"),
    "no memory": (
        "model.generation",
        "Engine.step",
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 34,) * 2); bytearray(1 << 36)",
        "MemoryError",
    ),
    "exception while loading": (
        "model.loading",
        "load_model",
        "raise OSError(5, 'Input/output error')",
        "OSError: [Errno 5] Input/output error",
    ),
}
"""What goes wrong in rank 1: the module and the function in which it does, how, and what the verdict's exception has to hold."""

FAULTY = """
import os, resource, sys

if os.environ.get("RANK") == "1" and "launcher.rank_process" in " ".join(sys.orig_argv):
    import {module} as module

    *owners, name = "{function}".split(".")
    owner = getattr(module, owners[0]) if owners else module
    plain, calls = getattr(owner, name), []

    def go_wrong(*arguments, **options):
        calls.append(1)
        if len(calls) > (3 if owners else 0):
            {fault}
        return plain(*arguments, **options)

    setattr(owner, name, go_wrong)
"""


@pytest.mark.parametrize("name", FAULTS)
def test_the_verdict_says_what_went_wrong_inside_a_rank(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path, name: str) -> None:
    module, function, fault, words = FAULTS[name]
    (tmp_path / "sitecustomize.py").write_text(FAULTY.format(module=module, function=function, fault=fault))
    (tmp_path / "tmp").mkdir()
    folder = tandem.new_folder()
    command = tandem.predict_command(folder, *_arguments(checkpoints), "--max-restarts", "0", "--timeout", "4")
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT_ROOT}", "TMPDIR": str(tmp_path / "tmp")}
    running = tandem.start(command, **paths)
    _, stderr = running.process.communicate(timeout=60)
    assert running.process.returncode == 1, stderr
    assert running.find_processes() == [] and list((tmp_path / "tmp").iterdir()) == []
    verdict = json.loads((folder / "logs" / "verdict.json").read_text())
    assert (verdict["first_failed_rank"], verdict["signal"]) == (1, None)
    assert verdict["exit_code"] == {"stuck in a loop": None, "os._exit": 7}.get(name, 1)
    assert verdict["others_waiting_in"].keys() == {"0"}
    assert verdict["others_waiting_in"]["0"] in (("loading", "barrier") if module == "model.loading" else ("gather_columns",))
    if words:
        assert words in verdict["exception"] and words in stderr
        assert "go_wrong" in verdict["traceback_tail"]
    else:
        assert verdict["exception"] is None


def test_a_stopped_rank_is_named_soon_after_the_timeout_and_a_slow_one_is_not(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    decoding = _start_decoding(tandem, checkpoints, "--max-restarts", "0", "--timeout", "4")
    for _ in range(3):  # slow: each halt is shorter than the timeout
        os.kill(decoding.ranks[0], signal.SIGSTOP)
        time.sleep(1)
        os.kill(decoding.ranks[0], signal.SIGCONT)
        time.sleep(0.2)
    assert decoding.running.process.poll() is None
    os.kill(decoding.ranks[0], signal.SIGSTOP)
    stopped = time.monotonic()
    code, _, stderr = decoding.finish()
    assert code == 1 and 3 < time.monotonic() - stopped < 9, stderr
    assert decoding.running.find_processes() == []
    verdict = json.loads((decoding.folder / "logs" / "verdict.json").read_text())
    assert (verdict["first_failed_rank"], verdict["signal"]) == (0, "SIGSTOP") and "stopped" in verdict["exception"]
    assert verdict["others_waiting_in"] == {"1": "gather_columns"}


def test_a_restart_after_a_killed_rank_gives_the_tokens_of_an_undisturbed_run(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    decoding = _start_decoding(tandem, checkpoints, "--max-restarts", "1")
    os.kill(decoding.ranks[1], signal.SIGKILL)
    code, stdout, stderr = decoding.finish(90)
    assert code == 0, stderr
    assert "rank 1 failed (ended by SIGKILL); restart 1 of 1: all ranks load again and go on with the same tokens" in stderr
    assert decoding.running.find_processes() == []

    undisturbed = tandem.predict(*_arguments(checkpoints))
    assert (decoding.folder / "results.jsonl").read_text() == undisturbed.jsonl
    assert stdout == undisturbed.stdout, "each result is printed once, also where it was decoded twice"
    assert json.loads((decoding.folder / "stats.json").read_text())["restarts"] == 1
    assert len(json.loads((decoding.folder / "stats.json").read_text())["recovery_seconds"]) == 1
    assert undisturbed.stats["restarts"] == 0
    assert (decoding.folder / "logs" / "worker_1.attempt_0.log").is_file()
    assert not (decoding.folder / "logs" / "verdict.json").exists()


def test_the_verdict_after_a_restart_names_the_rank_that_failed_last_time(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    """Rank 1 is killed, and rank 0 of the second attempt: what was noticed in the first attempt must not speak for the second."""
    decoding = _start_decoding(tandem, checkpoints, "--max-restarts", "1")
    os.kill(decoding.ranks[1], signal.SIGKILL)
    again = _wait_for_new_ranks(decoding)
    os.kill(again[0], signal.SIGKILL)
    code, _, stderr = decoding.finish()
    assert code == 1, stderr
    assert decoding.running.find_processes() == []
    verdict = json.loads((decoding.folder / "logs" / "verdict.json").read_text())
    assert (verdict["first_failed_rank"], verdict["pid"], verdict["signal"]) == (0, again[0], "SIGKILL")
    assert verdict["restarts_used"] == 1
    assert "0" not in verdict["others_waiting_in"]


def _wait_for_new_ranks(decoding: Decoding) -> dict[int, int]:
    """The ranks of the next attempt, once both have mapped their memory and so wait for each other or decode."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ranks = decoding.running.find_ranks()
        if len(ranks) == 2 and not set(ranks.values()) & set(decoding.ranks.values()):
            if all("memfd:tandem" in Path(f"/proc/{pid}/maps").read_text() for pid in ranks.values()):
                return ranks
        assert decoding.running.process.poll() is None, decoding.running.process.communicate()
        time.sleep(0.02)
    raise AssertionError("the ranks were not started again")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_and_every_rank(tandem: "Tandem", checkpoints: "Checkpoints", number: signal.Signals, expected: int) -> None:
    decoding = _start_decoding(tandem, checkpoints)
    decoding.running.process.send_signal(number)
    sent = time.monotonic()
    code, stdout, stderr = decoding.finish(30)
    assert code == expected and time.monotonic() - sent < 5, stderr
    assert decoding.running.find_processes() == []
    assert len(stdout.splitlines()) < NUM_PROMPTS, "it was stopped, not left to finish"
    assert "Traceback" not in stderr and f"stopped by {number.name}" in stderr
    _check_records(decoding, tandem, checkpoints)
    assert not (decoding.folder / "logs" / "verdict.json").exists()


def test_no_rank_outlives_a_parent_that_is_killed(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    decoding = _start_decoding(tandem, checkpoints)
    decoding.running.process.kill()
    assert decoding.running.wait_until_gone(10) == []
    code, stdout, _ = decoding.finish()
    assert code == -signal.SIGKILL
    assert len(stdout.splitlines()) < NUM_PROMPTS
