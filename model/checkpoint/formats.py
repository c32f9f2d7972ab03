"""Registry of checkpoint formats, and detection of the format from the contents. Each format has its own module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.checkpoint.auto_round_folder import is_auto_round, open_auto_round
from model.checkpoint.awq_folder import AwqFolder, is_awq
from model.checkpoint.bin_folder import BinFolder, is_bin
from model.checkpoint.column_packed import declares_method
from model.checkpoint.described_folder import DescribedFolder, is_described
from model.checkpoint.float8_folder import Float8Folder, is_float8
from model.checkpoint.fused_order import AUTO, ORDERS
from model.checkpoint.gguf_file import GgufFile
from model.checkpoint.gguf_parts import find_whole
from model.checkpoint.gguf_types import ENCODINGS
from model.checkpoint.gptq_folder import GptqFolder, is_gptq
from model.checkpoint.hf_folder import INDEX_FILE, SAFETENSORS, SINGLE_FILE, HuggingFaceFolder, check_link
from model.checkpoint.meta_folder import FAMILY as META_FAMILY
from model.checkpoint.meta_folder import MetaFolder, is_meta
from model.checkpoint.mindspore_file import MindSporeFile, list_config_folders
from model.checkpoint.mindspore_folder import holds_own_names, is_mindspore
from model.checkpoint.rank_files import LAYOUT_FILE, RankFiles
from model.checkpoint.recognition import name_path
from model.checkpoint.source import CheckpointSource
from model.checkpoint.unfused import unfuse
from model.spec.architecture import Architecture
from model.spec.file_kind import describe_file
from parallel.errors import CheckpointError
from parallel.regular_file import describe_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """Options for opening a checkpoint."""

    format: str | None = None
    """A key of FORMATS; None: detect from the contents."""
    key_file: str | None = None
    """Path of the key file of an encrypted checkpoint."""
    follow_links: bool = False
    """Whether weight files may be links that lead out of their folder."""
    values: Mapping[str, Any] | None = None
    """Values of a config.json, for formats without one."""
    fused_order: str | None = None
    """Row order of MindFormers' fused weights: an entry of ORDERS, or AUTO; None: AUTO."""

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
    """A readable format."""

    name: str
    """Name for messages."""
    matches: Callable[[Path], bool]
    """Return whether the path is of this format, without reading tensors."""
    open: Callable[[Path, OpenOptions], CheckpointSource]
    """Open it, reading the headers."""
    suffix: str = "/"
    """File name suffix that selects this format when the contents are inconclusive."""
    weights: str = "float"
    """Stored forms of the linears, for docs/models-and-formats.md."""
    memory: str = "as stored"
    """Their form in memory."""
    written_by: str | None = None
    """The command that writes it; None: it is only read."""
    reads: Callable[[Architecture], bool] = lambda family: True
    """Whether models of a family can be stored in it."""

    @property
    def quantizes(self) -> bool:
        """Whether `tandem quantize` takes such checkpoints: those whose weights are loaded as floats."""
        return "float" in self.weights.split(", ") or "compute type" in self.memory


def _is_hugging_face(path: Path) -> bool:
    if holds_own_names(path):
        return False
    if (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        return True
    return SAFETENSORS.exist(path)


def _is_compressed_tensors(path: Path) -> bool:
    return _is_hugging_face(path) and declares_method(path, "compressed-tensors", "quantization_config.json")


def _open_folder(path: Path, options: OpenOptions) -> HuggingFaceFolder:
    return HuggingFaceFolder(path, follow_links=options.follow_links, values=options.values)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


FORMATS: Mapping[str, Format] = {
    "ranks": Format(
        "rank files (layout.json)",
        lambda path: (path / LAYOUT_FILE).is_file(),
        lambda path, _: RankFiles(path),
        weights="float, int8, int4, FP8",
        written_by="reshard",
    ),
    "modelslim": Format(
        "Golden Stick 1.4 or ModelSlim folder (quantization description)",
        is_described,
        lambda path, _: DescribedFolder(path),
        weights="int8, int8 with int8 activations",
    ),
    "gptq": Format("GPTQ folder", is_gptq, lambda path, options: GptqFolder(path, follow_links=options.follow_links), weights="int4, int8"),
    "awq": Format("AWQ folder", is_awq, lambda path, options: AwqFolder(path, follow_links=options.follow_links), weights="int4"),
    "auto-round": Format(
        "AutoRound folder",
        is_auto_round,
        lambda path, options: open_auto_round(path, follow_links=options.follow_links),
        weights="int4, int8",
    ),
    "fp8": Format(
        "FP8 folder (fp8, fbgemm_fp8, ModelOpt)",
        is_float8,
        lambda path, options: Float8Folder(path, follow_links=options.follow_links),
        weights="FP8",
    ),
    "compressed-tensors": Format(
        "compressed-tensors folder",
        _is_compressed_tensors,
        _open_folder,
        weights="int8, int8 with int8 activations, int4, FP8",
        written_by="quantize",
    ),
    "hf": Format("Hugging Face folder (config.json, *.safetensors)", _is_hugging_face, _open_folder, written_by="convert"),
    "bin": Format(
        "Hugging Face folder (config.json, pytorch_model*.bin)",
        is_bin,
        lambda path, options: BinFolder(path, follow_links=options.follow_links),
    ),
    "meta": Format(
        "Meta folder (params.json, consolidated.00.pth)",
        is_meta,
        lambda path, _: MetaFolder(path),
        reads=lambda family: family.model_type == META_FAMILY,
    ),
    "gguf": Format(
        "GGUF file (.gguf)",
        _is_gguf,
        lambda path, _: GgufFile(path),
        ".gguf",
        weights="float, " + ", ".join(one.name for one in ENCODINGS.values() if one.is_quantized),
        memory="compute type",
        reads=lambda family: family.gguf is not None,
    ),
    "mindspore": Format(
        "MindSpore file or folder (.ckpt, MindFormers' safetensors)",
        is_mindspore,
        lambda path, options: MindSporeFile(path, options.values, options.key_path, options.fused_order),
        ".ckpt",
        weights="float, int8, int8 with int8 activations",
        written_by="convert --to mindspore",
        reads=lambda family: bool(family.mindformers),
    ),
}
"""By the value of `--from`. The first match wins."""


def find_format(path: Path) -> str:
    """Return the key in FORMATS for `path`. Raises CheckpointError when it is missing or of no known format, listing what is there."""
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
    """Open a checkpoint of any registered format. A folder with a single GGUF file, whole or split, is treated as that file.

    Raises CheckpointError for unreadable files and for links that lead out of a folder, and the errors of the formats.
    """
    options, folder = options or OpenOptions(), path
    inside = find_whole(sorted(path.glob("*.gguf"))) if path.is_dir() else None
    if inside is not None and options.format in (None, "gguf") and not _is_hugging_face(path):
        path = inside
    source = FORMATS[options.format or find_format(path)].open(path, options)
    if folder.is_dir():
        for file in source.files:
            check_link(file, follow_links=options.follow_links, folder=folder)
    return unfuse(source)


def settle_options(source: CheckpointSource, options: OpenOptions) -> OpenOptions:
    """Return `options` with the values detected on opening, so that the ranks need not detect them again."""
    found = source.fused_order if isinstance(source, MindSporeFile) else None
    return replace(options, fused_order=found) if found else options


def lacks_config(path: Path, options: OpenOptions) -> bool:
    """Return whether this is a MindSpore checkpoint without a config.json. Raises the errors of `find_format`."""
    if (options.format or find_format(path)) != "mindspore":
        return False
    return not any((folder / "config.json").is_file() for folder in list_config_folders(path))
