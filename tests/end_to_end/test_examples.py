"""The scripts in scripts/examples run as they stand."""

import subprocess
import sys
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
STARTS = ("<s>I love Beijing, because", "<s>LLaMA is a", "<s>Huawei is a company that")


def test_the_translated_mindformers_script_decodes_its_three_prompts(shared_dir: Path) -> None:
    script = PROJECT_ROOT / "scripts" / "examples" / "llama2_generate.py"
    command = [sys.executable, str(script), str(shared_dir / "data" / "stories260K-hf")]
    result = subprocess.run(command, cwd=PROJECT_ROOT, env={"PYTHONPATH": str(PROJECT_ROOT)}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, STARTS, strict=True)] == list(STARTS)
    assert all(len(line) > len(start) + 10 for line, start in zip(lines, STARTS, strict=True))
