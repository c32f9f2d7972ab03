"""A command forked from the command host behaves as one in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.end_to_end.command_host import ENTRY, HostedProcess
from tests.end_to_end.servers import wait_until

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "PATH": "/nowhere"}
ENDLESS = ("--prompt", "a", "--ignore-eos", "--max-new-tokens", "2000", "--workers", "1", "--threads-per-rank", "1")


def _show(tandem: "Tandem", *arguments: str, fresh: bool, **variables: str) -> tuple[Any, int, str, str]:
    running = tandem.start([*ENTRY, *arguments], fresh=fresh, **variables)
    assert isinstance(running.process, subprocess.Popen if fresh else HostedProcess)
    stdout, stderr = running.process.communicate(timeout=60)
    code = running.process.returncode
    assert code is not None and running.process.wait() == running.process.poll() == code
    return running.process.args, code, stdout, stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "code"),
    [(("env", "--json"), RANK, 0), (("--help",), {}, 0), (("predict", "--workers", "0"), {}, 2), (("verify", "nowhere"), {}, 2)],
    ids=("variables", "help", "usage", "refusal"),
)
def test_a_fork_writes_what_an_own_process_writes(
    tandem: "Tandem", arguments: tuple[str, ...], variables: dict[str, str], code: int
) -> None:
    forked, own = (_show(tandem, *arguments, fresh=fresh, **variables) for fresh in (False, True))
    if arguments[0] == "env":
        for shown in (environments := [json.loads(found[2]) for found in (forked, own)]):
            del shown["memory"]  # changes from moment to moment
        assert environments[0] == environments[1] and environments[0]["rank"] == 1
        assert (forked[1], forked[3]) == (own[1], own[3]) == (code, "")
    else:
        assert forked == own and own[1] == code


def test_a_fork_has_the_variables_folder_and_descriptors_of_an_own_process(
    tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path
) -> None:
    facts = []
    for fresh in (False, True):
        command = [*ENTRY, "predict", "--checkpoint", checkpoints.float, *ENDLESS, "--log-dir", tmp_path / f"{fresh}", "--format", "json"]
        running = tandem.start(command, cwd=tmp_path, stderr=tmp_path / f"{fresh}.err", fresh=fresh, TANDEM_WORD="two words\nand a line")
        assert isinstance(running.process, subprocess.Popen if fresh else HostedProcess)
        wait_until(lambda running=running: len(running.find_ranks()) == 1, "its rank")
        process = Path(f"/proc/{running.process.pid}")
        variables = set((process / "environ").read_bytes().split(b"\0"))
        assert {b"TANDEM_WORD=two words\nand a line", f"TANDEM_TEST_RUN={running.mark}".encode()} <= variables
        streams = [os.readlink(process / "fd" / name).split(":")[0] for name in "012"]
        status = dict(line.split(":\t") for line in (process / "status").read_text().splitlines() if ":\t" in line)
        signals = [status[name] for name in ("SigBlk", "SigIgn")]  # which are caught changes as it starts
        assert int(status["SigCgt"], 16) >> signal.SIGTERM - 1 & 1
        facts.append(
            (os.readlink(process / "cwd"), os.getpgid(running.process.pid), os.getsid(running.process.pid), streams[0], streams[1])
        )
        facts[-1] += (Path(streams[2]).suffix, *signals)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 143
        assert running.wait_until_gone(10) == []
        running.end()
    assert facts[0] == facts[1]


def test_waiting_and_killing_are_those_of_popen(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    command = [*ENTRY, "predict", "--checkpoint", checkpoints.float, *ENDLESS, "--log-dir", tmp_path / "log"]
    running = tandem.start(command)
    process = running.process
    assert isinstance(process, HostedProcess) and process.poll() is None and process.returncode is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.01)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert running.wait_until_gone(10) == [], "the ranks end with it"
    assert process.communicate(timeout=30)[0] == ""
    process.send_signal(signal.SIGTERM)  # reaches nobody


def test_commands_with_other_variables_of_the_interpreter_have_a_process_of_their_own(tandem: "Tandem") -> None:
    started = time.monotonic()
    running = tandem.start([*ENTRY, "env"], PYTHONHASHSEED="1")
    assert isinstance(running.process, subprocess.Popen)
    running.end()
    assert isinstance(tandem.start([sys.executable, "-m", "launcher.cli.main"]).process, subprocess.Popen)
    assert time.monotonic() - started < 60
