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
    assert verdict["others_waiting_in"][str(1 - victim)] == "gather_columns"

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
