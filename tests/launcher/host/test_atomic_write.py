"""Text files are replaced whole; devices, FIFOs and streams are written as they are and stay what they are."""

import errno
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launcher.host.atomic_write import atomic_write


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    atomic_write(path, "one")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("one", 0o666 & ~_read_umask())
    path.chmod(0o640)
    node = path.stat().st_ino
    atomic_write(path, "zwei ä")
    assert (path.read_text(encoding="utf-8"), stat.S_IMODE(path.stat().st_mode)) == ("zwei ä", 0o640)
    assert path.stat().st_ino != node and list(path.parent.iterdir()) == [path]


def _read_umask() -> int:
    os.umask(mask := os.umask(0o077))
    return mask


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link, dangling = tmp_path / "far" / "file", tmp_path / "link", tmp_path / "dangling"
    target.write_text("before")
    link.symlink_to(target)
    dangling.symlink_to("far/other")
    for one in (link, dangling):
        atomic_write(one, "after")
        assert one.is_symlink() and one.read_text() == "after"
    assert sorted(path.name for path in target.parent.iterdir()) == ["file", "other"]


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_a_device_stays_a_device(device: str, tmp_path: Path) -> None:
    before = os.stat(device)
    (tmp_path / "link").symlink_to(device)
    for path in (Path(device), tmp_path / "link"):
        if device == "/dev/full":
            with pytest.raises(OSError) as failed:
                atomic_write(path, "x")
            assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, str(path))
        else:
            atomic_write(path, "x")
    after = os.stat(device)
    assert (after.st_rdev, after.st_mode, after.st_ino) == (before.st_rdev, before.st_mode, before.st_ino)


def test_a_fifo_gets_the_text_and_stays(tmp_path: Path) -> None:
    path, got = tmp_path / "fifo", []
    os.mkfifo(path)
    with pytest.raises(OSError, match="it has no reader"):
        atomic_write(path, "x")
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    while True:
        try:
            atomic_write(path, "text" * 50_000)
            break
        except OSError:
            continue  # the reader is on its way
    reader.join()
    assert got == ["text" * 50_000] and stat.S_ISFIFO(path.stat().st_mode)


def test_a_folder_and_a_socket_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    for path, reason in ((tmp_path, "it is a folder"), (tmp_path / "socket", "it is a socket")):
        with pytest.raises(OSError, match=reason):
            atomic_write(path, "x")
    assert stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_a_stream_goes_on_where_it_is_even_in_a_file(name: str, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from launcher.host.atomic_write import atomic_write\nprint('one')\n"
    code += f"atomic_write(Path({name!r}), 'two\\n'); print('three')"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, timeout=60)
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\n"


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError) as failed:
        atomic_write(path, "after")
    assert (failed.value.errno, failed.value.filename) == (errno.EIO, str(path))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
