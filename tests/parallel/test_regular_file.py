"""Only regular files are read, nothing blocks, and no more than a limit comes into memory."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.regular_file import open_regular, read_bytes, read_text


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (os.mkfifo, "it is a FIFO, but a regular file is needed"),
    "folder": (Path.mkdir, "it is a folder, but a regular file is needed"),
    "socket": (make_socket, "it is a socket, but a regular file is needed"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a character device, but a regular file is needed"),
    "nothing": (lambda path: None, "No such file or directory"),
    "circle": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "below a file": (lambda path: path.parent.rmdir() or path.parent.write_text("x"), "Not a directory"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file_is_refused_in_words_and_at_once(tmp_path: Path, kind: str) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "file"
    make, reason = KINDS[kind]
    make(path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as refused:
        open_regular(path)
    assert (refused.value.strerror, refused.value.filename) == (reason, str(path)) or refused.value.filename == path
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_null_byte_is_an_oserror_like_every_other_fault() -> None:
    with pytest.raises(OSError, match="a path cannot hold a null byte"):
        open_regular(Path("a\0b"))


def test_a_file_of_the_largest_size_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    assert read_bytes(path, 1000) == b"x" * 1000
    with pytest.raises(OSError, match="it has 1000 bytes, but at most 999 are read"):
        read_bytes(path, 999)


def test_a_large_file_is_refused_by_its_size_alone(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 6 << 30)
    code = "import resource, sys; from pathlib import Path; from parallel.regular_file import read_text\n"
    code += "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
    code += "try: read_text(Path(sys.argv[1]), 1 << 24)\nexcept OSError as error: print(error.strerror)\n"
    found = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    assert found.stdout == f"it has {6 << 30} bytes, but at most {1 << 24} are read\n", found.stderr


def test_files_without_a_size_are_limited_by_what_they_give() -> None:
    assert read_text(Path("/proc/self/status"), 1 << 20).startswith("Name:")
    with pytest.raises(OSError, match="but at most 10 are read"):
        read_text(Path("/proc/self/status"), 10)


def test_text_is_read_as_path_read_text_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("\ufeffä\r\nb\rc\n".encode())
    assert read_text(path, 100, encoding="utf-8-sig") == path.read_text(encoding="utf-8-sig")
    path.write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(path, 100)
    assert read_text(path, 100, errors="replace") == "\ufffd"
