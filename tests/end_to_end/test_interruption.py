"""SIGINT, SIGTERM and SIGHUP outside a decoding run: commands without ranks, ranks that have just been started, nohup."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.end_to_end.servers import Server, wait_until

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

SLOW = """
import sys, time

if {where!r} in " ".join(sys.orig_argv):
    import importlib

    class Stall:
        def find_spec(self, name, path=None, target=None):
            if name == {module!r}:
                print("reached", file=sys.stderr, flush=True)
                time.sleep(60)

    sys.meta_path.insert(0, Stall())
"""
"""Stops at the import of a module, having said so."""

HANG = """
import model.{module} as module

def hang(*arguments, **options):
    import sys, time
    print("reached", file=sys.stderr, flush=True)
    time.sleep(60)

module.{function} = hang
"""
"""Hangs in a function, having said so."""

IGNORING = """
import os, signal, sys

for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""As nohup, and a shell's &, start programs."""


def plant(folder: Path, text: str) -> dict[str, str]:
    """The variables of a command whose processes execute `text` when they start, with temporary files in folder/tmp."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(text)
    (folder / "tmp").mkdir()
    return {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{Path(__file__).resolve().parents[2]}", "TMPDIR": str(folder / "tmp")}


def interrupt(tandem: "Tandem", command: Sequence[str | Path], number: int, **variables: str) -> tuple[int, str, str]:
    """Start `tandem COMMAND`, send it the signal when it has said "reached"; exit code, standard output and the rest of standard error."""
    running = tandem.start([sys.executable, "-m", "launcher", *command], **variables)
    assert running.process.stderr is not None
    assert "reached\n" in iter(running.process.stderr.readline, ""), "it ended before the phase"
    running.process.send_signal(number)
    stdout, stderr = running.process.communicate(timeout=20)
    assert running.find_processes() == []
    return running.process.returncode, stdout, stderr


Make = Callable[["Checkpoints", Path], list[str | Path]]
PHASES: dict[str, tuple[str, Make]] = {
    "the commands' import": (SLOW.format(where="launcher", module="typer"), lambda made, out: ["env"]),
    "torch's import in convert": (
        SLOW.format(where="launcher", module="torch"),
        lambda made, out: ["convert", made.float, out / "converted"],
    ),
    "verify": (HANG.format(module="checkpoint.verification", function="_read_chunks"), lambda made, out: ["verify", made.float]),
    "convert": (
        HANG.format(module="checkpoint.folder_writing", function="write_sha256sums"),
        lambda made, out: ["convert", made.float, out / "converted"],
    ),
    "reshard": (
        HANG.format(module="export.rank_files", function="write_json"),
        lambda made, out: ["reshard", made.float, out / "ranks", "--workers", "2"],
    ),
    "plan": (
        HANG.format(module="planning", function="plan_ranks"),
        lambda made, out: ["plan", "--config", made.config, "--checkpoint", made.float, "--workers", "3"],
    ),
    "predict before its ranks": (
        HANG.format(module="checkpoint.completeness", function="check_checkpoint"),
        lambda made, out: ["predict", "--checkpoint", made.float, "--workers", "2", "--prompt", "a", "--log-dir", out / "log"],
    ),
    "quantize before its ranks": (
        HANG.format(module="checkpoint.completeness", function="check_checkpoint"),
        lambda made, out: ["quantize", "-a", "rtn-a16w8", "--checkpoint", made.float, "--output", out / "quantized"],
    ),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_without_ranks(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path, phase: str) -> None:
    text, make = PHASES[phase]
    variables = plant(tmp_path, text)
    (tmp_path / "out").mkdir()
    number = (signal.SIGINT, signal.SIGTERM)[list(PHASES).index(phase) % 2]
    before = sorted(checkpoints.float.parent.rglob("*"))
    code, stdout, stderr = interrupt(tandem, make(checkpoints, tmp_path / "out"), number, **variables)
    assert (code, stdout) == (128 + number, ""), stderr
    assert stderr.splitlines()[-1] == f"tandem: stopped by {number.name}" and "Traceback" not in stderr, stderr
    assert list((tmp_path / "out").iterdir()) == [] and list((tmp_path / "tmp").iterdir()) == []
    assert sorted(checkpoints.float.parent.rglob("*")) == before


def test_an_overwritten_folder_is_the_old_one_after_an_interruption(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    text = HANG.format(module="checkpoint.folder_writing", function="write_sha256sums")
    variables = plant(tmp_path, text)
    target = tmp_path / "out" / "converted"
    target.mkdir(parents=True)
    (target / "old").write_text("kept")
    code, _, stderr = interrupt(tandem, ["convert", checkpoints.float, target, "--overwrite"], signal.SIGINT, **variables)
    assert code == 130, stderr
    assert [path.name for path in target.iterdir()] == ["old"] and list(target.parent.iterdir()) == [target]


def test_fresh_ranks_end_with_a_parent_that_is_killed_while_they_import(
    tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path
) -> None:
    """Each rank stops at its import of PyTorch; it has raised its score for the OOM killer by then."""
    variables = plant(tmp_path, SLOW.format(where="launcher.supervision.rank_process", module="torch"))
    options = ("--workers", "2", "--prompt", "a", "--no-preload", "--log-dir", tmp_path / "log")
    running = tandem.start([sys.executable, "-m", "launcher", "predict", "--checkpoint", checkpoints.float, *options], **variables)
    logs = [tmp_path / "log" / f"worker_{rank}.log" for rank in (0, 1)]
    wait_until(lambda: all(log.exists() and "reached" in log.read_text() for log in logs), "both ranks at their import")
    scores = {pid: int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (running.process.pid, *running.find_ranks().values())}
    own = scores.pop(running.process.pid)
    assert list(scores.values()) == [min(1000, own + 500)] * 2
    running.process.kill()
    assert running.wait_until_gone(1) == []


def test_the_process_that_starts_ranks_ends_with_a_parent_that_is_killed_while_it_imports(
    tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path
) -> None:
    variables = plant(tmp_path, SLOW.format(where="launcher.supervision.starter_process", module="torch"))
    options = ("--workers", "2", "--prompt", "a", "--log-dir", tmp_path / "log")
    running = tandem.start([sys.executable, "-m", "launcher", "predict", "--checkpoint", checkpoints.float, *options], **variables)
    wait_until(running.find_starter, "the process that starts the ranks")
    running.process.kill()
    assert running.wait_until_gone(1) == []


def test_a_rank_whose_parent_has_gone_before_it_could_look_exits() -> None:
    program = "from launcher.supervision.rank_process import main; main()"
    result = subprocess.run([sys.executable, "-c", program, "nowhere", "1"], timeout=20, capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (1, b"", b"")


def test_a_server_under_nohup_outlives_its_terminal_and_interrupts_still_end_it(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    module = ("-c", IGNORING, sys.executable, "-m", "launcher")
    server = Server(tandem, "--checkpoint", checkpoints.float, "--workers", "2", "--threads-per-rank", "1", module=module)
    try:
        for stage in ("while it loads", "when it serves"):
            server.running.process.send_signal(signal.SIGHUP)
            time.sleep(0.2)
            server.wait_until_ready()
            assert server.complete("A llama", max_tokens=2)["usage"]["completion_tokens"] == 2, stage
        server.running.process.send_signal(signal.SIGINT)  # a shell's & has it ignored; kill -INT is meant all the same
        assert server.running.process.wait(30) == 130, server.stderr
        assert server.running.wait_until_gone(5) == []
    finally:
        server.end()


def test_a_run_ends_on_a_hangup_that_nobody_ignores(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    options = ("--workers", "2", "--prompt", "a", "--ignore-eos", "--max-new-tokens", "2000", "--log-dir", tmp_path / "log")
    # The tests themselves may run under nohup, whose ignored SIGHUP children inherit.
    reset = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", reset, "-m", "launcher", "predict", "--checkpoint", checkpoints.float, *options]
    running = tandem.start(command)
    wait_until(lambda: len(running.find_ranks()) == 2, "two ranks")
    running.process.send_signal(signal.SIGHUP)
    _, stderr = running.process.communicate(timeout=30)
    assert running.process.returncode == 129 and "stopped by SIGHUP" in stderr, stderr
    assert running.find_processes() == []
