"""Detect the real type of a file from its first bytes, for messages about misnamed files."""

from pathlib import Path

_HEAD_BYTES = 512
GGUF_WORDS = "is a GGUF file"
_STARTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download the file again"),
    (b"PK\x03\x04", "is a zip file"),
    (b"PK\x05\x06", "is an empty zip file"),
    (b"\x1f\x8b", "is a gzip archive: unpack it first"),
    (b"\xfd7zXZ", "is an xz archive: unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is a zstd archive: unpack it first"),
    (b"\x89HDF", "is an HDF5 file, as TensorFlow and Keras write, which is not supported"),
    (b"\x93NUMPY", "is a NumPy array, not a checkpoint"),
    (b"GGUF", GGUF_WORDS),
    (b"ggjt", "is a GGJT file of llama.cpp before GGUF, which is not supported: convert the original checkpoint with a current llama.cpp"),
    (b"ggml", "is a GGML file of llama.cpp before GGUF, which is not supported: convert the original checkpoint with a current llama.cpp"),
    (b"\x80\x02", "is a Python pickle, which is not read because it can run code"),
    (b"\x80\x03", "is a Python pickle, which is not read because it can run code"),
    (b"\x80\x04", "is a Python pickle, which is not read because it can run code"),
    (b"\x80\x05", "is a Python pickle, which is not read because it can run code"),
    (b"%PDF", "is a PDF document"),
)
_TAR_MAGIC, _TAR_OFFSET = b"ustar", 257
_PAGE_STARTS = (b"<!doctype html", b"<html", b"<?xml", b"<head", b"<error")


def describe_file(path: Path) -> str | None:
    """Describe a file as the rest of a sentence that starts with its name; None if its first bytes are inconclusive.

    Raises OSError when it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return "is empty: download or copy it again"
    if not any(head):
        return f"begins with {len(head)} zero bytes, as files of broken downloads do: download or copy it again"
    for start, words in _STARTS:
        if head.startswith(start):
            return words
    if head[_TAR_OFFSET:].startswith(_TAR_MAGIC):
        return "is a tar archive: unpack it first"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGE_STARTS):
        return "is a web page, not the file: a download saved an error or login page under its name; download it again"
    return None
