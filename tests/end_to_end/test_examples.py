"""The scripts in scripts/examples run as they stand."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = PROJECT_ROOT / "scripts" / "examples"
STARTS = ("<s>I love Beijing, because", "<s>LLaMA is a", "<s>Huawei is a company that")


def _run(command: Sequence[str], folder: Path) -> list[str]:
    """Run a command in `folder`; returns the lines of its standard output."""
    result = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(PROJECT_ROOT)}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("launch", [[], ["-m", "launcher", "run", "--workers", "2"]])
def test_the_translated_mindformers_script_decodes_its_three_prompts(stories: Path, tmp_path: Path, launch: list[str]) -> None:
    lines = _run([sys.executable, *launch, str(EXAMPLES / "llama2_generate.py"), str(stories)], tmp_path)
    assert [line[: len(start)] for line, start in zip(lines, STARTS, strict=True)] == list(STARTS)
    assert all(len(line) > len(start) + 10 for line, start in zip(lines, STARTS, strict=True))


def test_ranks_of_its_own_answer_prompts_a_stream_and_a_conversation(stories: Path, tmp_path: Path) -> None:
    lines = _run([sys.executable, str(EXAMPLES / "llm_generate.py"), str(stories), "2"], tmp_path)
    answers = [line.partition("|") for line in lines[:3]]
    assert [f"<s>{prompt}" for prompt, _, _ in answers] == list(STARTS)
    assert lines[3] == answers[0][2] and len(lines) >= 5
