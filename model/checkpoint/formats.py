"""The table of checkpoint formats, and how one is told from another. One format, one file; this one knows no bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.checkpoint.gguf_file import GgufFile
from model.checkpoint.hf_folder import INDEX_FILE, SINGLE_FILE, HuggingFaceFolder
from model.checkpoint.rank_files import LAYOUT_FILE, RankFiles
from model.checkpoint.source import CheckpointSource
from parallel.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Format:
    """One readable format."""

    name: str
    """In words, for messages."""
    matches: Callable[[Path], bool]
    """Whether a path looks like it, by names alone."""
    open: Callable[[Path], CheckpointSource]
    """Reads the headers."""


FORMATS = (
    Format("rank files (layout.json)", lambda path: (path / LAYOUT_FILE).is_file(), RankFiles),
    Format(
        "Hugging Face folder (model.safetensors or its index)",
        lambda path: (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file(),
        HuggingFaceFolder,
    ),
    Format("GGUF file (.gguf)", lambda path: path.is_file() and path.suffix == ".gguf", GgufFile),
)


def open_checkpoint(path: Path) -> CheckpointSource:
    """Open a checkpoint of any format in the table.

    Raises CheckpointError when the path is missing or matches none, listing what there is.
    """
    if not path.exists():
        raise CheckpointError(f"the checkpoint {path} does not exist")
    for format in FORMATS:
        if format.matches(path):
            return format.open(path)
    if path.is_dir():
        inside = sorted(path.glob("*.gguf"))
        if len(inside) == 1:
            return GgufFile(inside[0])
    known = "; ".join(format.name for format in FORMATS)
    raise CheckpointError(f"{path} is no checkpoint that can be read. Readable: {known}")
