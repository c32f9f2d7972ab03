"""Which commands do without the heavy libraries: the modules that each imports, listed in a new interpreter."""

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from gguf import GGMLQuantizationType as Kind

from launcher.host.accelerators import may_have_accelerator
from tests.end_to_end.servers import Server
from tests.end_to_end.test_help import COMMANDS
from tests.model.gguf_blocks import write_blocks

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


def test_a_refusal_of_a_checkpoint_imports_no_pytorch(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    """Headers are read by then: a conversion, a run and a plan of a checkpoint with one layer too few."""
    shutil.copytree(checkpoints.float, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    for words in (("convert", tmp_path / "x", tmp_path / "y"), ("predict", tmp_path / "x", "--prompt", "a"), ("plan", tmp_path / "x")):
        code, written, heavy = list_imports(tandem, *words)
        assert (code, written, "torch" in heavy) == (2, "", False), words


@pytest.mark.parametrize(("command", "form"), [("plan", "float"), ("plan", "int8_two_ranks"), ("verify", "float"), ("verify", "int8")])
def test_a_checkpoint_is_planned_and_verified_without_pytorch(
    tandem: "Tandem", checkpoints: "Checkpoints", command: str, form: str
) -> None:
    code, written, heavy = list_imports(tandem, command, getattr(checkpoints, form))
    assert (code, "torch" in heavy) == (0, False) and written


def test_the_header_of_a_gguf_file_is_read_without_pytorch(tandem: "Tandem", tmp_path: Path) -> None:
    path = write_blocks(tmp_path / "m.gguf", lambda name: Kind.Q6_K if "output" in name else Kind.Q4_K, vocabulary=True)
    code, written, heavy = list_imports(tandem, "plan", path)
    assert (code, "torch" in heavy) == (0, False) and "Q4_K" in written


def test_the_environment_is_shown_without_pytorch(tandem: "Tandem") -> None:
    if may_have_accelerator():
        pytest.skip("PyTorch is asked for the accelerators of this host")
    code, written, heavy = list_imports(tandem, "env", "--json")
    assert (code, heavy) == (0, set()) and json.loads(written)["backend"]["device"] == "cpu"


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "--workers", "2", "--prompt", "abc", "--max-new-tokens", "3"),
        ("bench", "--workers", "2", "--new-tokens", "2", "--prompt-tokens", "4", "--rounds", "1", "--json"),
    ],
    ids=lambda words: words[0],
)
def test_the_parent_of_ranks_imports_no_pytorch(tandem: "Tandem", checkpoints: "Checkpoints", words: tuple[str, ...]) -> None:
    code, written, heavy = list_imports(tandem, words[0], checkpoints.int8, *words[1:], "--log-dir", tandem.new_folder())
    assert (code, "torch" in heavy) == (0, False) and written


def test_the_parent_of_a_server_imports_no_pytorch(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    """A new interpreter, with an option that the command host does not take."""
    server = Server(tandem, checkpoints.int8, "--workers", "2", "--threads-per-rank", "1", module=("-X", "utf8", "-m", "launcher"))
    try:
        server.wait_until_ready()
        assert server.complete("abc", max_tokens=2)["usage"]["completion_tokens"] == 2
        assert "libtorch" not in Path(f"/proc/{server.running.process.pid}/maps").read_text()
        assert "libtorch" in Path(f"/proc/{server.running.find_ranks()[0]}/maps").read_text()
    finally:
        server.end()


def test_what_reads_tensors_is_seen_to_import_pytorch(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    code, _, heavy = list_imports(tandem, "convert", checkpoints.float, tandem.new_folder() / "x")
    assert code == 0 and "torch" in heavy and "transformers" not in heavy
