"""README.md and docs/: every command parses, every link leads somewhere, every common mistake has its row."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer

import tandem
from launcher.cli.dialects import translate
from launcher.cli.main import app
from tests.end_to_end.test_common_mistakes import MISTAKES

PROJECT_ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(PROJECT_ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (PROJECT_ROOT / "README.md", PROJECT_ROOT / "CONTRIBUTING.md", *sorted((PROJECT_ROOT / "docs").glob("*.md")))
}
PLACEHOLDERS = {"…", "[options]"}
"""Words of a command that stand for others."""


def list_commands(text: str) -> list[str]:
    """Lines of fenced bash blocks, with continued lines joined and comments removed."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.split(" #")[0].strip()]


def list_inline_commands(text: str) -> list[str]:
    """Commands in backticks outside of fenced blocks; of `tandem`, only those with an option."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if not span.startswith("tandem: ")]
    return [
        span for span in spans if (span.startswith("tandem ") and " -" in span) or re.match(r"(bash |python )?scripts/\S+\.(sh|py)\b", span)
    ]


COMMANDS = [(page, line) for page, text in PAGES.items() for line in list_commands(text)]
INLINE_COMMANDS = sorted({(page, line) for page, text in PAGES.items() for line in list_inline_commands(text)})


def parse_tandem(arguments: list[str]) -> None:
    """Parse without running; raises the error that tandem would exit with."""
    name, *rest = translate(arguments)
    if name.startswith("-"):
        assert name in ("--version", "--help")
        return
    typer.main.get_group(app).commands[name].make_context(name, rest)


@cache
def list_script_options(path: Path) -> frozenset[str]:
    """Options that a Python script declares with argparse."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and str(node.value).startswith("-"))


def check_script(words: list[str]) -> None:
    """`words[0]` is a script of the project; a Python script declares each option, up to a `--`."""
    path = PROJECT_ROOT / words[0]
    assert path.is_file(), f"{words[0]} does not exist"
    if path.suffix == ".py":
        options = {word.split("=")[0] for word in words[1 : words.index("--") if "--" in words else None] if word.startswith("--")}
        missing = options - list_script_options(path)
        # A script may import its declarations from its neighbours.
        missing = {option for option in missing if not any(option in list_script_options(near) for near in path.parent.glob("*.py"))}
        assert not missing, f"{words[0]} does not declare {missing}"


def check_command(line: str) -> None:
    """Parse a command of the documentation; raises what is wrong with it."""
    words = ["1" if word == "N" else word for word in shlex.split(line) if word not in PLACEHOLDERS]
    match words[0]:
        case "tandem":
            parse_tandem(words[1:])
        case "torchrun" if "launcher" not in words:
            check_script([word for word in words if word.endswith(".py")])
        case "torchrun":
            parse_tandem(words[words.index("launcher") + 1 :])
        case "bash" | "python":
            check_script(words[1:])
        case "sbatch":
            check_script([word for word in words[1:] if not word.startswith("--") or word == "--"][:1])
            at = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
            parse_tandem(["predict", "--config", words[at + 1], "--checkpoint", words[at + 2], *words[at + 3 :]])
        case "docker" if words[1] == "run":
            parse_tandem(words[words.index("tandem") + 1 :])
        case "docker" | "source" | "curl" | "pip" | "python3" | "mkdir" | "cp":
            pass
        case script:
            check_script([script, *words[1:]])


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in COMMANDS])
def test_a_command_of_a_page_parses(page: str, line: str) -> None:
    check_command(line)


@pytest.mark.parametrize(("page", "line"), INLINE_COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in INLINE_COMMANDS])
def test_a_command_in_a_sentence_parses(page: str, line: str) -> None:
    if "COMMAND" not in line and line != "tandem --help":
        check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "tandem predict --no-such-option",
        "tandem no-such-command",
        "bash scripts/none.sh",
        "python scripts/bench/compare.py --no-such-option",
        "sbatch --ntasks=2 scripts/cluster/slurm.sbatch C P --no-such-option",
        "docker run --rm tandem predict --no-such-option",
    ],
)
def test_a_wrong_command_would_be_noticed(line: str) -> None:
    with pytest.raises((Exception, AssertionError), match=r"no.such|none\.sh"):
        check_command(line)


def test_the_commands_of_the_pages_are_found() -> None:
    assert len(COMMANDS) > 50 and len(INLINE_COMMANDS) > 20


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_resolve(page: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    for target in targets:
        if not target.startswith(("http://", "https://", "#")):
            assert ((PROJECT_ROOT / page).parent / target.split("#")[0]).exists(), f"{page}: {target}"


def test_the_readme_links_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES["README.md"]))
    assert linked == {page for page in PAGES if page.startswith("docs/")}


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 120


def test_speeds_of_the_readme_are_in_the_measured_table() -> None:
    rows = PAGES["README.md"].split("## Speed")[1].split("##")[0].splitlines()
    rows = [row for row in rows if row.startswith("|")][2:]
    figures = [re.findall(r"\d[\d.]*", row.split("|")[2]) for row in rows]
    assert len(figures) == 5
    for row in figures:
        for figure in row:
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", PAGES["docs/benchmarks.md"]), figure


@pytest.mark.parametrize("name", MISTAKES)
def test_a_common_mistake_has_a_row(name: str) -> None:
    rows = PAGES["docs/troubleshooting.md"].splitlines()
    assert any(all(re.search(words, row) for words in MISTAKES[name].names) for row in rows if row.startswith("|")), MISTAKES[name].names


def test_paths_of_modules_and_scripts_on_the_pages_exist() -> None:
    for page, text in PAGES.items():
        for place in re.findall(r"`((?:parallel|model|launcher|tandem|configs|scripts|tests|docs)/[\w/.-]*\w/?)`", text):
            assert (PROJECT_ROOT / place).exists(), f"{page}: {place}"


def test_the_table_of_packages_names_every_package_and_nothing_else() -> None:
    table = PAGES["docs/architecture.md"].split("## Packages")[1].split("\n## ")[0]
    named = re.findall(r"^\| `?((?:parallel|model|launcher|tandem)/[\w/]*?)/?`? \|", table, re.MULTILINE)
    packages = {"parallel", "tandem"}
    for root in ("model", "launcher"):
        packages |= {path.parent.relative_to(PROJECT_ROOT).as_posix() for path in (PROJECT_ROOT / root).glob("*/*.py")}
    assert sorted(place.rstrip("/") for place in named) == sorted(packages)


def test_python_examples_compile_and_import_names_that_exist() -> None:
    fence = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
    blocks = [(page, block) for page, text in PAGES.items() for block in fence.findall(text)]
    assert len(blocks) >= 2
    for page, block in blocks:
        for node in ast.walk(ast.parse(block, page)):
            if isinstance(node, ast.ImportFrom) and node.module == "tandem":
                assert {name.name for name in node.names} <= set(tandem.__all__)
