"""Checkpoints made after bug reports, decoded by three ranks: the tokens of transformers; and errors that only a rank finds."""

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Tandem

PLAIN = [432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338]
LINEAR = [432, 383, 286, 261, 376, 298, 315, 421, 414, 294, 411, 426]
CASES = {
    "02-tied-config-own-head": [281, 261, 419, 433, 419, 464, 413, 304, 422, 464, 260],
    "03-rope-linear": LINEAR,
    "03-rope-yarn": [*PLAIN, 401, 396, 267, 337, 410, 408, 419, 292, 411, 322],
    "04-shards-no-index": PLAIN[:11],
    "06-prefix-nomodel": PLAIN[:11],
    "07-attention-bias": [*PLAIN, 401, 396, 267, 337, 410, 408, 419, 292, 411, 322],
    "10-gptq-dynamic-bits": [255, 354, 299, 58, 318, 23, 480, 150, 72, 183],
    "15-ct-two-groups": [310, 149, 79, 163, 92, 180, 233, 284, 158, 318],
    "18-gguf-rope-scale-linear": LINEAR,
}
"""What transformers decodes after "Once upon a time", from each CASE.md."""


def find_case(shared: Path, name: str) -> Path:
    folder = shared / "cases" / name
    if not folder.is_dir():
        pytest.skip(f"no case {name} among the shared data")
    return folder / "model" if (folder / "model").is_dir() else folder / "model.gguf"


@pytest.mark.parametrize("name", CASES)
def test_three_ranks_decode_the_tokens_of_transformers(tandem: "Tandem", shared_dir: Path, name: str) -> None:
    arguments = ("--prompt", "Once upon a time", "--max-new-tokens", "24", "--dtype", "float32", "--workers", "3", "--ignore-eos")
    outcome = tandem.predict("--checkpoint", find_case(shared_dir, name), *arguments)
    expected = CASES[name]
    assert outcome.records[0]["token_ids"][: len(expected)] == expected
    assert ("not tied, as in transformers" in outcome.stderr) == (name == "02-tied-config-own-head")


def test_an_error_that_only_a_rank_finds_ends_the_run_once_with_exit_code_2(tandem: "Tandem", shared_dir: Path) -> None:
    case = find_case(shared_dir, "12d-gptq-v1-name-v2-zeros")
    # Stands for a linear that the sample before the start of the ranks does not hold.
    program = "import sys, launcher.commands.opened_model as m; m.check_facts = lambda *a: None; from launcher.cli.main import main; main()"
    folder = tandem.new_folder()
    command = tandem.predict_command(folder, "--checkpoint", case, "--workers", "2", "--prompt", "Once", module=("-c", program))
    result = tandem.run_command([sys.executable, *command[1:]])
    assert result.returncode == 2, result.stderr
    assert "set checkpoint_format to 'gptq_v2'" in result.stderr and "restart 1" not in result.stderr
    assert json.loads((folder / "logs" / "verdict.json").read_text())["restarts_used"] == 0


def test_verify_deep_tells_notes_dropped_tensors_and_contradictions(tandem: "Tandem", shared_dir: Path) -> None:
    folder = tandem.new_folder() / "m"
    shutil.copytree(find_case(shared_dir, "15e-ct-zero-points-but-symmetric"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config | {"logit_scale": 0.5, "acme": 1}))
    result = tandem.run("verify", folder, "--deep", "--json")
    found = json.loads(result.stdout)
    assert result.returncode == 2
    assert len(found["problems"]) == len(found["dropped"]) == 14 and all("set symmetric to false" in line for line in found["problems"])
    assert [note.split(": ", 1)[1] for note in found["notes"]] == [
        "logit_scale is 0.5: ignored, as in transformers",
        "unknown keys, not read: acme",
    ]
    lines = tandem.run("verify", folder, "--deep").stdout.splitlines()
    assert sum(line.startswith("note: ") for line in lines) == 3 and sum(line.startswith("problem: ") for line in lines) == 14
