"""A Hugging Face folder: config.json beside one safetensors file, or several with an index.

Knows the folder's files; not what its tensors are for.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.checksum_file import read_sha256sums
from model.checkpoint.name_prefix import find_names
from model.checkpoint.recognition import check_method
from model.checkpoint.safetensors_file import StoredTensor, read_header
from model.checkpoint.source import PIECE_BYTES
from model.config import read_config
from model.file_kind import describe_file
from model.quoting import quote, quote_name
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows
from parallel.regular_file import MAX_INDEX_BYTES, read_text

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PART = re.compile(r"(?P<stem>.*-)(?P<number>\d{5})(?P<of>-of-)(?P<count>\d{5})\.safetensors")
_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")


class HuggingFaceFolder:
    """Opened by its headers. Raises CheckpointError for files that are missing or short, ConfigError for config.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path / "config.json")
        check_method(path, self.config)
        self.files = _weight_files(path)
        self.checksums = read_sha256sums(path, self.files)
        self._stored: dict[str, tuple[Path, StoredTensor]] = {}
        for file in self.files:
            for name, stored in read_header(file).items():
                if name in self._stored:
                    raise CheckpointError(f"{name} is in both {self._stored[name][0]} and {file}: remove the file that is not needed")
                self._stored[name] = (file, stored)
        if (path / INDEX_FILE).is_file() and not (path / SINGLE_FILE).is_file():
            _check_index(path, {name: file.name for name, (file, _) in self._stored.items()})
        names = find_names(self._stored, path)
        self._stored = {names[name]: stored for name, stored in self._stored.items()}
        self.tensors = {name: stored.info for name, (_, stored) in self._stored.items()}
        self.notes = untie_head(self.config, self._stored, path)

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        return reader.read_rows(self.locate_rows(name, start, stop), start, stop)

    def locate_rows(self, name: str, start: int, stop: int) -> list[StoredRows]:
        """Where they lie."""
        file, stored = self._stored[name]
        return [stored.stored_rows(file)]

    def tokenizer_path(self) -> Path:
        """The folder itself."""
        return self.path


def untie_head(config: dict[str, Any], stored: Mapping[str, tuple[Path, StoredTensor]], path: Path) -> tuple[str, ...]:
    """As transformers does, use a stored head that differs from the embedding although the config ties them. Changes `config`, and gives
    a line that says so."""
    head, embedding = (stored.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if config.get("tie_word_embeddings") is not True or not head or not embedding or _have_same_bytes(head, embedding):
        return ()
    config["tie_word_embeddings"] = False
    return (
        f"{path / 'config.json'}: tie_word_embeddings is true, but lm_head.weight differs from the embedding: not tied, as in transformers",
    )


def _weight_files(path: Path) -> list[Path]:
    if (path / SINGLE_FILE).is_file():
        files = [path / SINGLE_FILE]
    elif (path / INDEX_FILE).is_file():
        files = [path / name for name in sorted(set(_read_weight_map(path).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            more = f", and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise CheckpointError(f"{path} lacks {len(missing)} of its {len(files)} files: {', '.join(missing[:10])}{more}; copy them")
    else:
        files = list_shards(path)
        if not files:
            raise CheckpointError(f"{path} holds no weights: neither {SINGLE_FILE} nor other *.safetensors files")
        _check_parts(path, files)
    for file in files:
        check_link(file)
    return files


def list_shards(path: Path) -> list[Path]:
    """The safetensors files of a folder, without those of adapters."""
    return sorted(file for file in path.glob("*.safetensors") if file.is_file() and not file.name.startswith("adapter_"))


def _check_parts(path: Path, files: list[Path]) -> None:
    """Every part that a name such as model-00001-of-00002 counts is there: no index says so."""
    names = {file.name for file in files}
    for file in files:
        part = _PART.fullmatch(file.name)
        for number in range(1, int(part["count"]) + 1) if part else ():
            name = f"{part['stem']}{number:0{len(part['number'])}d}{part['of']}{part['count']}.safetensors"  # type: ignore[index]
            if name not in names:
                raise CheckpointError(f"{path} holds {len(files)} safetensors files without an index, but {name} is missing: copy it")


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


def check_link(file: Path) -> None:
    """A link may lead within the folder, or from a snapshot of the Hugging Face hub's cache into the same model's blobs."""
    folder, target = file.parent.resolve(), file.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not target.is_relative_to(folder) and not target.is_relative_to(blobs):
        raise CheckpointError(f"{file} is a link out of its folder, to {target}: copy the file itself here")


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(read_text(path / INDEX_FILE, MAX_INDEX_BYTES))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except OSError as error:
        raise CheckpointError(f"{path / INDEX_FILE} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        with suppress(OSError):
            if words := describe_file(path / INDEX_FILE):
                raise CheckpointError(f"{path / INDEX_FILE} {words}") from None
        raise CheckpointError(f"{path / INDEX_FILE} has no readable weight_map") from None
    outside = next((file for file in files.values() if not _FILE_NAME.fullmatch(file)), None)
    if outside is not None:
        raise CheckpointError(f"{path / INDEX_FILE} names {quote(outside)}, which is no safetensors file of its folder")
    return files


def _check_index(path: Path, found: dict[str, str]) -> None:
    listed = _read_weight_map(path)
    wrong = [name for name, file in listed.items() if found.get(name) != file]
    if wrong:
        raise CheckpointError(
            f"{path / INDEX_FILE} lists {len(wrong)} of {len(listed)} tensors that are not in the files it names, "
            f"{quote_name(wrong[0])} in {listed[wrong[0]]} first: copy the checkpoint again"
        )
