"""docs/models-and-formats.md holds what the registries hold, and what it promises of float formats is true for every family."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.formats import FORMATS, find_format, open_checkpoint
from model.export.rank_files import write_rank_files
from model.spec.config import build_config
from model.spec.families import list_architectures
from model.spec.scheme import read_scheme
from tests.model.checkpoint.float8_files import write_float8
from tests.model.families import MODELS, write_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_page", ROOT / "scripts" / "support_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_those_of_the_registries(page: ModuleType) -> None:
    text = (ROOT / "docs" / "models-and-formats.md").read_text(encoding="utf-8")
    inner = text.partition(page.START)[2].partition(page.END)[0]
    assert inner == f"\n{page.render_tables()}", "run python scripts/support_page.py"
    rows = [line.split(" | ")[0].removeprefix("| ") for line in inner.splitlines() if line.startswith("| ")]
    assert {*FORMATS, *list_architectures()} <= set(rows)


FAMILIES = {kind: name for name, (kind, _) in reversed(MODELS.items())}


def write_ranks(source: Path, target: Path) -> Path:
    opened = open_checkpoint(source)
    write_rank_files(opened, build_config(opened.config), read_scheme(opened.config), 2, target)
    return target


def write_bin(source: Path, target: Path) -> Path:
    from safetensors.torch import load_file

    target.mkdir()
    torch.save(load_file(source / "model.safetensors"), target / "pytorch_model.bin")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "hf": lambda source, target: source,
    "bin": write_bin,
    "ranks": write_ranks,
    "fp8": lambda source, target: write_float8(source, target, "channel", "fbgemm_fp8")[0],
    "compressed-tensors": lambda source, target: write_float8(source, target, "channel")[0],
}


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_is_read_from_the_formats_that_the_page_promises(tmp_path: Path, family: str, format: str) -> None:
    assert FORMATS[format].reads(list_architectures()[family])
    path = WRITERS[format](write_model(tmp_path / "source", FAMILIES[family]), tmp_path / "target")
    assert find_format(path) == format
    source = open_checkpoint(path)
    check_checkpoint(source, build_config(source.config), read_scheme(source.config))
