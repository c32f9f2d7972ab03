"""Runs from a folder with modules of the same names as ours, or as those of the libraries."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

pytestmark = pytest.mark.slow

CONSOLE_SCRIPT = (str(Path(sys.executable).with_name("tandem")),)
MODULE = (sys.executable, "-m", "launcher")
TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "-m", "launcher")


@pytest.mark.parametrize(
    ("command", "extra", "names"),
    [
        (CONSOLE_SCRIPT, ("--workers", "2"), ("model.py", "parallel.py", "launcher.py", "torch.py", "json.py")),
        # `python -m launcher` runs a launcher.py of the current folder, as the user asked.
        (MODULE, ("--workers", "2"), ("model.py", "parallel/__init__.py", "torch.py", "json.py")),
        (TORCHRUN, (), ("model/__init__.py", "parallel.py", "yaml.py")),
    ],
    ids=("console script", "python -m", "torchrun -m"),
)
def test_modules_of_the_current_folder_are_not_taken_for_ours(
    tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path, command: tuple[str, ...], extra: tuple[str, ...], names: tuple[str, ...]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"raise SystemExit('{name} of the current folder was imported')\n")
    options = ("--checkpoint", checkpoints.float, "--greedy", "--max-new-tokens", "4", "--prompt", "A llama", "--threads-per-rank", "1")
    form = ("--format", "mindformers")  # of `Tandem.predict`
    result = tandem.run_command([*command, "predict", *options, *form, *extra, "--log-dir", tmp_path / "logs"], cwd=tmp_path, fresh=True)
    assert result.returncode == 0, result.stderr
    expected = tandem.predict(*options, "--workers", "1")
    assert result.stdout == expected.stdout
