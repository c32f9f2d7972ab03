"""Rank files: one safetensors file a rank beside layout.json, written by `tandem reshard`, read by any number of ranks.

layout.json holds the format version, the world size, the quantization scheme, the rows of every tensor that every
rank's file holds, and the sha256 of every file. Key-value heads that several ranks keep are stored in each file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.folder_writing import write_folder, write_json
from model.checkpoint.hf_folder import SINGLE_FILE
from model.checkpoint.safetensors_file import SafetensorsWriter, read_header
from model.checkpoint.source import CheckpointSource, TensorInfo
from model.config import LlamaConfig, read_config
from model.scheme import Scheme
from model.tokenizer_writing import write_tokenizer
from model.weights import plan_weights
from parallel.errors import CheckpointError
from parallel.file_slices import FileReader, StoredRows

LAYOUT_FILE = "layout.json"
FORMAT_VERSION = 1


def rank_file_name(rank: int, world_size: int) -> str:
    """rank_00_of_08.safetensors; of one rank model.safetensors, so that the folder is a Hugging Face folder again."""
    if world_size == 1:
        return SINGLE_FILE
    return f"rank_{rank:02d}_of_{world_size:02d}.safetensors"


class RankFiles:
    """A folder of rank files. A tensor's rows are looked up in whichever files hold them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path / "config.json")
        self.layout = _read_layout(path)
        self.world_size: int = self.layout["world_size"]
        self._parts: dict[str, list[StoredRows]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        headers = [read_header(path / name) for name in self.layout["files"]]
        for name, entry in self.layout["tensors"].items():
            parts, shape = [], tuple(entry["shape"])
            for file, header, (start, stop) in zip(self.layout["files"], headers, entry["rows"], strict=True):
                stored = header.get(name)
                wanted = (stop - start, *shape[1:])
                if stored is None or stored.info.shape != wanted:
                    found = "no such tensor" if stored is None else f"shape {list(stored.info.shape)}"
                    raise CheckpointError(f"{path / file} holds {found} under {name}, but {LAYOUT_FILE} says {list(wanted)}")
                parts.append(stored.stored_rows(path / file, start))
            dtypes = {part.dtype for part in parts}
            if len(dtypes) > 1:
                found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
                raise CheckpointError(f"{path}: {name} is stored as {found} in different rank files; write them again with tandem reshard")
            self._parts[name] = parts
            self.tensors[name] = TensorInfo(shape, dtypes.pop())

    def read_rows(self, reader: FileReader, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, from the file that holds all of them if there is one."""
        parts = self._parts[name]
        whole = [part for part in parts if part.start <= start and stop <= part.stop]
        return reader.read_rows(whole[:1] or parts, start, stop)

    def tokenizer_path(self) -> Path:
        """The folder itself."""
        return self.path


def write_rank_files(
    source: CheckpointSource,
    config: LlamaConfig,
    scheme: Scheme,
    world_size: int,
    target: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write `source` as `world_size` rank files into the folder `target`; give the bytes that were read.

    Never holds more than one rank's part of one tensor. `on_progress` gets (bytes written, bytes in all).
    Raises LayoutError when the model has too few units.
    """
    config.layout().check(world_size)
    specs = plan_weights(config, scheme)
    rows = {name: [spec.rows(rank, world_size) for rank in range(world_size)] for name, spec in specs.items()}
    infos = [
        {
            name: TensorInfo((stop - start, *spec.shape[1:]), source.tensors[name].dtype)
            for name, spec in specs.items()
            for start, stop in [rows[name][r]]
        }
        for r in range(world_size)
    ]
    total = sum(info.num_bytes for rank in infos for info in rank.values())
    reader, done, hashes = FileReader(), 0, {}
    with write_folder(target) as folder:
        for rank in range(world_size):
            file = rank_file_name(rank, world_size)
            with SafetensorsWriter(folder / file, infos[rank]) as writer:
                for name, info in infos[rank].items():
                    writer.write(name, source.read_rows(reader, name, *rows[name][rank]))
                    done += info.num_bytes
                    on_progress(done, total)
            hashes[file] = writer.sha256
        write_json(
            folder / LAYOUT_FILE,
            {
                "format_version": FORMAT_VERSION,
                "world_size": world_size,
                "scheme": scheme.name,
                "files": hashes,
                "tensors": {name: {"shape": list(spec.shape), "rows": [list(part) for part in rows[name]]} for name, spec in specs.items()},
            },
        )
        write_json(folder / "config.json", source.config)
        write_tokenizer(source.tokenizer_path(), folder)
    reader.close()
    return reader.read_bytes


def _read_layout(path: Path) -> dict[str, Any]:
    file = path / LAYOUT_FILE
    try:
        layout = json.loads(file.read_text(encoding="utf-8"))
        version, world_size, files = layout["format_version"], layout["world_size"], layout["files"]
        tensors = layout["tensors"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file} cannot be read; write the rank files again with tandem reshard") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file} has format version {version}, but this tandem reads {FORMAT_VERSION}")
    if len(files) != world_size or any(len(entry["rows"]) != world_size for entry in tensors.values()):
        raise CheckpointError(f"{file} names {len(files)} files for {world_size} ranks; write the rank files again with tandem reshard")
    assert isinstance(layout, dict)
    return layout
