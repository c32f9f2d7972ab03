"""A Hugging Face folder: config.json with one safetensors file, or several with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from model.checkpoint.cache_scales import find_cache_scales
from model.checkpoint.checksum_file import read_sha256sums
from model.checkpoint.name_prefix import find_names
from model.checkpoint.recognition import check_method
from model.checkpoint.safetensors_file import StoredTensor, read_header
from model.checkpoint.source import PIECE_BYTES
from model.spec.config import read_config
from model.spec.file_kind import describe_file
from model.spec.quoting import quote, quote_name
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows
from parallel.lazy_torch import torch
from parallel.regular_file import MAX_INDEX_BYTES, read_text

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PART = re.compile(r"(?P<stem>.*-)(?P<number>\d{5})(?P<of>-of-)(?P<count>\d{5})(?P<end>\.\w+)")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Names of the files that hold weights, in order of preference."""

    single: str
    index: str
    pattern: str
    """Of all files, where there is neither."""

    @property
    def suffix(self) -> str:
        """Their common ending."""
        return Path(self.single).suffix

    def exist(self, path: Path) -> bool:
        """Return whether a folder holds such files and a config.json."""
        found = (path / self.single).is_file() or (path / self.index).is_file() or bool(self.list_shards(path))
        return found and (path / "config.json").is_file()

    def list_shards(self, path: Path) -> list[Path]:
        """Return the files of a folder that match the pattern, except those of adapters."""
        return sorted(file for file in path.glob(self.pattern) if file.is_file() and not file.name.startswith("adapter_"))


SAFETENSORS = WeightFiles(SINGLE_FILE, INDEX_FILE, "*.safetensors")


