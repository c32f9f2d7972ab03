"""Models of the Hugging Face hub by their ids, from a hub on loopback: what is downloaded, the cache, and every refusal."""

import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from tests.end_to_end.fake_hub import COMMIT, FakeHub
from tests.model.gguf_blocks import write_blocks

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

NEEDED = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def hub(checkpoints: "Checkpoints", tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """A hub with the tiny model, among files that nobody needs, and repositories that cannot be used."""
    root = tmp_path_factory.mktemp("hub")
    tiny = root / "tiny"
    shutil.copytree(checkpoints.float, tiny)
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx.onnx", "pytorch_model.bin.index.json"):
        (tiny / name).write_bytes(b"not needed")
    shutil.copytree(checkpoints.float, root / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(checkpoints.float / "model.safetensors"), root / "bin" / "pytorch_model.bin")
    (root / "empty").mkdir()
    (root / "empty" / "README.md").write_text("{}")
    (root / "ggufs" / "Q8_0").mkdir(parents=True)
    write_blocks(root / "ggufs" / "a-Q4_K_M.gguf", lambda name: Kind.Q4_K)
    write_blocks(root / "ggufs" / "Q8_0" / "a-Q8_0.gguf", lambda name: Kind.Q8_0, part_tensors=12)
    with FakeHub({f"org/{name}": root / name for name in ("tiny", "bin", "ggufs", "empty")}).running() as hub:
        hub.repositories["org/gated"], hub.gated = tiny, {"org/gated"}
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of its own."""
    return tmp_path_factory.mktemp("hf_home")


def _variables(address: str, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_a_model_is_downloaded_once_and_only_what_is_needed(
    tandem: "Tandem", checkpoints: "Checkpoints", hub: FakeHub, home: Path, tmp_path: Path
) -> None:
    variables = _variables(hub.address, home)
    options = ("--prompt", "A llama is", "--max-new-tokens", "4", "--dtype", "float32", "--threads-per-rank", "1")
    local = tandem.predict("--checkpoint", checkpoints.float, "--workers", "1", *options)
    fetched = tandem.predict("org/tiny", *options, **variables)
    assert fetched.jsonl == local.jsonl, "blobs behind links of the cache are read as the files themselves"
    assert hub.list_downloads() == NEEDED
    assert "downloading org/tiny: 5 files" in fetched.stderr

    before = len(hub.requests)
    for words in (["org/tiny"], ["org/tiny", "--offline"], ["https://huggingface.co/org/tiny"], ["org/tiny@main"]):
        result = tandem.run("verify", *words, "--json", cwd=tmp_path, **variables)
        assert result.returncode == 0, result.stderr
        assert f"snapshots/{COMMIT}" in json.loads(result.stdout)["checkpoint"]
    assert len(hub.requests) == before, "what is in the cache needs no hub"


def test_a_download_that_was_cut_short_is_completed(tandem: "Tandem", hub: FakeHub, home: Path, tmp_path: Path) -> None:
    own = tmp_path / "home"
    shutil.copytree(home, own, symlinks=True)
    (snapshot,) = own.glob("hub/models--org--tiny/snapshots/*")
    (snapshot / "model.safetensors").unlink()
    variables = _variables(hub.address, own)
    offline = tandem.run("verify", "org/tiny", "--offline", **variables)
    assert (offline.returncode, offline.stdout) == (2, "")
    assert re.search(r"org/tiny is incomplete in the local cache .*, and downloads are off", offline.stderr)
    assert tandem.run("verify", "org/tiny", **variables).returncode == 0


@pytest.mark.parametrize(
    ("name", "format", "downloads"),
    [
        ("org/ggufs:Q4_K_M", "gguf", ["a-Q4_K_M.gguf"]),
        ("org/ggufs:q8_0", "gguf", ["a-Q8_0-00001-of-00002.gguf", "a-Q8_0-00002-of-00002.gguf"]),
        ("org/bin", "bin", [file for file in NEEDED if file != "model.safetensors"] + ["pytorch_model.bin"]),
    ],
)
def test_one_gguf_file_of_several_and_pickles_are_downloaded_once(
    tandem: "Tandem", hub: FakeHub, home: Path, name: str, format: str, downloads: list[str]
) -> None:
    variables, before = _variables(hub.address, home), hub.list_downloads()
    for _ in range(2):
        result = tandem.run("verify", name, "--json", **variables)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["format"] == format
    assert sorted(hub.list_downloads()) == sorted(before + downloads)


# name: (words of the command, variables, what the message has to hold)
REFUSALS = {
    "unknown": (["org/nothing"], {}, r"org/nothing is not a file or folder here, and not a model on http://127.*: check the name"),
    "revision": (["org/tiny@v9"], {}, r"org/tiny has no revision v9"),
    "gated": (["org/gated"], {}, r"org/gated is gated: accept its terms at .*, then log in"),
    "ggufs": (["org/ggufs"], {}, r"org/ggufs holds 2 GGUF files: a-Q4_K_M, a-Q8_0; name one, as in org/ggufs:Q4_K_M"),
    "no such gguf": (["org/ggufs:Q5_K_M"], {}, r"org/ggufs holds 0 GGUF files named Q5_K_M: a-Q4_K_M, a-Q8_0; name one"),
    "no weights": (["org/empty"], {}, r"org/empty holds no weights"),
    "offline": (["org/other", "--offline"], {}, r"org/other is not a file or folder here, and not in the local cache .*--offline"),
    "offline by variable": (["org/other"], {"HF_HUB_OFFLINE": "1"}, r"org/other .*HF_HUB_OFFLINE"),
    "other site": (["https://example.org/org/tiny"], {}, r"is not a model page on huggingface\.co"),
    "no hub": (
        ["org/tiny2"],
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        r"org/tiny2 is not a file .*, and http://127.0.0.1:9 cannot",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_sentence(tandem: "Tandem", hub: FakeHub, home: Path, tmp_path: Path, name: str) -> None:
    words, more, message = REFUSALS[name]
    result = tandem.run("predict", *words, "--prompt", "x", cwd=tmp_path, **{**_variables(hub.address, home), **more})
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith("tandem: ") and result.stderr.count("\n") == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_does_not_answer_is_given_up_in_time(tandem: "Tandem", home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        result = tandem.run("verify", "org/slow", **_variables(f"http://127.0.0.1:{silent.getsockname()[1]}", home))
    assert time.monotonic() - began < 60
    assert result.returncode == 2 and "cannot be reached" in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_path_that_looks_like_an_id_stays_a_path_where_its_folder_exists(tandem: "Tandem", tmp_path: Path) -> None:
    (tmp_path / "output" / "model-a").mkdir(parents=True)
    result = tandem.run("verify", "output/model-b", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "tandem: the checkpoint output/model-b does not exist; did you mean output/model-a?\n"
