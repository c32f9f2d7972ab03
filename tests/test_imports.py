"""The rules that hold the three packages apart, read from the syntax trees: nothing is imported, so half-built modules are checked too."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent

# A package may import itself and those below it.
FLOORS = {"parallel": 0, "model": 1, "launcher": 2, "tandem": 3}
MODEL_FLOORS = ("spec", "kernels", "backends", "layers", "checkpoint", "text", "decoder", "engine", "quantization", "evaluation", "export")
"""A sub-package of model may import those before it."""
LAUNCHER_IMPORTS = {
    "host": (),
    "environment": ("host",),
    "settings": (),
    "job": ("host",),
    "rendezvous": ("environment", "job", "host"),
    "reporting": ("job", "host"),
    "worker": ("rendezvous", "job", "host"),
    "server": ("reporting", "rendezvous", "job", "host"),
    "supervision": ("worker", "rendezvous", "job", "host", "environment"),
    "commands": ("supervision", "server", "worker", "reporting", "rendezvous", "job", "settings", "environment", "host"),
    "cli": ("commands", "settings", "environment", "host"),
}
"""Sub-packages of launcher and those that each may import (docs/architecture.md)."""
ENVIRONMENT_READER = "launcher/environment"
ENVIRONMENT_NAMES = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}
TORCH_INTERNALS = "parallel/torch_internals.py"
"""The only module that may use private names of PyTorch, or those that move between its releases."""
PROCESS_MODULES = ("subprocess", "multiprocessing", "torch.multiprocessing", "pty")
PROCESS_NAMES = {"os.system", "os.popen", "os.fork", "os.forkpty", "concurrent.futures.ProcessPoolExecutor"}
PROCESS_PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn")
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "misc"}


def violations(root: Path) -> list[str]:
    """Every broken rule under `root`, as `path:line: what`, in order of path and line."""
    found = []
    for folder in (*FLOORS, "scripts", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            for part in (*relative.parts[:-1], path.stem):
                if part in VAGUE_NAMES:
                    found.append(f"{relative}:1: the name {part!r} does not say what is inside")
            if folder in FLOORS:
                tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
                found += [f"{relative}:{line}: {what}" for line, what in sorted(_module_violations(relative, tree))]
    return found


def _module_violations(relative: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    package = relative.parts[0]
    if tree.body and ast.get_docstring(tree) is None:
        yield 1, "the module does not open with a docstring"
    for line, name in set(_dotted_names(tree)):
        top = name.split(".")[0]
        if FLOORS.get(top, -1) > FLOORS[package]:
            yield line, f"{package} imports {name}, which lies above it"
        if top == package and (reason := _floor_violation(relative.parts, name.split("."))):
            yield line, reason
        if name in ENVIRONMENT_NAMES and relative.parent.as_posix() != ENVIRONMENT_READER:
            yield line, f"{name} is used outside {ENVIRONMENT_READER}"
        if relative.as_posix() != TORCH_INTERNALS and _is_internal_to_torch(name):
            yield line, f"{name} is used outside {TORCH_INTERNALS}"
        if package != "launcher" and _starts_processes(name):
            yield line, f"{package} uses {name}, which starts processes"


def _floor_violation(own: tuple[str, ...], imported: list[str]) -> str | None:
    """Why a module of one sub-package may not import from another; None where it may, or where one of them is in no sub-package."""
    if len(own) < 3 or len(imported) < 2 or own[1] == imported[1]:
        return None
    package, mine, other = own[0], own[1], imported[1]
    if package == "tandem":  # its sub-packages lie above its modules
        return None
    if package == "launcher" and mine in LAUNCHER_IMPORTS:
        allowed = LAUNCHER_IMPORTS[mine]
    elif package == "model" and mine in MODEL_FLOORS:
        allowed = MODEL_FLOORS[: MODEL_FLOORS.index(mine)]
    else:
        return f"{package}/{mine} is in no list of floors"
    return (
        None
        if other in allowed
        else f"{package}/{mine} imports {'.'.join(imported)}, but may import {', '.join(allowed) or 'nothing'} only"
    )


def _is_internal_to_torch(name: str) -> bool:
    top, *rest = name.split(".")
    return top == "torch" and any(re.match("_(?!_)|distributed_c10d$|elastic$", part) for part in rest)


def _starts_processes(name: str) -> bool:
    in_module = any(name == module or name.startswith(f"{module}.") for module in PROCESS_MODULES)
    return in_module or name in PROCESS_NAMES or name.startswith(PROCESS_PREFIXES)


def _dotted_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of every import, at any depth, and of every use of an imported name, with aliases resolved.

    Relative imports cannot leave their package and are left out.
    """
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                top = alias.name.split(".")[0]
                aliases[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                if alias.name == "*" and node.module == "os":
                    yield node.lineno, "os.environ"
                yield node.lineno, f"{node.module}.{alias.name}"
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = _resolve(node, aliases)
            if name is not None:
                yield node.lineno, name
        elif isinstance(node, ast.Call) and node.args:
            function, argument = _resolve(node.func, aliases), node.args[0]
            named = function == "importlib.import_module" or (isinstance(node.func, ast.Name) and node.func.id == "__import__")
            if named and isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def _resolve(node: ast.expr, aliases: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, aliases)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def test_the_project_keeps_every_rule() -> None:
    assert all(any((PROJECT_ROOT / package).rglob("*.py")) for package in FLOORS)
    assert violations(PROJECT_ROOT) == []


def _write(root: Path, relative: str, source: str) -> None:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def test_a_tree_that_keeps_the_rules_is_accepted(tmp_path: Path) -> None:
    _write(tmp_path, "parallel/__init__.py", "")
    _write(tmp_path, "parallel/layout.py", '"""Integers."""\nimport os\nfrom . import slices\nos.cpu_count()\n')
    _write(tmp_path, "model/decoder/llama.py", '"""The model."""\nfrom parallel.layout import x\nimport model.spec.config\n')
    _write(tmp_path, "launcher/environment/detection.py", '"""The one reader."""\nimport os\nos.environ["RANK"]\n')
    _write(
        tmp_path, "launcher/cli/main.py", '"""The front."""\nimport subprocess\nfrom model.decoder import llama\nimport parallel.layout\n'
    )
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("relative", "body", "expected"),
    [
        ("parallel/a.py", "import model", "2: parallel imports model, which lies above it"),
        ("parallel/a.py", "from model.config import C", "2: parallel imports model.config.C, which lies above it"),
        ("model/spec/a.py", "import launcher.cli.main as c", "2: model imports launcher.cli.main, which lies above it"),
        ("model/a.py", "def f():\n    from launcher import cli", "3: model imports launcher.cli, which lies above it"),
        ("model/a.py", "if TYPE_CHECKING:\n    import launcher", "3: model imports launcher, which lies above it"),
        (
            "model/a.py",
            "import importlib\nimportlib.import_module('launcher.cli.main')",
            "3: model imports launcher.cli.main, which lies above it",
        ),
        ("model/a.py", "__import__('launcher')", "2: model imports launcher, which lies above it"),
        ("launcher/cli/main.py", "import os\nos.environ.get('RANK')", "3: os.environ is used outside launcher/environment"),
        ("launcher/cli/main.py", "import os as o\no.getenv('RANK')", "3: os.getenv is used outside launcher/environment"),
        ("model/a.py", "from os import environb as e", "2: os.environb is used outside launcher/environment"),
        ("model/a.py", "from os import *", "2: os.environ is used outside launcher/environment"),
        ("model/a.py", "import subprocess", "2: model uses subprocess, which starts processes"),
        ("parallel/a.py", "import torch.multiprocessing as mp", "2: parallel uses torch.multiprocessing, which starts processes"),
        ("parallel/a.py", "import os\nos.fork()", "3: parallel uses os.fork, which starts processes"),
        ("parallel/a.py", "import os\nos.execvp('a', ['a'])", "3: parallel uses os.execvp, which starts processes"),
        (
            "launcher/worker/a.py",
            "import torch.distributed as d\nd._x()",
            "3: torch.distributed._x is used outside parallel/torch_internals",
        ),
        ("model/a.py", "from torch._C import x", "2: torch._C.x is used outside parallel"),
        ("launcher/a.py", "from torch.distributed.elastic import agent", "2: torch.distributed.elastic.agent is used outside parallel"),
        ("model/checkpoint/a.py", "from model.decoder.llama import X", "2: model/checkpoint imports model.decoder.llama.X, but may import"),
        ("model/new/a.py", "import model.spec.config", "2: model/new is in no list of floors"),
        ("launcher/host/a.py", "if TYPE_CHECKING:\n    from launcher.job import job", "3: launcher/host imports launcher.job.job, but may"),
        ("launcher/cli/a.py", "from launcher.worker.rank import R", "2: launcher/cli imports launcher.worker.rank.R, but may import"),
        ("model/utils.py", "", "1: the name 'utils' does not say what is inside"),
        ("tests/helpers/a.py", "", "1: the name 'helpers' does not say what is inside"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, relative: str, body: str, expected: str) -> None:
    _write(tmp_path, relative, f'"""A module."""\n{body}\n')
    assert any(found.startswith(f"{relative}:{expected}") for found in violations(tmp_path))


def test_a_module_without_a_docstring_is_found(tmp_path: Path) -> None:
    _write(tmp_path, "model/a.py", "x = 1\n")
    assert violations(tmp_path) == ["model/a.py:1: the module does not open with a docstring"]
