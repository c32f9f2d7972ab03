"""Ranks that torchrun starts, and ranks with msrun's variables beside its scheduler: results, restarts, and what a killed rank leaves."""

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Running, Tandem

SECONDS = 90
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHER = ("-m", "launcher")
LOOPBACK = "127.0.0.1"


def _arguments(checkpoints: "Checkpoints") -> list[str | Path]:
    # One prompt after the other: the line of the first tells that the second is being decoded.
    options = ("--max-batch-size", "1", "--max-new-tokens", "400", "--ignore-eos", "--dtype", "float32")
    return ["--checkpoint", checkpoints.float, "--threads-per-rank", "1", "--timeout", "20", *options]


@pytest.fixture(scope="module")
def alone(tandem: "Tandem", checkpoints: "Checkpoints") -> "Outcome":
    """The run on one rank."""
    return tandem.predict(*_arguments(checkpoints))


def _read_line(running: "Running") -> str:
    """The first result, once it is there."""
    assert running.process.stdout is not None
    line = running.process.stdout.readline()
    assert line.startswith("'text_generation_text': "), running.process.communicate(timeout=SECONDS)
    return line


def _find_rank(running: "Running", rank: int) -> int:
    """Process id of a rank that torchrun started."""
    words = f"RANK={rank}".encode()
    (pid,) = [pid for pid in running.find_processes() if words in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    return pid


def _take_port() -> socket.socket:
    """A listener on a port of loopback."""
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    listener.listen()
    return listener


def _free_port() -> int:
    with _take_port() as listener:
        return int(listener.getsockname()[1])


def _read_verdict(folder: Path) -> dict[str, Any]:
    verdict: dict[str, Any] = json.loads((folder / "logs" / "verdict.json").read_text())
    return verdict


def _check_killed(verdict: dict[str, Any], victim: int, pid: int) -> None:
    """The verdict of the rank that was left on one that was killed: no parent of ours saw by which signal."""
    assert (verdict["first_failed_rank"], verdict["pid"], verdict["host"]) == (victim, pid, socket.gethostname())
    assert f"rank {victim} died" in verdict["exception"]
    assert list(verdict["others_waiting_in"]) == [str(1 - victim)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_under_torchrun_is_named_in_the_log_folder(
    tandem: "Tandem", checkpoints: "Checkpoints", alone: "Outcome", victim: int
) -> None:
    folder = tandem.new_folder()
    running = tandem.start(tandem.predict_command(folder, *_arguments(checkpoints), module=(*TORCHRUN, *LAUNCHER)))
    first_line = _read_line(running)
    pid = _find_rank(running, victim)
    os.kill(pid, signal.SIGKILL)
    stdout, stderr = running.process.communicate(timeout=SECONDS)
    assert running.process.returncode == 1, stderr
    assert running.wait_until_gone(10) == []
    _check_killed(_read_verdict(folder), victim, pid)
    assert f"rank {victim} failed first (pid {pid} on {socket.gethostname()})" in stderr
    assert oct((folder / "logs").stat().st_mode & 0o777) == "0o700"
    written = (folder / "results.jsonl").read_text()
    assert alone.jsonl.startswith(written) and written.endswith("\n") and written != alone.jsonl
    assert alone.stdout.startswith(first_line + stdout)


def test_torchrun_restarts_a_run_that_goes_on_where_it_was(tandem: "Tandem", checkpoints: "Checkpoints", alone: "Outcome") -> None:
    folder = tandem.new_folder()
    module = (*TORCHRUN, "--max-restarts", "1", *LAUNCHER)
    running = tandem.start(tandem.predict_command(folder, *_arguments(checkpoints), module=module))
    first_line = _read_line(running)
    first = (folder / "results.jsonl").read_text()
    os.kill(_find_rank(running, 1), signal.SIGKILL)
    stdout, stderr = running.process.communicate(timeout=SECONDS)
    assert running.process.returncode == 0, stderr
    assert running.wait_until_gone(10) == []
    assert alone.jsonl.startswith(first) and first
    assert (folder / "results.jsonl").read_text() == alone.jsonl
    assert first_line + stdout == alone.stdout, "nothing is printed twice"
    stats = json.loads((folder / "stats.json").read_text())
    assert (stats["world_size"], stats["restarts"]) == (2, 1)
    assert not (folder / "logs" / "verdict.json").exists(), "the second attempt went well"


# msrun's variables, set by hand


def _start_msrun(tandem: "Tandem", checkpoints: "Checkpoints") -> tuple[Path, "Running", list["Running"]]:
    """The folder, the scheduler and two workers."""
    folder = tandem.new_folder()
    port = str(_free_port())
    variables = {"MS_WORKER_NUM": "2", "MS_SCHED_HOST": LOOPBACK, "MS_SCHED_PORT": port, "MS_TOPO_TIMEOUT": "20"}
    command = tandem.predict_command(folder, *_arguments(checkpoints))
    scheduler = tandem.start(command, cwd=None, MS_ROLE="MS_SCHED", **variables)
    workers = [
        tandem.start(command, cwd=None, MS_ROLE="MS_WORKER", MS_NODE_ID=str(rank), DEVICE_ID=str(rank), **variables) for rank in (0, 1)
    ]
    return folder, scheduler, workers


def test_msruns_scheduler_ends_with_its_workers(tandem: "Tandem", checkpoints: "Checkpoints", alone: "Outcome") -> None:
    folder, scheduler, workers = _start_msrun(tandem, checkpoints)
    outputs = [worker.process.communicate(timeout=SECONDS) for worker in workers]
    ended = time.monotonic()
    served = scheduler.process.communicate(timeout=SECONDS)
    assert time.monotonic() - ended < 5
    assert [running.process.returncode for running in (scheduler, *workers)] == [0, 0, 0], (served, outputs)
    assert [stdout for stdout, _ in outputs] == [alone.stdout, ""]
    assert served[0] == "" and "scheduler: serving 2 ranks" in served[1]
    assert (folder / "results.jsonl").read_text() == alone.jsonl
    assert json.loads((folder / "stats.json").read_text())["world_size"] == 2
    assert not (folder / "logs" / "verdict.json").exists()


def test_msruns_scheduler_ends_when_a_worker_is_killed(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder, scheduler, workers = _start_msrun(tandem, checkpoints)
    _read_line(workers[0])
    workers[1].process.kill()
    killed = time.monotonic()
    _, stderr = workers[0].process.communicate(timeout=SECONDS)
    assert workers[0].process.returncode == 1 and time.monotonic() - killed < 10, stderr
    _, told = scheduler.process.communicate(timeout=SECONDS)
    assert scheduler.process.returncode == 1 and time.monotonic() - killed < 15, told
    _check_killed(_read_verdict(folder), 1, workers[1].process.pid)
    assert "rank 1 failed first" in stderr
    assert [running.wait_until_gone(5) for running in (scheduler, *workers)] == [[], [], []]


def test_a_rank_that_refuses_its_input_tells_the_others_why(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    """Long before MS_TOPO_TIMEOUT, though it finds the mistake before it has imported PyTorch."""
    folder = tandem.new_folder()
    good = _arguments(checkpoints)
    commands = [tandem.predict_command(folder, *words) for words in (good, ["--checkpoint", folder / "gone", *good[2:]])]
    variables = {"MS_WORKER_NUM": "2", "MS_SCHED_HOST": LOOPBACK, "MS_SCHED_PORT": str(_free_port()), "MS_TOPO_TIMEOUT": "600"}
    scheduler = tandem.start(commands[0], cwd=None, MS_ROLE="MS_SCHED", **variables)
    workers = [
        tandem.start(command, cwd=None, MS_ROLE="MS_WORKER", MS_NODE_ID=str(rank), DEVICE_ID=str(rank), **variables)
        for rank, command in enumerate(commands)
    ]
    told, own = (worker.process.communicate(timeout=SECONDS)[1] for worker in workers)
    served = scheduler.process.communicate(timeout=SECONDS)[1]
    assert [running.process.returncode for running in (*workers, scheduler)] == [2, 2, 1], (told, own, served)
    reason = own.splitlines()[-1].removeprefix("tandem: ")
    assert reason == f"the checkpoint {folder / 'gone'} does not exist"
    assert told.splitlines()[-1] == f"tandem: rank 1 refused its input: {reason}"
    assert f"scheduler: rank 1 refused its input: {reason}" in served


# A port that somebody else has


def test_a_port_in_use_is_named(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    """As rank 0 of torchrun's variables set by hand, and as msrun's scheduler."""
    with _take_port() as listener:
        port = str(listener.getsockname()[1])
        folder = tandem.new_folder()
        command = tandem.predict_command(folder, *_arguments(checkpoints))
        torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
        msrun = {"MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "2", "MS_SCHED_HOST": LOOPBACK, "MS_SCHED_PORT": port}
        rank, scheduler = tandem.start(command, cwd=None, **torchrun), tandem.start(command, cwd=None, **msrun)
        _, stderr = rank.process.communicate(timeout=SECONDS)
        _, told = scheduler.process.communicate(timeout=SECONDS)
    assert (rank.process.returncode, scheduler.process.returncode) == (1, 1), stderr + told
    verdict = _read_verdict(folder)
    assert verdict["first_failed_rank"] == 0 and verdict["pid"] == rank.process.pid
    for words in (verdict["exception"], " ".join(stderr.split()), " ".join(told.split())):
        assert f"{LOOPBACK}, port {port}: Address already in use" in words
    assert "Traceback" not in stderr + told
