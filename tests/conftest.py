"""Fixtures for every test: where the shared data lie that are not part of the project."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

# Read when triton is first imported: kernels for accelerators then run in its interpreter, on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")

_PROJECT_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder named by TANDEM_SHARED, else ../shared beside the project's root; the test is skipped where neither is there."""
    folder = Path(os.environ.get("TANDEM_SHARED") or _PROJECT_ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip("no shared data: set TANDEM_SHARED or put it at ../shared")
    return folder


@pytest.fixture(scope="session")
def stories(shared_dir: Path) -> Path:
    """A small trained model: its tokens hang on what it has read, and not on last bits."""
    folder = shared_dir / "data" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip("no data/stories260K-hf among the shared data")
    return folder


@pytest.fixture(scope="session")
def keep_layers() -> Callable[[Path, int, Path], Path]:
    """A function that writes the first layers of a checkpoint as one of its own, with the same tokenizer: (folder, layers, target)."""

    def write(folder: Path, num_layers: int, target: Path) -> Path:
        config = json.loads((folder / "config.json").read_text())
        assert 0 < num_layers < config["num_hidden_layers"]
        target.mkdir(parents=True)
        (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
        for file in folder.glob("tokenizer*"):
            shutil.copy(file, target)
        kept = {}
        with safe_open(folder / "model.safetensors", "pt") as tensors:
            for name in tensors.keys():
                if not name.startswith("model.layers.") or int(name.split(".")[2]) < num_layers:
                    kept[name] = tensors.get_tensor(name)
            metadata = tensors.metadata()
        save_file(kept, target / "model.safetensors", metadata=metadata)
        return target

    return write
