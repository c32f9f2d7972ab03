"""The table of checkpoint formats, and how one is told from another. One format, one file; this one knows no bytes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint.awq_folder import AwqFolder, is_awq
from model.checkpoint.gguf_file import GgufFile
from model.checkpoint.gptq_folder import GptqFolder, is_gptq
from model.checkpoint.hf_folder import INDEX_FILE, SINGLE_FILE, HuggingFaceFolder
from model.checkpoint.mindspore_file import MindSporeFile
from model.checkpoint.mindspore_folder import is_mindspore
from model.checkpoint.rank_files import LAYOUT_FILE, RankFiles
from model.checkpoint.source import CheckpointSource
from parallel.errors import CheckpointError

ModelValues = Mapping[str, Any]
"""Values of a config.json, for formats that have none."""


@dataclass(frozen=True, slots=True)
class Format:
    """One readable format."""

    name: str
    """In words, for messages."""
    matches: Callable[[Path], bool]
    """Whether a path looks like it, by names and settings; tensors are not looked at."""
    open: Callable[[Path, ModelValues | None], CheckpointSource]
    """Reads the headers."""


FORMATS = (
    Format("rank files (layout.json)", lambda path: (path / LAYOUT_FILE).is_file(), lambda path, values: RankFiles(path)),
    Format("GPTQ folder", is_gptq, lambda path, values: GptqFolder(path)),
    Format("AWQ folder", is_awq, lambda path, values: AwqFolder(path)),
    Format(
        "Hugging Face folder (model.safetensors or its index)",
        lambda path: (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file(),
        lambda path, values: HuggingFaceFolder(path),
    ),
    Format("GGUF file (.gguf)", lambda path: path.is_file() and path.suffix == ".gguf", lambda path, values: GgufFile(path)),
    Format("MindSpore file or folder (.ckpt)", is_mindspore, MindSporeFile),
)


def open_checkpoint(path: Path, values: ModelValues | None = None) -> CheckpointSource:
    """Open a checkpoint of any format in the table.

    `values`: what stands for config.json where a format has none. Raises CheckpointError when the path is missing or
    matches none, listing what there is.
    """
    if not path.exists():
        raise CheckpointError(f"the checkpoint {path} does not exist")
    for format in FORMATS:
        if format.matches(path):
            return format.open(path, values)
    if path.is_dir():
        inside = sorted(path.glob("*.gguf"))
        if len(inside) == 1:
            return GgufFile(inside[0])
    known = "; ".join(format.name for format in FORMATS)
    raise CheckpointError(f"{path} is no checkpoint that can be read. Readable: {known}")
