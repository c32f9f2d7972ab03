"""The README is held to the project: its commands parse and its paths exist; docs/architecture.md names every package."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from launcher.cli.main import app

PROJECT_ROOT = Path(__file__).resolve().parent.parent
TEXT = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if line.strip()
]


def parse_tandem(arguments: list[str]) -> None:
    """Parse without running; raises what tandem would refuse with."""
    name, *rest = arguments
    typer.main.get_group(app).commands[name].make_context(name, rest)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_parses(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "tandem":
        parse_tandem(words[1:])
    elif words[0] == "torchrun":
        parse_tandem(words[words.index("launcher") + 1 :])
    elif words[0].startswith("scripts/"):
        assert (PROJECT_ROOT / words[0]).is_file() and (PROJECT_ROOT / words[2]).is_file()
    else:
        assert words[0] in ("bash", "source", "curl")
        assert words[0] in ("source", "curl") or (PROJECT_ROOT / words[1]).is_file()


def test_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match="no-such-option"):
        parse_tandem(["predict", "--no-such-option"])


def test_the_table_of_packages_names_every_package_and_nothing_else() -> None:
    table = (PROJECT_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Packages")[1].split("\n## ")[0]
    named = re.findall(r"^\| `?((?:parallel|model|launcher)/[\w/]*?)/?`? \|", table, re.MULTILINE)
    packages = {"parallel"}
    for root in ("model", "launcher"):
        packages |= {path.parent.relative_to(PROJECT_ROOT).as_posix() for path in (PROJECT_ROOT / root).glob("*/*.py")}
    assert sorted(place.rstrip("/") for place in named) == sorted(packages)
