"""The threat page names tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent
PAGE = (PROJECT_ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`( \(pending\))?", PAGE)


@cache
def list_tests(file: str) -> frozenset[str]:
    path = PROJECT_ROOT / file
    if not path.is_file():
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize(("file", "name", "pending"), NAMED, ids=[name for _, name, _ in NAMED])
def test_a_named_test_exists_and_a_pending_one_is_no_longer_marked_when_it_does(file: str, name: str, pending: str) -> None:
    assert (name in list_tests(file)) != bool(pending), f"{file}::{name}"


def test_every_row_of_the_page_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith(("|---", "| cannot | shown by |"))]
    assert len(rows) > 30
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py::test_\w+`", row)] == []
    assert PAGE.count("tests/") == len(NAMED), "a test is named in another form"
