"""The shortest command lines: a folder that brings its YAML, a prompt on standard input, and what standard output shows."""

import json
import shutil
import sys
from typing import TYPE_CHECKING

from tests.end_to_end.conftest import SECONDS

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem


def test_a_folder_with_its_yaml_and_a_prompt_on_standard_input(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder = tandem.new_folder()
    shutil.copytree(checkpoints.float, folder / "model")
    shutil.copy(checkpoints.config, folder / "model" / "predict_tiny.yaml")
    (folder / "model" / "recipe.yaml").write_text("default_stage: {}\n")  # of another program
    (folder / "prompt").write_text("I love\ntea\n")
    command = [sys.executable, "-m", "launcher", "predict", folder / "model", "--threads-per-rank", "1"]
    command += ["--max-new-tokens", "3", "--stats", folder / "stats.json", "--log-dir", folder / "logs", "--format", "json"]
    running = tandem.start(command, stdin=folder / "prompt")
    written, told = running.process.communicate(timeout=SECONDS)
    assert running.process.returncode == 0, told
    (record,) = map(json.loads, written.splitlines())
    assert (record["prompt"], len(record["token_ids"])) == ("I love\ntea", 3), "all of standard input is one prompt"
    assert json.loads((folder / "stats.json").read_text())["world_size"] == 3, "as the YAML of the folder asks"
    assert f"config: {folder / 'model' / 'predict_tiny.yaml'}" in told


def test_text_is_the_default_and_shows_prompt_and_continuation(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    options = ("--checkpoint", checkpoints.float, "--workers", "1", "--max-new-tokens", "6", "--threads-per-rank", "1")
    prompts = ("--prompt", "I love tea", "--prompt", "A llama")
    outcome = tandem.predict(*options, *prompts, "--format", "text")
    first, second = (record["prompt"] + record["text"] for record in outcome.records)
    assert outcome.stdout == f"=== prompt 1 of 2 ===\n{first}\n\n=== prompt 2 of 2 ===\n{second}\n"


def test_the_launch_script_keeps_the_three_prompts_and_lines(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    from tests.end_to_end.conftest import PROJECT_ROOT, PROMPTS

    folder = tandem.new_folder()
    command = ["bash", PROJECT_ROOT / "scripts" / "run_predict.sh", "single", checkpoints.config, checkpoints.float]
    result = tandem.run_command([*command, "--max-new-tokens", "2", "--threads-per-rank", "1", "--log-dir", folder / "logs"])
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    for line, prompt in zip(lines, PROMPTS, strict=True):
        assert line.startswith(f"'text_generation_text': [{prompt!r}"[:-1])
