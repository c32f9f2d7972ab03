"""The process that starts the ranks: a forked rank is like a fresh one, and whatever dies, nothing is left and the cause is named."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.end_to_end.servers import plant, wait_until

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Running, Tandem

RANKS = ("--workers", "2", "--dtype", "float32", "--max-new-tokens", "300", "--ignore-eos", "--max-batch-size", "1")

TELLING = """
import os, sys

if "launcher.supervision" in " ".join(sys.orig_argv):
    import json, launcher.worker.run

    plain = launcher.worker.run.run_task

    def run_task(me):
        import random, resource, signal, threading
        import torch

        own = lambda name: open("/proc/self/" + name).read()
        status = dict(line.split(":", 1) for line in own("status").splitlines())
        files = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
        facts = {
            "environment": {name: text for name, text in os.environ.items() if name != "TMPDIR"},
            "folder": os.getcwd(),
            "umask": status["Umask"].strip(),
            "signals": {name: status[name].strip() for name in ("SigBlk", "SigIgn", "SigCgt")},
            "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)],
            "cores": sorted(os.sched_getaffinity(0)),
            "limits": [resource.getrlimit(limit) for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE, resource.RLIMIT_STACK)],
            "nice": os.nice(0),
            "oom_score": own("oom_score_adj").strip(),
            "name": own("comm").strip(),
            "leads its session": os.getsid(0) == os.getpid(),
            "standard files": [files[0], files[1] == files[2] and files[2].endswith(f"worker_{me.seat.rank}.log")],
            "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()],
            "torch": [torch.is_grad_enabled(), str(torch.get_default_dtype()), torch.cuda.is_initialized()],
            "path": [one for one in sys.path if "zip" not in one],
            "flags": str(sys.flags),
            "chance": random.random(),
            "numpy's chance": __import__("numpy").random.random(),
            "torch's chance": torch.initial_seed(),
        }
        with open(os.path.join(os.environ["TELL_TO"], f"{me.seat.rank}.json"), "w") as file:
            json.dump(facts, file)
        plain(me)

    launcher.worker.run.run_task = run_task
"""
"""Every rank writes down what it finds itself in."""


def test_a_forked_rank_finds_what_a_fresh_one_finds(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    variables = {**plant(tmp_path, TELLING), "OMP_NUM_THREADS": "3", "KMP_BLOCKTIME": "1", "TORCH_SHOW_CPP_STACKTRACES": "1"}
    options = ("--workers", "2", "--bind-cores", "True", "--prompt", "a", "--max-new-tokens", "1")
    found: dict[str, list[dict[str, Any]]] = {}
    for mode in ("--preload", "--no-preload"):
        told = tmp_path / mode
        told.mkdir()
        command = ["sh", "-c", 'umask 027 && exec nice -n 3 "$@"', "sh", sys.executable, "-m", "launcher", "predict"]
        result = tandem.run_command(
            [*command, "--checkpoint", checkpoints.float, *options, mode, "--log-dir", told / "log"], TELL_TO=str(told), **variables
        )
        assert result.returncode == 0, result.stderr
        found[mode] = [json.loads((told / f"{rank}.json").read_text()) for rank in (0, 1)]
    chances = [rank.pop(name) for ranks in found.values() for rank in ranks for name in ("chance", "numpy's chance", "torch's chance")]
    assert len(set(chances)) == 12, "no two ranks have the same generator"
    for ranks in found.values():
        for rank in ranks:
            for name in ("TELL_TO", "TANDEM_TEST_RUN"):
                rank["environment"].pop(name)
    for forked, fresh in zip(found["--preload"], found["--no-preload"], strict=True):
        assert {name: (forked[name], fresh[name]) for name in forked if forked[name] != fresh[name]} == {}
    assert [rank["environment"]["RANK"] for rank in found["--preload"]] == ["0", "1"]
    assert found["--preload"][0]["umask"] == "0027" and found["--preload"][0]["environment"]["KMP_BLOCKTIME"] == "1"


def _start_decoding(tandem: "Tandem", checkpoints: "Checkpoints", *options: str) -> tuple["Running", Path, int]:
    """A run that decodes, its folder, and the process that starts its ranks."""
    folder = tandem.new_folder()
    (folder / "tmp").mkdir()
    command = tandem.predict_command(folder, "--checkpoint", checkpoints.float, "--threads-per-rank", "1", *RANKS, *options)
    running = tandem.start(command, TMPDIR=str(folder / "tmp"))
    assert running.process.stdout is not None
    assert running.process.stdout.readline().startswith("'text_generation_text': "), running.process.communicate(timeout=60)
    starter = running.find_starter()
    assert starter is not None and sorted(running.find_ranks()) == [0, 1]
    return running, folder, starter


def test_ranks_die_with_the_process_that_starts_them_and_the_verdict_says_so(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    running, folder, starter = _start_decoding(tandem, checkpoints, "--max-restarts", "0")
    os.kill(starter, signal.SIGKILL)
    _, stderr = running.process.communicate(timeout=60)
    assert running.process.returncode == 1, stderr
    assert running.find_processes() == [] and list((folder / "tmp").iterdir()) == []
    words = "ended by SIGKILL: the process that starts the ranks ended, and all ranks with it"
    assert f"tandem: the run failed (pid {starter} on " in stderr and words in stderr and "Traceback" not in stderr
    verdict = json.loads((folder / "logs" / "verdict.json").read_text())
    assert (verdict["first_failed_rank"], verdict["pid"], verdict["signal"]) == (None, starter, "SIGKILL")
    assert sorted(verdict["others_waiting_in"]) == ["0", "1"]


def test_a_run_survives_the_process_that_starts_its_ranks(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    running, folder, starter = _start_decoding(tandem, checkpoints, "--max-restarts", "1")
    os.kill(starter, signal.SIGSEGV)
    _, stderr = running.process.communicate(timeout=90)
    assert running.process.returncode == 0, stderr
    assert "the process that starts the ranks failed (ended by SIGSEGV); restart 1 of 1: all ranks reload and continue" in stderr
    assert running.find_processes() == [] and list((folder / "tmp").iterdir()) == []
    undisturbed = tandem.predict("--checkpoint", checkpoints.float, "--threads-per-rank", "1", *RANKS)
    assert (folder / "results.jsonl").read_text() == undisturbed.jsonl


@pytest.mark.parametrize("mode", ["--preload", "--no-preload"])
def test_nothing_outlives_a_killed_parent_by_a_second(tandem: "Tandem", checkpoints: "Checkpoints", mode: str) -> None:
    running, _, starter = _start_decoding(tandem, checkpoints, mode)
    os.kill(starter, signal.SIGSTOP)  # nor can a stopped one keep the ranks
    running.process.kill()
    killed = time.monotonic()
    wait_until(lambda: not running.find_processes(), "the end of all processes")
    assert time.monotonic() - killed < 1


def test_a_rank_that_cannot_reach_its_next_collective_is_killed_and_loads_again(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    running, folder, _ = _start_decoding(tandem, checkpoints, "--max-restarts", "1", "--timeout", "60")
    ranks = running.find_ranks()
    os.kill(ranks[0], signal.SIGSTOP)
    os.kill(ranks[1], signal.SIGKILL)
    _, stderr = running.process.communicate(timeout=90)
    assert running.process.returncode == 0, stderr
    assert "rank 1 failed (ended by SIGKILL); restart 1 of 1: all ranks reload and continue" in stderr
    assert running.find_processes() == []
    stats = json.loads((folder / "stats.json").read_text())
    assert all(stats["read_bytes"]), "both ranks have read their weights"
