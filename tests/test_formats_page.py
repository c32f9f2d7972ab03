"""docs/formats.md says what the tables in the code say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from model.spec.key_table import KeyTable

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("formats_page", ROOT / "scripts" / "formats_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_those_of_the_code(page: ModuleType) -> None:
    _, inner, after = page.read_page((ROOT / "docs" / "formats.md").read_text(encoding="utf-8"))
    assert inner == f"\n{page.render_tables()}", "run python scripts/formats_page.py"
    assert after.strip()


def test_every_key_of_every_table_is_on_the_page_and_in_one_row_only(page: ModuleType) -> None:
    tables: tuple[KeyTable, ...] = page.TABLES
    text = page.render_tables()
    for table in tables:
        groups = (table.read, table.fixed.keys(), table.ignored.keys(), table.harmless)
        assert len(table.list_keys()) == sum(map(len, groups)) + len(table.harmless_prefixes), f"{table.name}: a key is in two groups"
        assert all(f"`{key}`" in text or f"`{key}*`" in text for key in table.list_keys())
