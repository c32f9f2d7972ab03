"""Atomic write of a checkpoint folder: write a temporary folder next to it, fsync, rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from model.checkpoint.cache_scales import CACHE_SCALES_FILE
from model.checkpoint.checksum_file import write_sha256sums
from model.checkpoint.safetensors_file import SafetensorsWriter
from model.spec.tensor_info import TensorInfo
from parallel.errors import CheckpointError
from parallel.lazy_torch import torch
from parallel.regular_file import describe_kind

MAX_FILE_BYTES = 5_000_000_000
"""Approximate maximum size of a weight file in a Hugging Face folder."""


def check_target(path: Path, *, overwrite: bool, is_file: bool = False) -> None:
    """Raise CheckpointError when `path` exists and may not be replaced: by a file (`is_file`), or else by a folder."""
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} exists already; name another place or add --overwrite")
    if path.exists() and not (path.is_file() if is_file else path.is_dir()):
        found, needed = describe_kind(path.stat().st_mode), "a file" if is_file else "a folder"
        raise CheckpointError(f"{path} is {found}, but {needed} is to be written there; name another place")


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder to fill, then rename it to `path`. On an error it is removed."""
    path = Path(os.path.realpath(path))  # preserve a link to the folder
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        if path.exists():
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        sync(path.parent)
    except BaseException:
        if old.exists() and not path.exists():  # interrupted between the two renames
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Iterable[tuple[str, torch.Tensor]]],
    groups: Iterable[tuple[str, tuple[str, ...]]],
    cache_scales: Collection[str] = (),
) -> None:
    """Write a Hugging Face folder's weights as one file, or as several with an index; return their hashes.

    `groups` pairs what to `read` next with the names of the resulting tensors, in that order. `cache_scales` names those that go to
    CACHE_SCALES_FILE.
    """
    files: list[list[tuple[str, tuple[str, ...]]]] = [[]]
    size = 0
    for group in groups:
        group_bytes = sum(tensors[name].num_bytes for name in group[1])
        if files[-1] and size + group_bytes > MAX_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(group)
        size += group_bytes
    weight_map, hashes = {}, {}
    with ExitStack() as stack:
        aside = [name for file in files for _, group in file for name in group if name in cache_scales]
        scales = SafetensorsWriter(folder / CACHE_SCALES_FILE, {name: tensors[name] for name in aside}) if aside else None
        if scales is not None:
            stack.enter_context(scales)
        for number, file in enumerate(files, 1):
            name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            names = [tensor for _, group in file for tensor in group if tensor not in cache_scales]
            weight_map.update(dict.fromkeys(names, name))
            with SafetensorsWriter(folder / name, {tensor: tensors[tensor] for tensor in names}) as writer:
                for key, _ in file:
                    for tensor, value in read(key):
                        (scales if scales is not None and tensor in cache_scales else writer).write(tensor, value)
            hashes[name] = writer.sha256
    if scales is not None:
        hashes[CACHE_SCALES_FILE] = scales.sha256
    write_sha256sums(folder, hashes)
    if len(files) > 1:
        total = sum(tensors[name].num_bytes for name in weight_map)
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def sync(path: Path) -> None:
    """Flush a file's data, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
