"""Text files that are there whole or not at all: a file beside, fsync, rename. Knows nothing of what is written."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` under `path`, whose folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
