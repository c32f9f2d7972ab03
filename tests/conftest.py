"""Fixtures for every test: where the shared data lie that are not part of the project."""

import os
from pathlib import Path

import pytest

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
