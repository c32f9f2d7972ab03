"""Closed, full, abandoned and narrow standard streams: no traceback, no lost result, the exit code of other tools."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIG |= {"vocab_size": 32}
PROJECT_ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def run_shell(command: str, config: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in which $TANDEM and $PLAN stand for a program and a command of it."""
    tandem = f"{sys.executable} -m launcher"
    variables |= {"TANDEM": tandem, "PLAN": f"{tandem} plan --model-config {config}", "PYTHONPATH": str(PROJECT_ROOT)}
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    shell = ["bash", "-c", command]
    return subprocess.run(shell, capture_output=True, text=True, env=environ | variables, cwd=config.parent, timeout=120)


def run_python(body: str, *, redirection: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `body` as a guarded command, its streams redirected by the shell."""
    imports = "import os, sys\nfrom launcher.host.streams import guard_streams, require_stdout"
    code = f"{imports}\n@guard_streams\ndef main():\n    {body}\nmain()\n"
    environ = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), **variables}
    shell = ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, code]
    return subprocess.run(shell, capture_output=True, text=True, encoding="latin-1", env=environ, timeout=60)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_file_that_is_opened_later_never_gets_the_number_of_a_closed_stream(closed: str, tmp_path: Path) -> None:
    body = (
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('result'); print('message', file=sys.stderr); file.write(str(file.fileno()))"
    )
    found = run_python(body, redirection=closed)
    assert found.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2
    assert found.stdout == ("" if " >&-" in f" {closed}" else "result\n")
    assert found.stderr == ("" if "2>&-" in closed else "message\n")


@pytest.mark.parametrize(("encoding", "written"), [("ascii", r"\u8336 \xe9 \udcff"), ("latin-1", "\\u8336 é \\udcff"), ("utf-8", None)])
def test_what_an_encoding_lacks_is_escaped(encoding: str, written: str | None) -> None:
    found = run_python(r"print('\u8336 \xe9 \udcff'); print('\u8336', file=sys.stderr)", PYTHONIOENCODING=f"{encoding}:strict")
    assert found.returncode == 0, found.stderr
    assert found.stdout == (f"{written}\n" if written else "茶 é \\udcff\n".encode().decode("latin-1"))


def test_a_full_standard_output_is_a_failure_with_a_sentence() -> None:
    for body in ("print('x')", "print('x', flush=True)", "print('x' * 100000)", "print('x'); sys.exit(2)"):
        found = run_python(body, redirection="> /dev/full")
        assert found.returncode == 1
        assert found.stderr == "tandem: standard output: No space left on device; free some space, or choose another place\n"


def test_a_full_standard_error_takes_nothing_and_ends_nothing() -> None:
    found = run_python("print('x' * 100000, file=sys.stderr, flush=True); print('result')", redirection="2> /dev/full")
    assert (found.returncode, found.stdout) == (0, "result\n")


@pytest.mark.parametrize("flush", ["", ", flush=True"])
def test_a_reader_that_leaves_ends_the_command_quietly_with_the_code_of_sigpipe(flush: str) -> None:
    found = run_python(f"[print('x' * 1000{flush}) for _ in range(1000)]", redirection="| head -1; echo ${PIPESTATUS[0]}")
    assert found.stdout.splitlines() == ["x" * 1000, "141"] and found.stderr == ""


def test_a_pipe_that_does_not_block_gets_every_character(tmp_path: Path) -> None:
    body = "os.set_blocking(1, False); print('x' * 1000000)"
    found = run_python(body, redirection="| (sleep 0.3; wc -c); echo ${PIPESTATUS[0]}")
    assert found.stdout.split() == ["1000001", "0"], found.stderr


def test_a_closed_standard_output_is_refused_where_results_would_be_lost(config: Path) -> None:
    for command in ("$PLAN", "$TANDEM env", "$TANDEM predict --checkpoint none"):
        found = run_shell(f"{command} >&-", config)
        assert found.returncode == 2
        assert found.stderr.startswith("tandem: standard output is closed, so the results would be lost") and found.stderr.count("\n") == 1


def test_a_plan_under_every_stream(config: Path) -> None:
    whole = run_shell("$PLAN", config)
    assert whole.returncode == 0 and whole.stdout.startswith("1 ranks, quantization none")
    narrow = run_shell("$PLAN", config, PYTHONIOENCODING="ascii")
    assert narrow.returncode == 0 and narrow.stdout.isascii()
    silent = run_shell("$PLAN --svg plan.svg 2>&- <&-", config)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, whole.stdout, "")
    assert (config.parent / "plan.svg").read_text().endswith("</svg>\n")
    left = run_shell("$PLAN | head -1; echo ${PIPESTATUS[0]}", config)
    assert left.stdout.splitlines()[0] == whole.stdout.splitlines()[0] and left.stdout.endswith(("\n0\n", "\n141\n")) and not left.stderr
    full = run_shell("$PLAN > /dev/full", config)
    assert (full.returncode, full.stderr.count("\n")) == (1, 1)
