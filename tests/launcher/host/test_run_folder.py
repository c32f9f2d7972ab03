"""The folder of a run: private, gone at the end, and removed later when its parent was killed."""

import os
import signal
import subprocess
import sys
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

from launcher.host.run_folder import open_run_folder
from parallel.errors import ConfigError

HOLD = """
import time
from launcher.host.run_folder import open_run_folder
from parallel.errors import ConfigError

with open_run_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_it_is_private_and_gone_at_the_end(temporary: Path) -> None:
    with open_run_folder() as folder:
        assert folder.parent == temporary and folder.stat().st_mode & 0o777 == 0o700
        (folder / "left.txt").write_text("x")
    assert list(temporary.iterdir()) == []


def test_only_folders_of_parents_that_have_ended_are_removed(temporary: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    killed, living = (subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=environ) for _ in range(2))
    try:
        folders = []
        for process in (killed, living):
            assert process.stdout is not None
            folders.append(Path(process.stdout.readline().strip()))
        other = temporary / "tandem-of-somebody"
        other.mkdir()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert folders[0].exists()
        with open_run_folder() as folder:
            assert set(temporary.iterdir()) == {folder, folders[1], other}
    finally:
        for process in (killed, living):
            process.kill()
            process.communicate()


def test_a_long_path_gives_way_to_a_short_one_in_which_sockets_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with open_run_folder() as folder:
        assert folder.parent == Path("/tmp")
        with Listener(str(folder / "events.sock"), "AF_UNIX"):
            pass
    monkeypatch.setattr("launcher.host.run_folder._SHORT_PARENTS", ())
    with pytest.raises(ConfigError, match=r"its path has over 80 bytes.*set TMPDIR to one"), open_run_folder():
        pass


def test_without_a_usable_folder_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.gettempdir", find_none)
        with pytest.raises(ConfigError, match=r"No usable temporary directory found.*set TMPDIR to one"), open_run_folder():
            pass
    monkeypatch.setattr("tempfile.tempdir", "/proc/1")
    with pytest.raises(ConfigError, match="no usable folder for temporary files"), open_run_folder():
        pass
