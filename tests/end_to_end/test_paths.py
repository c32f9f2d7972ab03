"""Paths that cannot be used are refused before anything starts, at once and in a sentence; two runs never share a place."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

Command = Sequence[str | Path]
Make = Callable[["Checkpoints", Path], Command]


def _fifo(folder: Path, name: str = "fifo") -> Path:
    path = folder / name
    os.mkfifo(path)
    return path


def _file(folder: Path, name: str = "file") -> Path:
    path = folder / name
    path.write_text("x")
    return path


def _predict(make: Callable[[Path], Command]) -> Make:
    return lambda good, folder: ["predict", "--checkpoint", good.float, *make(folder)]


def _with_checkpoint(change: Callable[[Path], object], *command: str) -> Make:
    def make(good: "Checkpoints", folder: Path) -> Command:
        shutil.copytree(good.float, folder / "checkpoint")
        change(folder / "checkpoint")
        return [*(command or ("predict", "--checkpoint")), folder / "checkpoint"]

    return make


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 6 << 30)


def _replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _with_yaml(line: str) -> Make:
    def make(good: "Checkpoints", folder: Path) -> Command:
        (folder / "changed.yaml").write_text(good.config.read_text().replace("load_checkpoint: ''\n", "") + line)
        return ["predict", "-c", folder / "changed.yaml", *([] if "load_checkpoint" in line else ["--checkpoint", good.float])]

    return make


def _quantize(make: Callable[[Path], Command]) -> Make:
    return lambda good, folder: ["quantize", "--checkpoint", good.float, *make(folder)]


FIFO, FOLDER = "is a FIFO, but", "it is a folder, but a"

REFUSED: dict[str, tuple[Make, tuple[str, ...]]] = {
    "predict --output FOLDER": (_predict(lambda folder: ["--output", folder]), ("--output cannot be written", FOLDER)),
    "predict --stats FOLDER": (_predict(lambda folder: ["--stats", folder]), ("--stats cannot be written", FOLDER)),
    "predict --log-dir FILE": (_predict(lambda folder: ["--log-dir", _file(folder)]), ("--log-dir cannot be written", "not a folder")),
    "predict --output below a file": (_predict(lambda folder: ["--output", _file(folder) / "x"]), ("--output", "Not a directory")),
    "predict --log-dir below a file": (_predict(lambda folder: ["--log-dir", _file(folder) / "x"]), ("--log-dir", "Not a directory")),
    "predict --resume with a device": (
        _predict(lambda folder: ["--resume", "--output", "/dev/null"]),
        ("--output /dev/null cannot be read: it is a character device",),
    ),
    "predict --prompts-file FIFO": (_predict(lambda folder: ["--prompts-file", _fifo(folder)]), (FIFO,)),
    "predict --prompts-file FOLDER": (_predict(lambda folder: ["--prompts-file", folder]), (FOLDER,)),
    "predict --prompts-file DEVICE": (_predict(lambda folder: ["--prompts-file", "/dev/zero"]), ("is a character device",)),
    "predict --key-file FIFO": (_predict(lambda folder: ["--key-file", _fifo(folder)]), ("--key-file cannot be read", FIFO)),
    "predict --key-file FOLDER": (_predict(lambda folder: ["--key-file", folder]), ("--key-file .* is a folder, but a file",)),
    "predict --key-file nothing": (_predict(lambda folder: ["--key-file", folder / "x"]), ("--key-file .* does not exist",)),
    "predict -c FIFO": (_predict(lambda folder: ["-c", _fifo(folder)]), (FIFO,)),
    "predict -c FOLDER": (_predict(lambda folder: ["-c", folder]), (FOLDER,)),
    "predict -c DEVICE": (_predict(lambda folder: ["-c", "/dev/zero"]), ("is a character device",)),
    "null byte in the YAML's log_dir": (_with_yaml('tandem: {log_dir: "a\\0b"}\n'), ("--log-dir", "null byte")),
    "null byte in the YAML's checkpoint": (_with_yaml('load_checkpoint: "a\\0b"\n'), ("does not exist",)),
    "checkpoint FIFO": (lambda good, folder: ["predict", "--checkpoint", _fifo(folder)], (FIFO,)),
    "checkpoint FIFO named .gguf": (lambda good, folder: ["predict", "--checkpoint", _fifo(folder, "x.gguf")], (FIFO,)),
    "checkpoint DEVICE": (lambda good, folder: ["predict", "--checkpoint", "/dev/zero"], ("is a character device",)),
    "checkpoint with a long name": (lambda good, folder: ["predict", "--checkpoint", "x" * 300], ("File name too long",)),
    "config.json FIFO": (_with_checkpoint(lambda path: _replace_by_fifo(path / "config.json")), ("config.json", FIFO)),
    "weights FIFO": (_with_checkpoint(lambda path: _replace_by_fifo(path / "model.safetensors")), (r"model\.safetensors", FIFO)),
    "checksums FIFO": (_with_checkpoint(lambda path: os.mkfifo(path / "SHA256SUMS")), ("SHA256SUMS", FIFO)),
    "checksums of 6 GB": (_with_checkpoint(lambda path: _huge(path / "SHA256SUMS")), ("SHA256SUMS", "at most 16777216 are read")),
    "config.json of 6 GB": (_with_checkpoint(lambda path: _huge(path / "config.json")), ("config.json", "at most")),
    "quantize -s FIFO": (
        _quantize(lambda folder: ["-a", "smooth_quant", "-t", "boolq", "-s", _fifo(folder), "--output", folder / "out"]),
        (FIFO,),
    ),
    "quantize -t ids -s FIFO": (
        _quantize(lambda folder: ["-a", "smooth_quant", "-t", "ids", "-s", _fifo(folder), "--output", folder / "out"]),
        (FIFO,),
    ),
    "quantize --output below a file": (
        _quantize(lambda folder: ["-a", "rtn-a16w8", "--output", _file(folder) / "x"]),
        ("--output cannot be written", "it is not a folder"),
    ),
    "quantize --output DEVICE": (
        _quantize(lambda folder: ["-a", "rtn-a16w8", "--output", "/dev/null", "--overwrite"]),
        ("/dev/null is a character device, but a folder",),
    ),
    "quantize --output with a long name": (
        _quantize(lambda folder: ["-a", "rtn-a16w8", "--output", folder / ("x" * 250)]),
        ("--output cannot be written", "File name too long"),
    ),
    "convert to a device": (
        lambda good, folder: ["convert", good.float, "/dev/null", "--overwrite"],
        ("/dev/null is a character device, but a folder",),
    ),
    "convert to a file": (
        lambda good, folder: ["convert", good.float, _file(folder), "--overwrite"],
        ("file is a file, but a folder is to be written there",),
    ),
    "convert to a .ckpt that is a FIFO": (
        lambda good, folder: ["convert", good.float, _fifo(folder, "x.ckpt"), "--to", "mindspore", "--overwrite"],
        ("is a FIFO, but a file",),
    ),
    "reshard below a file": (
        lambda good, folder: ["reshard", good.float, _file(folder) / "x", "--workers", "2"],
        ("DST cannot be written", "it is not a folder"),
    ),
    "eval --data FIFO": (
        lambda good, folder: ["eval", "--task", "perplexity", "--data", _fifo(folder), "--checkpoint", good.float],
        (FIFO,),
    ),
    "bench --profile FOLDER": (
        lambda good, folder: ["bench", "--checkpoint", good.float, "--profile", folder],
        ("--profile cannot be written", FOLDER),
    ),
    "serve --api-key-file FIFO": (
        lambda good, folder: ["serve", "--checkpoint", good.float, "--api-key-file", _fifo(folder)],
        ("--api-key-file .* cannot be read", FIFO),
    ),
    "serve --api-key-file FOLDER": (
        lambda good, folder: ["serve", "--checkpoint", good.float, "--api-key-file", folder],
        ("--api-key-file .* is a folder, but a file",),
    ),
    "serve --log-dir FILE": (
        lambda good, folder: ["serve", "--checkpoint", good.float, "--log-dir", _file(folder)],
        ("--log-dir cannot be written", "not a folder"),
    ),
    "plan --svg FOLDER": (lambda good, folder: ["plan", "--checkpoint", good.float, "--svg", folder], ("--svg cannot be written", FOLDER)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_path_ends_with_code_2_and_a_sentence_before_anything_starts(refuse: Callable[..., None], name: str) -> None:
    make, names = REFUSED[name]
    refuse(make, names, False)


@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        ((), {}, True),
        (("--nnodes", "2", "--node-rank", "0"), {}, True),
        (("--nnodes", "2", "--node-rank", "1"), {}, False),
        ((), {"RANK": "0"}, True),
        ((), {"RANK": "1"}, False),
        (("--nnodes", "2", "--node-rank", "0"), {"RANK": "1"}, True),
    ],
)
def test_paths_of_results_are_checked_where_they_are_written_only(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], variables: dict[str, str], expected: bool
) -> None:
    from launcher.commands.preparation import writes_results
    from launcher.settings.options import RunOptions

    if variables:
        variables |= {"WORLD_SIZE": "2", "LOCAL_RANK": variables["RANK"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    options = RunOptions(num_nodes=int(words[1]), node_rank=int(words[3])) if words else RunOptions()
    assert writes_results(options) is expected


def test_results_survive_a_standard_output_that_cannot_spell_them(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder = tandem.new_folder()
    command = tandem.predict_command(folder, "--checkpoint", checkpoints.float, "--prompt", "茶 é", "--max-new-tokens", "3")
    result = tandem.run_command(command, PYTHONIOENCODING="ascii:strict")
    assert result.returncode == 0, result.stderr
    record = json.loads((folder / "results.jsonl").read_text(encoding="utf-8"))
    assert record["prompt"] == "茶 é" and r"\u8336 \xe9" in result.stdout


def test_a_reader_that_leaves_ends_the_run_quietly_and_finished_prompts_are_kept(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder = tandem.new_folder()
    prompts = [word for number in range(40) for word in ("--prompt", f"number {number}")]
    options = ("--checkpoint", checkpoints.float, "--max-batch-size", "1", "--max-new-tokens", "60", "--ignore-eos", *prompts)
    words = " ".join(f"'{word}'" for word in tandem.predict_command(folder, *options))
    result = tandem.run_command(["bash", "-c", f"{words} | head -1; echo ${{PIPESTATUS[0]}}"])
    assert result.stdout.splitlines()[1:] == ["141"], result.stderr
    assert "Traceback" not in result.stderr and "tandem:" not in result.stderr
    records = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert 1 <= len(records) < 40 and json.loads(records[0])["index"] == 0
    assert not list(folder.glob(".*")), "no lock is left"


def test_a_second_run_with_the_same_output_or_log_folder_is_refused_with_the_holder(tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    folder = tandem.new_folder()
    options = ("--checkpoint", checkpoints.float, "--prompt", "a", "--max-new-tokens", "1500", "--ignore-eos")
    first = tandem.start(tandem.predict_command(folder, *options))
    try:
        deadline = time.monotonic() + 60
        while not (folder / ".logs.lock").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(first.process.pid, 0)
        for option, path in (("--output", folder / "results.jsonl"), ("--log-dir", folder / "logs")):
            command = [sys.executable, "-m", "launcher", "predict", *options, option, path]
            result: subprocess.CompletedProcess[str] = tandem.run_command(command)
            assert (result.returncode, result.stdout) == (2, "")
            assert result.stderr.startswith(f"tandem: {option} {path} is in use by process {first.process.pid} on ")
        os.kill(first.process.pid, 0)
    finally:
        first.end()
    again = tandem.run_command(tandem.predict_command(folder, *options[:4], "--max-new-tokens", "2"))
    assert again.returncode == 0, "the killed run has given both up: " + again.stderr
    assert not (folder / ".logs.lock").exists()
