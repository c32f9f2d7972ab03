"""Which commands do without the heavy libraries: the modules that each imports, listed in a new interpreter."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.end_to_end.test_help import COMMANDS

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "tokenizers", "gguf", "huggingface_hub", "openai")
LIST_IMPORTS = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()) as written:
    try:
        sys.argv[0] = "tandem"
        from launcher.cli.main import main
        main()
    except SystemExit as error:
        code = error.code or 0
json.dump([code, written.getvalue(), sorted(name for name in sys.modules if "." not in name)], sys.__stdout__)
"""


def list_imports(tandem: "Tandem", *arguments: str | Path) -> tuple[int, str, set[str]]:
    """Run a command; its exit code, its output, and the heavy packages that it imported."""
    result = tandem.run_command([sys.executable, "-c", LIST_IMPORTS, *arguments])
    assert result.returncode == 0, result.stderr
    code, written, modules = json.loads(result.stdout)
    return code, written, set(HEAVY) & set(modules)


def test_help_imports_no_library_of_models(tandem: "Tandem") -> None:
    """One process shows the version and the help of every command; what one imports would be left for the next."""
    program = f"""
import contextlib, io, json, sys
from launcher.cli.main import app
for command in ["--version", *{list(COMMANDS)!r}]:
    with contextlib.redirect_stdout(io.StringIO()) as written:
        app([command] if command == "--version" else [command, "--help"], standalone_mode=False, prog_name="tandem")
    assert written.getvalue().startswith("tandem " if command == "--version" else "Usage: tandem"), command
print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))
"""
    result = tandem.run_command([sys.executable, "-c", program])
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


@pytest.mark.parametrize("words", [("--workers", "3"), ("--workers", "2", "--quantization", "rtn-a16w8", "--json")], ids=("table", "json"))
def test_a_plan_from_a_config_imports_no_library_of_models(tandem: "Tandem", checkpoints: "Checkpoints", words: tuple[str, ...]) -> None:
    code, written, heavy = list_imports(tandem, "plan", "--model-config", checkpoints.float / "config.json", *words)
    assert (code, heavy) == (0, set()) and written


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "--workers", "10", "--prompt", "a"),
        ("serve", "--workers", "10", "--port", "0"),
        ("bench", "--workers", "10"),
    ],
    ids=lambda command: command[0],
)
def test_a_refusal_of_the_number_of_ranks_imports_no_pytorch(
    tandem: "Tandem", checkpoints: "Checkpoints", command: tuple[str, ...]
) -> None:
    code, written, heavy = list_imports(tandem, command[0], checkpoints.float, *command[1:])
    assert (code, written, heavy & {"torch", "transformers"}) == (2, "", set())


def test_what_reads_tensors_is_seen_to_import_pytorch(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    code, _, heavy = list_imports(tandem, "verify", checkpoints.float)
    assert code == 0 and "torch" in heavy and "transformers" not in heavy