class HuggingFaceFolder:
    """A folder opened by reading its headers. Raises CheckpointError for missing or truncated files, ConfigError for config.json."""

    weight_files: ClassVar[WeightFiles] = SAFETENSORS

    def __init__(self, path: Path, *, follow_links: bool = False, values: Mapping[str, Any] | None = None) -> None:
        """`follow_links`: whether weights may be outside the folder, see `check_link`. `values`: those of config.json if there is none."""
        self.path = path
        is_described = values is None or (path / "config.json").exists()
        self.config = read_config(path / "config.json") if is_described else dict(values or {})
        check_method(path, self.config)
        self.files = _find_files(path, self.weight_files, follow_links=follow_links)
        self.checksums = read_sha256sums(path, self.files)
        self._stored: dict[str, tuple[Path, StoredTensor]] = {}
        for file in self.files:
            for name, stored in self._read_header(file).items():
                if name in self._stored:
                    raise CheckpointError(f"{name} is in both {self._stored[name][0]} and {file}: remove the file that is not needed")
                self._stored[name] = (file, stored)
        if (path / self.weight_files.index).is_file() and not (path / self.weight_files.single).is_file():
            _check_index(path / self.weight_files.index, self.weight_files, {name: file.name for name, (file, _) in self._stored.items()})
        names = find_names(self._stored, path)
        self._stored = {names[name]: stored for name, stored in self._stored.items()}
        self.tensors = {name: stored.info for name, (_, stored) in self._stored.items()}
        if not is_described and (embedding := self.tensors.get("model.embed_tokens.weight")):
            self.config.setdefault("torch_dtype", embedding.dtype_name)
        self.notes = untie_head(self.config, self._stored, path)

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a tensor."""
        return reader.read_rows(self.locate_rows(name, start, stop), start, stop)

    def _read_header(self, file: Path) -> dict[str, StoredTensor]:
        return read_header(file)

    def locate_rows(self, name: str, start: int, stop: int) -> list[StoredRows]:
        """Return where the rows are stored."""
        file, stored = self._stored[name]
        return [stored.stored_rows(file)]

    def tokenizer_path(self) -> Path:
        """Return the folder itself."""
        return self.path


def untie_head(config: dict[str, Any], stored: Mapping[str, tuple[Path, StoredTensor]], path: Path) -> tuple[str, ...]:
    """Like transformers, use a stored head that differs from the embedding even if the config ties them.

    Changes `config`, and returns a note for the user.
    """
    head, embedding = (stored.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if config.get("tie_word_embeddings") is not True or not head or not embedding or _have_same_bytes(head, embedding):
        return ()
    config["tie_word_embeddings"] = False
    return (
        f"{path / 'config.json'}: tie_word_embeddings is true, but lm_head.weight differs from the embedding: not tied, as in transformers",
    )


def _find_files(path: Path, names: WeightFiles, *, follow_links: bool) -> list[Path]:
    if (path / names.single).is_file():
        files = [path / names.single]
    elif (path / names.index).is_file():
        files = [path / name for name in sorted(set(_read_weight_map(path / names.index, names).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            more = f", and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise CheckpointError(f"{path} lacks {len(missing)} of its {len(files)} files: {', '.join(missing[:10])}{more}; copy them")
    else:
        files = names.list_shards(path)
        if not files:
            raise CheckpointError(f"{path} holds no weights: neither {names.single} nor other {names.pattern} files")
        _check_parts(path, files)
    if names.suffix == SAFETENSORS.suffix:
        files += find_cache_scales(path)
    for file in files:
        check_link(file, follow_links=follow_links)
    return files


def _check_parts(path: Path, files: list[Path]) -> None:
    """Check that all parts counted by names such as model-00001-of-00002 exist, when there is no index."""
    names = {file.name for file in files}
    for file in files:
        part = _PART.fullmatch(file.name)
        for number in range(1, int(part["count"]) + 1) if part else ():
            name = f"{part['stem']}{number:0{len(part['number'])}d}{part['of']}{part['count']}{part['end']}"  # type: ignore[index]
            if name not in names:
                raise CheckpointError(f"{path} holds {len(files)} {file.suffix} files without an index, but {name} is missing: copy it")


def _have_same_bytes(one: tuple[Path, StoredTensor], other: tuple[Path, StoredTensor]) -> bool:
    if one[1].info != other[1].info:
        return False
    reader, size = FileReader(), one[1].info.num_bytes
    try:
        for start in range(0, size, PIECE_BYTES):
            length = min(PIECE_BYTES, size - start)
            first, second = (reader.read_span(file, stored.offset_bytes + start, length) for file, stored in (one, other))
            if not torch.equal(first, second):
                return False
    finally:
        reader.close()
    return True


def check_link(file: Path, *, follow_links: bool = False, folder: Path | None = None) -> None:
    """Raise CheckpointError for a link that leads out of the checkpoint's `folder` (default: the file's own), unless `follow_links`.

    Always allowed are links within the folder, and links from a snapshot of the Hugging Face cache to the blobs of the same model.
    """
    if follow_links:
        return
    folder, target = (folder or file.parent).resolve(), file.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not target.is_relative_to(folder) and not target.is_relative_to(blobs):
        raise CheckpointError(f"{file} is a link out of its folder, to {target}: copy the file here, or give --follow-links")


def _read_weight_map(index: Path, names: WeightFiles) -> dict[str, str]:
    try:
        weight_map = json.loads(read_text(index, MAX_INDEX_BYTES))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        with suppress(OSError):
            if words := describe_file(index):
                raise CheckpointError(f"{index} {words}") from None
        raise CheckpointError(f"{index} has no readable weight_map") from None
    outside = next((file for file in files.values() if not file.endswith(names.suffix) or re.search(r"[/\\\0]|^\.\w+$", file)), None)
    if outside is not None:
        raise CheckpointError(f"{index} names {quote(outside)}, which is no {names.suffix[1:]} file of its folder")
    return files


def _check_index(index: Path, names: WeightFiles, found: dict[str, str]) -> None:
    listed = _read_weight_map(index, names)
    wrong = [name for name, file in listed.items() if found.get(name) != file]
    if wrong:
        raise CheckpointError(
            f"{index} lists {len(wrong)} of {len(listed)} tensors that are not in the files it names, "
            f"{quote_name(wrong[0])} in {listed[wrong[0]]} first: copy the checkpoint again"
        )
