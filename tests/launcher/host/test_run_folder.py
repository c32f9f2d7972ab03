"""The folder of a run: private, gone at the end, and removed later when its parent was killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.host.run_folder import open_run_folder

HOLD = """
import time
from launcher.host.run_folder import open_run_folder

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
