"""Where the `.ckpt` files of a MindSpore checkpoint lie: one file, a folder, or folders rank_0, rank_1, …

Knows names and first bytes only.
"""

import re
from pathlib import Path

from parallel.errors import CheckpointError

_MARKS = re.compile(rb"[\xd8-\xda]\x5e\x3a\x7f|\x0a[\x80-\xff]{0,9}[\x00-\x7f]\x0a", re.DOTALL)
"""An encrypted file's first word, or a message (field 1 and its length) that begins with a tag (field 1)."""


def is_mindspore(path: Path) -> bool:
    """Whether `path` is a file that begins as MindSpore's do, or a folder that holds a .ckpt file or a folder rank_0."""
    if path.is_file():
        with path.open("rb") as file:
            return _MARKS.match(file.read(16)) is not None
    return bool(_list_checkpoints(path)) or (path / "rank_0").is_dir()


def find_files(path: Path) -> list[Path]:
    """The `.ckpt` files of all ranks, in rank order. Raises CheckpointError for none, several, or a rank that is missing."""
    if not path.is_dir():
        return [path]
    if _list_checkpoints(path):
        return [_find_single(path)]
    folders = {int(match[1]): one for one in path.iterdir() if one.is_dir() and (match := re.fullmatch(r"rank_(\d+)", one.name))}
    if not folders:
        raise CheckpointError(f"{path} holds neither a .ckpt file nor folders rank_0, rank_1, …")
    missing = [rank for rank in range(max(folders) + 1) if rank not in folders]
    if missing:
        raise CheckpointError(f"{path} holds rank_{max(folders)}, but no rank_{missing[0]}: copy the folders of all ranks")
    return [_find_single(folders[rank]) for rank in sorted(folders)]


def _find_single(folder: Path) -> Path:
    found = _list_checkpoints(folder)
    if len(found) != 1:
        raise CheckpointError(f"{folder} holds {len(found)} .ckpt files, but 1 is needed: give the file itself")
    return found[0]


def _list_checkpoints(folder: Path) -> list[Path]:
    # MindFormers lays a file that says how the ranks were cut, of another format, beside the folders.
    return sorted(file for file in folder.glob("*.ckpt") if file.is_file() and "strategy" not in file.name)
