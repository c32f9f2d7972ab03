"""What newcomers get wrong first: each mistake ends with exit code 2 and one sentence that says what to do.

Those that need no look into the weights are reported before PyTorch is imported.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints

PROJECT_ROOT = Path(__file__).resolve().parents[2]
Make = Callable[["Checkpoints", Path], Sequence[str | Path]]


@dataclass(frozen=True)
class Mistake:
    """A command with something wrong about it."""

    make: Make
    """The words after `tandem`, from the good checkpoints and an empty folder."""
    names: tuple[str, ...]
    """What the message has to hold, as regular expressions."""
    is_early: bool = True
    """Whether it is found before PyTorch is imported."""


def _predict(*words: str) -> Make:
    return lambda good, folder: ["predict", *words]


def _model(*words: str) -> Make:
    """The good model and these words."""
    return lambda good, folder: ["predict", good.float, "--prompt", "x", *words]


def _folder(**files: str | bytes) -> Make:
    """A folder with these files, given as the model; `__` in a name is a dot."""

    def make(good: "Checkpoints", folder: Path) -> Sequence[str | Path]:
        model = folder / "model"
        model.mkdir()
        for name, content in files.items():
            (model / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["predict", model, "--prompt", "x"]

    return make


def _without_tokenizer(good: "Checkpoints", folder: Path) -> Sequence[str | Path]:
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(good.float / name, folder / "model")
    return ["predict", folder / "model", "--prompt", "x"]


def _linked(good: "Checkpoints", folder: Path) -> Sequence[str | Path]:
    shutil.copytree(good.float, folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "model.safetensors").symlink_to(good.float / "model.safetensors")
    return ["predict", folder / "model", "--prompt", "x"]


def _broken_link(good: "Checkpoints", folder: Path) -> Sequence[str | Path]:
    (folder / "model").symlink_to(folder / "gone")
    return ["predict", folder / "model", "--prompt", "x"]


def _typo_in_yaml(good: "Checkpoints", folder: Path) -> Sequence[str | Path]:
    (folder / "run.yaml").write_text(good.config.read_text().replace("num_layers", "num_layer"))
    return ["predict", good.float, "-c", folder / "run.yaml", "--prompt", "x"]


def _two_yamls(good: "Checkpoints", folder: Path) -> Sequence[str | Path]:
    shutil.copytree(good.float, folder / "model")
    for name in ("a.yaml", "b.yaml"):
        shutil.copy(good.config, folder / "model" / name)
    return ["predict", folder / "model", "--prompt", "x"]


def _gguf(*, parts: int = 0, is_ternary: bool = False) -> Make:
    def make(good: "Checkpoints", folder: Path) -> Sequence[str | Path]:
        path = folder / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for add, value in (
            (writer.add_context_length, 64),
            (writer.add_embedding_length, 256),
            (writer.add_block_count, 1),
            (writer.add_feed_forward_length, 256),
            (writer.add_head_count, 2),
            (writer.add_head_count_kv, 2),
        ):
            add(value)
        writer.add_layer_norm_rms_eps(1e-5)
        if parts:
            writer.add_uint16("split.count", parts)
        if is_ternary:
            writer.add_tensor("token_embd.weight", np.zeros((32, 54), np.uint8), raw_dtype=gguf.GGMLQuantizationType.TQ1_0)
        else:
            writer.add_tensor("token_embd.weight", np.zeros((32, 256), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return ["predict", path, "--prompt", "x"]

    return make


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
IS_CPU_BUILD = version("torch").endswith("+cpu")
"""Only such a build tells by its version which devices it lacks."""
MISTAKES = {
    "wrong path": Mistake(_predict("/no/such/model", "--prompt", "x"), ("/no/such/model does not exist",)),
    "typo in the path": Mistake(
        lambda good, folder: ["predict", good.float.with_name("flaot"), "--prompt", "x"], (r"flaot does not exist; did you mean .*float\?",)
    ),
    "id without network": Mistake(
        _predict("org/name", "--offline", "--prompt", "x"), ("org/name is not a file or folder here", "--offline")
    ),
    "address of another site": Mistake(
        _predict("https://example.org/model", "--prompt", "x"), ("not a model page on huggingface", "give org/name")
    ),
    "two models": Mistake(_model("--model", "other"), ("two models are given", "give one")),
    "empty model": Mistake(_predict("", "--prompt", "x"), ("the model is an empty text", "Hugging Face id")),
    "no model": Mistake(_predict("--prompt", "x"), ("no model", "tandem predict MODEL")),
    "YAML as model": Mistake(lambda good, folder: ["predict", good.config, "--prompt", "x"], ("is a configuration", "--config")),
    "config.json as model": Mistake(
        lambda good, folder: ["predict", good.float / "config.json", "--prompt", "x"], ("a part of a checkpoint", "give its folder"), False
    ),
    "folder of .bin files": Mistake(
        _folder(pytorch_model__bin=b"\0"), (r"pytorch_model\.bin, but no config\.json", "copy the whole checkpoint")
    ),
    ".bin file": Mistake(
        lambda good, folder: ((folder / "model.bin").write_bytes(b"x") and ["predict", folder / "model.bin"]) or [],
        (r"model\.bin is a file of torch\.save", "give its folder"),
    ),
    "empty folder": Mistake(_folder(), ("is an empty folder",)),
    "LFS pointer": Mistake(_folder(config__json="{}", model__safetensors=LFS), ("is a Git LFS pointer", "git lfs pull")),
    "LoRA adapter": Mistake(_folder(adapter_config__json="{}", adapter_model__safetensors=b"x"), ("LoRA adapter", "merge it")),
    "link out of the folder": Mistake(_linked, ("is a link out of its folder", "--follow-links"), False),
    "broken link": Mistake(_broken_link, ("is a broken link",)),
    "ternary GGUF": Mistake(_gguf(is_ternary=True), ("TQ1_0",), False),
    "part of a split GGUF": Mistake(_gguf(parts=3), ("is one of 3 parts", "-00001-of-00003.gguf, next to the others"), False),
    "no tokenizer": Mistake(_without_tokenizer, ("has no tokenizer", "copy one into it")),
    "typo in the YAML": Mistake(_typo_in_yaml, ("num_layer is not a known key", r"did you mean .*num_layers\?")),
    "two YAML files": Mistake(_two_yamls, ("holds 2 MindFormers YAML files", "--config")),
    "missing YAML": Mistake(_model("-c", "none.yaml"), (r"none\.yaml does not exist",)),
    "no prompt": Mistake(lambda good, folder: ["predict", good.float], ("no prompt", "--prompt", "--prompts-file", "standard input")),
    "missing prompts file": Mistake(
        lambda good, folder: ["predict", good.float, "--prompts-file", "none.txt"], (r"prompts file none\.txt does not exist",)
    ),
    "wrong command": Mistake(lambda good, folder: ["predikt"], ("predikt", r"Did you mean 'predict'\?")),
    "wrong option": Mistake(_model("--worker", "2"), ("--worker", "--workers")),
    "wrong type": Mistake(_model("--dtype", "fp16"), ("--dtype is 'fp16'", "float32, bfloat16, float16")),
    "a word for a number": Mistake(_model("--workers", "two"), ("--workers", "integer")),
    "no ranks": Mistake(_model("--workers", "0"), ("--workers is 0", "at least 1")),
    "too many ranks": Mistake(_model("--workers", "12"), ("12 ranks are too many", "1 to 9 all work")),
    "no such device": Mistake(
        _model("--device", "npu"), (r"--device is (npu|cuda), but this PyTorch supports (cpu|cuda) only", "drop --device"), IS_CPU_BUILD
    ),
    "too many threads": Mistake(_model("--threads-per-rank", "999"), ("--threads-per-rank is 999", r"may use \d+ cores")),
    "time limit of nothing": Mistake(_model("--timeout", "0"), ("--timeout is 0", "above 0")),
    "port": Mistake(lambda good, folder: ["serve", good.float, "--port", "80000"], ("--port is 80000", "from 0 to 65535")),
    "open server": Mistake(
        lambda good, folder: ["serve", good.float, "--host", "0.0.0.0"], ("needs an API key", "--api-key-file or --insecure")
    ),
    "missing keys": Mistake(lambda good, folder: ["serve", good.float, "--api-key-file", "none"], ("--api-key-file none does not exist",)),
    "missing data": Mistake(
        lambda good, folder: ["eval", good.float, "--task", "boolq", "--data", "none.jsonl"], (r"--data none\.jsonl does not exist",)
    ),
    "unknown approach": Mistake(lambda good, folder: ["quantize", good.float, "-a", "int3"], ("'int3'", "rtn-a16w8")),
}

IN_ONE_PROCESS = """
import contextlib, io, json, sys
from launcher.cli.main import main
results = []
for words in json.load(sys.stdin):
    stderr, stdout = io.StringIO(), io.StringIO()
    sys.argv = ["tandem", *words]
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        try:
            main()
            code = None
        except SystemExit as error:
            code = error.code
    heavy = sorted({"torch", "transformers", "fastapi"} & set(sys.modules))
    results.append([code, stdout.getvalue(), stderr.getvalue(), heavy])
