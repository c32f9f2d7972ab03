"""Ranks that are killed and runs that are stopped: the exit code, the verdict, the restart, and that no process is left."""

import json
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Running, Tandem

import os

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
    options = ("--max-batch-size", "1", "--max-new-tokens", "500", "--ignore-eos", "--dtype", "float32", "--workers", "2")
    return ["--checkpoint", checkpoints.float, *options]


def _start_decoding(tandem: "Tandem", checkpoints: "Checkpoints", *options: str) -> Decoding:
    folder = tandem.new_folder()
    running = tandem.start(tandem.predict_command(folder, *_arguments(checkpoints), *options))
    assert running.process.stdout is not None
    first_line = running.process.stdout.readline()
    assert first_line.startswith("'text_generation_text': "), running.process.communicate(timeout=60)
    ranks = running.find_ranks()
    assert sorted(ranks) == [0, 1], "the run was over before it could be disturbed: give it more tokens"
    return Decoding(running, folder, first_line, ranks)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_with_a_verdict_that_names_it(tandem: "Tandem", checkpoints: "Checkpoints", victim: int) -> None:
    decoding = _start_decoding(tandem, checkpoints, "--max-restarts", "0")
    os.kill(decoding.ranks[victim], signal.SIGKILL)
    killed = time.monotonic()
    code, _, stderr = decoding.finish()
    assert time.monotonic() - killed < 30
    assert code == 1
    assert decoding.running.find_processes() == []

    logs = decoding.folder / "logs"
    verdict = json.loads((logs / "verdict.json").read_text())
    assert verdict.keys() == VERDICT_FIELDS
    assert (verdict["first_failed_rank"], verdict["signal"], verdict["exit_code"]) == (victim, "SIGKILL", None)
    assert (verdict["pid"], verdict["host"]) == (decoding.ranks[victim], socket.gethostname())
    assert (verdict["log_file"], verdict["restarts_used"]) == (str(logs / f"worker_{victim}.log"), 0)
    assert (verdict["exception"], verdict["traceback_tail"]) == (None, None)
    assert list(verdict["others_waiting_in"]) == [str(1 - victim)]
    assert f"rank {victim}" in verdict["others_waiting_in"][str(1 - victim)]

    told = stderr[stderr.index("tandem: ") :].splitlines()
    assert len(told) == 3, stderr
    assert f"rank {victim} failed first" in told[0]
    assert "SIGKILL" in told[0]
    assert str(logs / f"worker_{victim}.log") in told[2]
    assert "Traceback" not in stderr
    assert not (decoding.folder / "results.jsonl").exists()
    assert not (decoding.folder / "stats.json").exists()


def test_a_restart_after_a_killed_rank_gives_the_tokens_of_an_undisturbed_run(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    decoding = _start_decoding(tandem, checkpoints, "--max-restarts", "1")
    os.kill(decoding.ranks[1], signal.SIGKILL)
    code, stdout, stderr = decoding.finish(90)
    assert code == 0, stderr
    assert "restart 1" in stderr
    assert decoding.running.find_processes() == []

    undisturbed = tandem.predict(*_arguments(checkpoints))
    assert (decoding.folder / "results.jsonl").read_text() == undisturbed.jsonl
    assert stdout == undisturbed.stdout, "each result is printed once, also where it was decoded twice"
    assert json.loads((decoding.folder / "stats.json").read_text())["restarts"] == 1
    assert undisturbed.stats["restarts"] == 0
    assert (decoding.folder / "logs" / "worker_1.attempt_0.log").is_file()
    assert not (decoding.folder / "logs" / "verdict.json").exists()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_and_every_rank(tandem: "Tandem", checkpoints: "Checkpoints", number: signal.Signals, expected: int) -> None:
    decoding = _start_decoding(tandem, checkpoints)
    decoding.running.process.send_signal(number)
    code, stdout, stderr = decoding.finish(30)
    assert code == expected, stderr
    assert decoding.running.find_processes() == []
    assert len(stdout.splitlines()) < NUM_PROMPTS, "it was stopped, not left to finish"
    assert "Traceback" not in stderr
    assert not (decoding.folder / "results.jsonl").exists()


def test_no_rank_outlives_a_parent_that_is_killed(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    decoding = _start_decoding(tandem, checkpoints)
    decoding.running.process.kill()
    assert decoding.running.wait_until_gone(10) == []
    code, stdout, _ = decoding.finish()
    assert code == -signal.SIGKILL
    assert len(stdout.splitlines()) < NUM_PROMPTS
