"""The table of checkpoint formats, and how one is told from another by what is in its files. One format, one file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.checkpoint.awq_folder import AwqFolder, is_awq
from model.checkpoint.column_packed import declares_method
from model.checkpoint.described_folder import DescribedFolder, is_described
from model.checkpoint.fused_order import AUTO, ORDERS
from model.checkpoint.gguf_file import GgufFile
from model.checkpoint.gptq_folder import GptqFolder, is_gptq
from model.checkpoint.hf_folder import INDEX_FILE, SINGLE_FILE, HuggingFaceFolder, list_shards
from model.checkpoint.meta_folder import MetaFolder, is_meta
from model.checkpoint.mindspore_file import MindSporeFile, list_config_folders
from model.checkpoint.mindspore_folder import holds_own_names, is_mindspore
from model.checkpoint.rank_files import LAYOUT_FILE, RankFiles
from model.checkpoint.recognition import name_path
from model.checkpoint.source import CheckpointSource
from model.spec.file_kind import describe_file
from parallel.errors import CheckpointError
from parallel.regular_file import describe_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """What a user may say of a checkpoint beside its path."""

    format: str | None = None
    """A key of FORMATS; None: told from the content."""
    key_file: str | None = None
    """Path of the key of an encrypted checkpoint."""
    follow_links: bool = False
    """Whether weight files may be links out of their folder."""
    values: Mapping[str, Any] | None = None
    """Values of a config.json, for formats that have none."""
    fused_order: str | None = None
    """Row order of MindFormers' fused weights: a word of ORDERS, or AUTO; None: AUTO."""

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise CheckpointError(f"the format {self.format!r} is unknown; there are {', '.join(FORMATS)}")
        if self.fused_order not in (None, AUTO, *ORDERS):
            raise CheckpointError(f"--fused-order is {self.fused_order!r}, but has to be one of {', '.join((AUTO, *ORDERS))}")

    @property
    def key_path(self) -> Path | None:
        """The key file as a path."""
        return Path(self.key_file) if self.key_file else None


@dataclass(frozen=True, slots=True)
class Format:
    """One readable format."""

    name: str
    """In words, for messages."""
    matches: Callable[[Path], bool]
    """Whether what lies there is of this format; tensors are not looked at."""
    open: Callable[[Path, OpenOptions], CheckpointSource]
    """Reads the headers."""
    suffix: str = "/"
    """Files of this name's end are taken for it where no content says otherwise."""


def _is_hugging_face(path: Path) -> bool:
    if holds_own_names(path):
        return False
    if (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        return True
    return (path / "config.json").is_file() and bool(list_shards(path))


def _is_compressed_tensors(path: Path) -> bool:
    return _is_hugging_face(path) and declares_method(path, "compressed-tensors", "quantization_config.json")


def _open_folder(path: Path, options: OpenOptions) -> HuggingFaceFolder:
    return HuggingFaceFolder(path, follow_links=options.follow_links)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


FORMATS: Mapping[str, Format] = {
    "ranks": Format("rank files (layout.json)", lambda path: (path / LAYOUT_FILE).is_file(), lambda path, _: RankFiles(path)),
    "modelslim": Format(
        "Golden Stick 1.4 or ModelSlim folder (quantization description)", is_described, lambda path, _: DescribedFolder(path)
    ),
    "gptq": Format("GPTQ folder", is_gptq, lambda path, options: GptqFolder(path, follow_links=options.follow_links)),
    "awq": Format("AWQ folder", is_awq, lambda path, options: AwqFolder(path, follow_links=options.follow_links)),
    "compressed-tensors": Format("compressed-tensors folder", _is_compressed_tensors, _open_folder),
    "hf": Format("Hugging Face folder (config.json, *.safetensors)", _is_hugging_face, _open_folder),
    "meta": Format("Meta folder (params.json, consolidated.00.pth)", is_meta, lambda path, _: MetaFolder(path)),
    "gguf": Format("GGUF file (.gguf)", _is_gguf, lambda path, _: GgufFile(path), ".gguf"),
    "mindspore": Format(
        "MindSpore file or folder (.ckpt, MindFormers' safetensors)",
        is_mindspore,
        lambda path, options: MindSporeFile(path, options.values, options.key_path, options.fused_order),
        ".ckpt",
    ),
}
"""By the word that `--from` takes. The first that matches is taken."""


def find_format(path: Path) -> str:
    """The key of FORMATS of what lies at `path`. Raises CheckpointError when it is missing or of none, listing what there is."""
    if not path.exists():
        raise CheckpointError(f"the checkpoint {path} does not exist")
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"the checkpoint {path} is {describe_kind(path.stat().st_mode)}, but a file or a folder is needed")
    for key, format in FORMATS.items():
        if format.matches(path):
            return key
    is_part = path.is_file() and any(format.matches(path.parent) for format in FORMATS.values())
    words = name_path(path) if not is_part or describe_file(path) else None
    if words:
        raise CheckpointError(words)
    for key, format in FORMATS.items():
        if path.name.endswith(format.suffix):
            return key
    if is_part:
        raise CheckpointError(f"{path} is a part of a checkpoint: give its folder {path.parent}")
    known = "; ".join(format.name for format in FORMATS.values())
    raise CheckpointError(f"{path} is no checkpoint that can be read. Readable: {known}")


def open_checkpoint(path: Path, options: OpenOptions | None = None) -> CheckpointSource:
    """Open a checkpoint of any format in the table. A folder with one GGUF file is this file.

    Raises CheckpointError for what cannot be read, and what the formats raise.
    """
    options = options or OpenOptions()
    inside = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(inside) == 1 and options.format in (None, "gguf") and not _is_hugging_face(path):
        path = inside[0]
    return FORMATS[options.format or find_format(path)].open(path, options)


def settle_options(source: CheckpointSource, options: OpenOptions) -> OpenOptions:
    """`options` with what was found on opening, so that ranks need not find it again."""
    found = source.fused_order if isinstance(source, MindSporeFile) else None
    return replace(options, fused_order=found) if found else options


def lacks_config(path: Path, options: OpenOptions) -> bool:
    """Whether this is a MindSpore checkpoint with no config.json beside it. Raises what `find_format` raises."""
    if (options.format or find_format(path)) != "mindspore":
        return False
    return not any((folder / "config.json").is_file() for folder in list_config_folders(path))
