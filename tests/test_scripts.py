"""The shell scripts: their syntax, and what run_predict.sh refuses and hands on. No model is run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((PROJECT_ROOT / "scripts").rglob("*.sh")), PROJECT_ROOT / ".ci" / "run"]

# Stands for the interpreter: knows that the project is installed, and shows what it was called with.
FAKE_PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then exit 0; fi
pwd
printf '%s\\n' "$@"
[ -z "$FAKE_SLEEP" ] || exec sleep "$FAKE_SLEEP"
exit 7
"""

DEFAULT_PROMPTS = ["--prompt", "I love Beijing, because", "--prompt", "LLaMA is a", "--prompt", "Huawei is a company that"]
"""MindFormers' run_llama2_generate.py's."""


@pytest.fixture
def run_predict(tmp_path: Path) -> Path:
    """run_predict.sh in a project of its own, whose path has a blank and whose interpreter is the fake one."""
    root = tmp_path / "a project"
    (root / "scripts").mkdir(parents=True)
    (root / ".venv" / "bin").mkdir(parents=True)
    python = root / ".venv" / "bin" / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return Path(shutil.copy(PROJECT_ROOT / "scripts" / "run_predict.sh", root / "scripts"))


def _run(script: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, timeout=60, cwd=cwd)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(script: Path) -> None:
    assert _run(Path("-n"), str(script)).returncode == 0


@pytest.mark.parametrize("mode", ["both", "Single", "", "--config", "2"])
def test_wrong_mode_names_what_was_given_and_the_two_words(run_predict: Path, mode: str) -> None:
    result = _run(run_predict, mode, "c.yaml", "ckpt", "2")
    assert result.returncode == 2
    assert result.stdout == ""
    assert f"not '{mode}'" in result.stderr
    assert "'single'" in result.stderr
    assert "'parallel'" in result.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["single"], ["parallel"], ["single", "c.yaml"], ["single", "", "ckpt"], ["parallel", "c.yaml", "", "2"]]
)
def test_missing_arguments_show_the_usage(run_predict: Path, arguments: list[str]) -> None:
    result = _run(run_predict, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: run_predict.sh PARALLEL CONFIG_PATH CKPT_PATH [DEVICE_NUM]")


@pytest.mark.parametrize("given", [[], ["0"], ["-1"], ["two"], ["2.0"], [" 2"], [""], ["2\n3"], ["--prompt", "2"]])
def test_parallel_without_a_positive_device_num_is_refused(run_predict: Path, given: list[str]) -> None:
    result = _run(run_predict, "parallel", "c.yaml", "ckpt", *given)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "DEVICE_NUM" in result.stderr
    assert f"not '{given[0] if given else ''}'" in result.stderr


@pytest.mark.parametrize("given", ["2", "0", "two", ""])
def test_single_with_another_device_num_than_one_is_refused(run_predict: Path, given: str) -> None:
    result = _run(run_predict, "single", "c.yaml", "ckpt", given)
    assert result.returncode == 2
    assert result.stdout == ""
    assert f"not '{given}'" in result.stderr


def test_help_is_no_error(run_predict: Path) -> None:
    result = _run(run_predict, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Usage:")


@pytest.mark.parametrize(
    ("mode", "more", "workers", "passed_on"),
    [
        ("single", [], "1", []),
        ("single", ["1"], "1", []),
        ("single", ["--prompt", "two words"], "1", ["--prompt", "two words"]),
        ("parallel", ["8"], "8", []),
        ("parallel", ["8", "--greedy"], "8", ["--greedy"]),
        ("parallel", ["2", "--prompt", "1", "--greedy"], "2", ["--prompt", "1", "--greedy"]),
    ],
)
def test_arguments_directory_and_exit_code_are_handed_on(
    run_predict: Path, tmp_path: Path, mode: str, more: list[str], workers: str, passed_on: list[str]
) -> None:
    result = _run(run_predict, mode, "my config.yaml", "my ckpt", *more, cwd=tmp_path)
    expected = ["-m", "launcher", "predict", "--config", "my config.yaml", "--checkpoint", "my ckpt", "--workers", workers]
    expected += ["--format", "mindformers", *([] if "--prompt" in passed_on else DEFAULT_PROMPTS), *passed_on]
    assert result.stdout.splitlines() == [str(tmp_path), *expected]
    assert result.returncode == 7


def test_a_signal_reaches_the_run_itself(run_predict: Path) -> None:
    with subprocess.Popen(
        ["bash", str(run_predict), "single", "c.yaml", "ckpt"], stdout=subprocess.PIPE, text=True, env={**os.environ, "FAKE_SLEEP": "60"}
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != DEFAULT_PROMPTS[-1]:  # The last argument is shown: the run has begun.
            assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=30) == -15


def test_install_refuses_an_old_python(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(PROJECT_ROOT / "scripts" / "install.sh", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("")
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.9.2; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    result = subprocess.run(
        ["bash", str(tmp_path / "scripts" / "install.sh")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHON": str(old)},
    )
    assert result.returncode == 2
    assert "Python 3.10 or newer is needed" in result.stderr
    assert "3.9.2" in result.stderr


def test_install_returns_at_once_when_everything_is_there(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(PROJECT_ROOT / "scripts" / "install.sh", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("")
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    calls = tmp_path / "calls"
    python = bin_folder / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>"{calls}"\n')
    python.chmod(0o755)

    def install(*extras: str) -> str:
        calls.unlink(missing_ok=True)
        subprocess.run(["bash", str(tmp_path / "scripts" / "install.sh"), *extras], check=True, capture_output=True, timeout=60)
        return calls.read_text().splitlines()[-1].split()[-1] if calls.exists() else ""

    assert install() == "."
    assert install() == ""
    assert install("test") == ".[test]"
    assert install("test") == ""
    assert install() == ""
    assert install("serve") == ".[serve,test]"
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    assert install() == ".[serve,test]"
    assert install("serve", "test") == ""