json.dump(results, sys.__stdout__)
"""


@pytest.fixture(scope="module")
def early(checkpoints: "Checkpoints", tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """What every early mistake ended with, all in one process: none may have imported PyTorch, so that the next would not notice."""
    names = [name for name, mistake in MISTAKES.items() if mistake.is_early]
    commands = [list(map(str, MISTAKES[name].make(checkpoints, tmp_path_factory.mktemp("mistake")))) for name in names]
    cwd = tmp_path_factory.mktemp("cwd")
    # Nothing of a launcher, and a Hugging Face cache that is empty.
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(PROJECT_ROOT),
        "PYTHONSAFEPATH": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
    }
    ended = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr
    assert list(cwd.iterdir()) == [], "a refused command leaves nothing"
    return dict(zip(names, json.loads(ended.stdout), strict=True))


@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if mistake.is_early])
def test_an_early_mistake_is_one_sentence_without_pytorch(early: dict[str, list[object]], name: str) -> None:
    code, written, message, heavy = early[name]
    assert (code, written, heavy) == (2, "", []), message
    assert isinstance(message, str)
    assert message.startswith("tandem: ") and message.count("\n") == 1, message
    for words in MISTAKES[name].names:
        assert re.search(words, message), (words, message)


@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if not mistake.is_early])
def test_a_mistake_in_the_files_is_one_sentence(refuse: Callable[..., None], name: str) -> None:
    refuse(MISTAKES[name].make, MISTAKES[name].names, False)
