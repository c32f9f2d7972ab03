"""The Dockerfile, without an engine: its instructions, copied paths, installed extras and entry point fit the project."""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from launcher.cli.main import app

PROJECT_ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (PROJECT_ROOT / "Dockerfile").read_text(encoding="utf-8")
PYPROJECT = (PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8")
KNOWN = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}


@dataclass(frozen=True)
class Instruction:
    """One instruction with its stage, counted from 0."""

    stage: int
    name: str
    value: str


def read_instructions(text: str) -> list[Instruction]:
    """Instructions with continued lines joined. Raises AssertionError for an unknown one."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")).replace("\\\n", " ").splitlines()
    stage, found = -1, []
    for name, _, value in (line.strip().partition(" ") for line in lines if line.strip()):
        assert name in KNOWN, name
        stage += name == "FROM"
        found.append(Instruction(stage, name, value.strip()))
    return found


def copied_from_the_project(instructions: list[Instruction]) -> Iterator[str]:
    for instruction in instructions:
        if instruction.name == "COPY" and not instruction.value.startswith("--from="):
            yield from instruction.value.split()[:-1]


def check(text: str) -> None:
    """Fail where a Dockerfile does not fit the project."""
    instructions = read_instructions(text)
    stages = [match[1] for i in instructions if i.name == "FROM" and (match := re.search(r" AS (\w+)$", i.value))]
    allowed = {line.removeprefix("!").rstrip("/") for line in (PROJECT_ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    sources = {source.rstrip("/") for source in copied_from_the_project(instructions)}
    for source in sources:
        assert (PROJECT_ROOT / source).exists(), f"COPY: {source} does not exist"
        assert source in allowed, f"COPY: .dockerignore excludes {source}"
    packages = {path.parent.name for path in PROJECT_ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages | {"pyproject.toml", "README.md", "LICENSE"} <= sources, "pip install needs these files"
    for instruction in instructions:
        if instruction.name == "COPY" and (match := re.match(r"--from=(\S+)", instruction.value)):
            assert match[1] in stages, f"COPY: no stage {match[1]}"
        if instruction.name == "RUN":
            parsed = subprocess.run(["sh", "-n", "-c", instruction.value], capture_output=True, text=True)
            assert parsed.returncode == 0, f"RUN: {parsed.stderr}"
            for script in re.findall(r"\bscripts/\S+", instruction.value):
                assert (PROJECT_ROOT / script).is_file(), f"RUN: {script} does not exist"
    commands = " ".join(i.value for i in instructions if i.name == "RUN")
    extras = [extra for names in re.findall(r"'\.\[([\w,]+)\]'", commands) for extra in names.split(",")]
    assert extras and all(re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE) for extra in extras), f"extras {extras}"
    supported, installed = re.search(r'"torch~=([\d.]+)"', PYPROJECT), re.search(r"\btorch==([\d.]+)", commands)
    assert supported and installed and supported[1].rsplit(".", 1)[0] == installed[1].rsplit(".", 1)[0], "version of torch"
    last = [i for i in instructions if i.stage == instructions[-1].stage]
    value = {i.name: i.value for i in last}
    assert value["USER"] not in ("root", "0"), "USER is root"
    assert json.loads(value["ENTRYPOINT"]) == ["tandem"] and re.search(r"^tandem = ", PYPROJECT, re.MULTILINE), "ENTRYPOINT"
    words = json.loads(value["CMD"])
    assert words == ["--help"] or words[0] in typer.main.get_group(app).commands, "CMD"
    pythons = {match[1] for i in instructions if i.name == "FROM" and (match := re.match(r"python:(3\.\d+)-\S+", i.value))}
    assert len(pythons) == 1 and f"python{pythons.pop()}/" in text, "one Python in all stages"


def test_the_dockerfile_fits_the_project() -> None:
    check(DOCKERFILE)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("COPY model/ model/", "COPY modle/ model/", "modle does not exist"),
        ("COPY model/ model/\n", "", "pip install needs"),
        ("COPY parallel/", "COPY tests/", "excludes tests"),
        ("--from=build", "--from=builder", "no stage builder"),
        ("RUN python -m venv /opt/tandem", "RUN bash scripts/none.sh", "none.sh does not exist"),
        ("RUN python -m venv /opt/tandem", "RUN if true; then", "RUN: "),
        ("[serve,encrypted]", "[server]", "extras"),
        ("torch==2.13.0", "torch==2.14.0", "version of torch"),
        ("USER 10001", "USER root", "USER is root"),
        ('ENTRYPOINT ["tandem"]', 'ENTRYPOINT ["tandm"]', "ENTRYPOINT"),
        ('CMD ["--help"]', 'CMD ["serv"]', "CMD"),
        ("EXPOSE", "EXPOSES", "EXPOSES"),
        ("FROM python:3.12-slim", "FROM python:3.11-slim", "one Python"),
    ],
)
def test_a_wrong_dockerfile_would_be_noticed(before: str, after: str, message: str) -> None:
    assert before in DOCKERFILE
    with pytest.raises(AssertionError, match=message):
        check(DOCKERFILE.replace(before, after))


def test_type_information_is_packaged() -> None:
    section = PYPROJECT.split("[tool.setuptools.package-data]")[1].split("\n[")[0]
    for path in PROJECT_ROOT.glob("*/__init__.py"):
        if path.parent.name != "tests":
            assert (path.parent / "py.typed").is_file()
            assert f'{path.parent.name} = ["py.typed"]' in section
