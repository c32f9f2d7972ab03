"""Two runs never write to the same place: the second is told who has it, and a holder that dies gives it up."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from launcher.host.log_folder import open_log_folder
from launcher.host.path_lock import PathInUseError, hold
from launcher.reporting.results import hold_results
from parallel.errors import ConfigError, RequestError

HOLD = """
import sys, time
from pathlib import Path
from launcher.host.path_lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_by_another(path: Path) -> Iterator[subprocess.Popen[str]]:
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True, env=environ)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_second_is_told_who_holds_it_and_a_killed_holder_gives_it_up(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with held_by_another(path) as other:
        with pytest.raises(PathInUseError, match=f"process {other.pid} on {os.uname().nodename}"), hold(path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert [one.name for one in tmp_path.iterdir()] == [".results.jsonl.lock"], "left by the killed one"
    with hold(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_and_its_target_are_the_same_place(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    with hold(tmp_path / "link"), pytest.raises(PathInUseError), hold(tmp_path / "file"):
        pass


def test_parents_are_made_and_removed_when_nothing_came_into_them(tmp_path: Path) -> None:
    with hold(tmp_path / "a" / "b" / "file"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "a" / "b" / "file"):
        (tmp_path / "a" / "b" / "file").write_text("x")
    assert (tmp_path / "a" / "b" / "file").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.ftruncate", fail)
    with pytest.raises(OSError) as failed, hold(tmp_path / "a" / "file"):
        pass
    assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, str(tmp_path / "a" / ".file.lock"))
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".file.lock").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic links"), hold(tmp_path / "file"):
        pass
    assert (tmp_path / "precious").read_text() == "x"


def test_names_as_long_as_may_be_can_be_held(tmp_path: Path) -> None:
    with hold(tmp_path / ("x" * 255)), pytest.raises(PathInUseError), hold(tmp_path / ("x" * 255)):
        pass


def test_many_threads_hold_it_one_at_a_time(tmp_path: Path) -> None:
    path, inside, most, entered = tmp_path / "file", [0], [0], [0]

    def work() -> None:
        while entered[0] < 300:
            try:
                with hold(path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    entered[0] += 1
                    inside[0] -= 1
            except PathInUseError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    before = len(os.listdir("/proc/self/fd"))
    with hold(tmp_path / "file"):
        pass
    assert capsys.readouterr().err == f"warning: {tmp_path} has no file locks: do not let two runs write there\n"
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_runs_with_one_output_are_refused_with_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with held_by_another(path) as other, pytest.raises(RequestError) as refused, hold_results(path):
        pass
    assert str(refused.value) == (f"--output {path} is in use by process {other.pid} on {os.uname().nodename}; give each run another file")
    with hold_results(Path("/dev/null")), hold_results(Path("/dev/null")):
        pass


def test_a_named_log_folder_is_of_one_run_and_the_default_one_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        found = [stack.enter_context(open_log_folder(None, is_first=True, can_move=True)) for _ in range(3)]
        assert found == [tmp_path / "output" / name for name in ("log", "log-2", "log-3")]
        lines = capsys.readouterr().err.splitlines()
        mine = f"{found[0]} is in use by process {os.getpid()} on {os.uname().nodename}; logs go to"
        assert lines == [f"{mine} {found[1]}", f"{mine} {found[2]}"]
        for named, can_move in ((Path("output/log"), True), (None, False)):
            with pytest.raises(ConfigError, match=r"^--log-dir .*/output/log is in use by process \d+ on"):
                stack.enter_context(open_log_folder(named, is_first=True, can_move=can_move))
        # Other processes of the same run share it.
        assert stack.enter_context(open_log_folder(None, is_first=False, can_move=False)) == found[0]
    with open_log_folder(None, is_first=True, can_move=True) as folder:
        assert folder == found[0] and folder.stat().st_mode & 0o777 == 0o700


def test_a_shared_folder_keeps_its_mode(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    with open_log_folder(shared, is_first=True, can_move=True):
        assert shared.stat().st_mode & 0o7777 == 0o1777
