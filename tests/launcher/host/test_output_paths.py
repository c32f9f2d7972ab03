"""Every form of OSError on a user's path is one sentence: exit code 2 before anything has started, 1 once a run has."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.host.file_errors import as_run_failure, describe_os_error
from launcher.host.output_paths import check_output_file, check_output_folder
from launcher.reporting.results import Record, ResultsFile
from parallel.errors import ConfigError, RunError

ERRNOS = [
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE),
    *(errno.ENFILE, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EBUSY, errno.ETXTBSY, errno.ESTALE, errno.EFBIG),
    *(errno.EINVAL, errno.ENODEV, errno.ENOMEM, errno.EEXIST, errno.ETIMEDOUT),
]
NAMES = [errno.errorcode[number] for number in ERRNOS]
CONFIG = """{"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
"vocab_size": 32}"""


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int, int], None]:
    """Has `os.open` fail below a folder: (folder, errno, a bit of the flags with which it fails)."""
    real = os.open

    def install(folder: Path, number: int, flag: int) -> None:
        def fake(path: Any, flags: int, *more: Any, **options: Any) -> int:
            if isinstance(path, (str, Path)) and Path(path).is_relative_to(folder) and flags & flag == flag:
                raise OSError(number, os.strerror(number), str(path))
            return real(path, flags, *more, **options)

        monkeypatch.setattr("os.open", fake)

    return install


@pytest.fixture
def tandem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs a command in this process: (exit code, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)  # the handlers of this process stay
    for name in [name for name in os.environ if name.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "MS_"))]:
        monkeypatch.delenv(name)

    def run(*arguments: str | Path) -> tuple[int, str]:
        from launcher.cli.main import main

        monkeypatch.setattr(sys, "argv", ["tandem", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize("number", ERRNOS, ids=NAMES)
def test_a_folder_that_cannot_be_written_is_found_before_the_start(
    tandem: Callable[..., tuple[int, str]], fail: Callable[[Path, int, int], None], tmp_path: Path, number: int
) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / "out").mkdir()
    fail(tmp_path / "out", number, os.O_CREAT)
    code, message = tandem("plan", "--model-config", "config.json", "--svg", "out/plan.svg")
    assert code == 2
    reason = "no file can be created there" if number == errno.ENOENT else os.strerror(number)
    assert message.startswith(f"tandem: --svg cannot be written: {tmp_path / 'out'}: {reason}") and message.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("number", ERRNOS, ids=NAMES)
def test_an_input_that_cannot_be_read_is_a_sentence(
    tandem: Callable[..., tuple[int, str]], fail: Callable[[Path, int, int], None], tmp_path: Path, number: int
) -> None:
    for name in ("config.json", "config.yaml"):
        (tmp_path / name).write_text(CONFIG)
    fail(Path("."), number, 0)
    for option, name in (("--model-config", "config.json"), ("-c", "config.yaml")):
        code, message = tandem("plan", option, name)
        reason = "does not exist" if number in (errno.ENOENT, errno.ENOTDIR) else f"cannot be read: {os.strerror(number)}"
        assert code == 2 and message.startswith(f"tandem: {name} ") and message.count("\n") == 1
        assert reason in message or os.strerror(number) in message


@pytest.mark.parametrize("number", ERRNOS, ids=NAMES)
def test_what_fails_while_a_run_goes_on_is_a_failure_of_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int) -> None:
    def fake(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fake)
    record = Record(index=0, prompt="a", prompt_token_ids=(1,), token_ids=(2,), text="b", finish_reason="length")
    with pytest.raises(RunError) as failed:
        ResultsFile(tmp_path / "results.jsonl").append(record)
    assert str(failed.value).startswith(f"{tmp_path / 'results.jsonl'}: {os.strerror(number)}")
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("number", ERRNOS, ids=NAMES)
def test_an_oserror_that_nobody_expected_is_a_sentence_too(
    tandem: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fake(*_: object) -> None:
        raise OSError(number, os.strerror(number), b"\xff/file")

    monkeypatch.setattr("launcher.commands.env.read_environment", fake)
    code, message = tandem("env")
    assert code == 2 and message.startswith(f"tandem: \\xff/file: {os.strerror(number)}") and message.count("\n") == 1


def test_a_full_disk_says_what_to_do() -> None:
    assert describe_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b")) == (
        "a/b: No space left on device; free some space, or choose another place"
    )
    assert describe_os_error(OSError(errno.EIO, os.strerror(errno.EIO)), Path("c")) == "c: Input/output error"
    assert describe_os_error(OSError("only words")) == "only words"


def test_other_errors_pass_through_a_run() -> None:
    with pytest.raises(KeyError), as_run_failure():
        raise KeyError


def test_what_can_be_written_is_not_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("far/file")
    for name in ("file", "link", "new", "far/new/file", "ä" * 100, "a" * 255):
        check_output_file("--output", tmp_path / name)
    for name in ("new", "far/new", "."):
        check_output_folder("--log-dir", tmp_path / name)
    for device in ("/dev/null", "/dev/full", "/dev/stdout"):
        check_output_file("--output", Path(device))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "x"


UNUSABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "folder": (lambda folder: folder, "it is a folder, but a file is needed"),
    "below a file": (lambda folder: _write(folder / "x") / "y", "Not a directory"),
    "circle": (lambda folder: _link(folder / "x"), "Too many levels of symbolic links"),
    "below a circle": (lambda folder: _link(folder / "x") / "y", "Too many levels of symbolic links"),
    "long name": (lambda folder: folder / ("x" * 256), "File name too long"),
    "long folder": (lambda folder: folder / ("x" * 256) / "y", "File name too long"),
    "long path": (lambda folder: folder.joinpath(*["x" * 200] * 30), "File name too long"),
    "proc": (lambda folder: Path("/proc/plan.svg"), "no file can be created there"),
    "null byte": (lambda folder: folder / "a\0b", "a path cannot hold a null byte"),
}


def _write(path: Path) -> Path:
    path.write_text("x")
    return path


def _link(path: Path) -> Path:
    path.symlink_to(path)
    return path


@pytest.mark.parametrize("kind", UNUSABLE)
def test_paths_that_can_never_be_files_are_refused(tmp_path: Path, kind: str) -> None:
    make, reason = UNUSABLE[kind]
    with pytest.raises(ConfigError) as refused:
        check_output_file("--stats", make(tmp_path))
    assert str(refused.value).startswith("--stats cannot be written: ") and reason in str(refused.value)


def test_another_user_may_not_write_and_is_told_before_the_start(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    folder = Path("/tmp") / f"tandem-test-{os.getpid()}"
    folder.mkdir(mode=0o755)
    try:
        (folder / "file").write_text("x")
        (folder / "secret").mkdir(mode=0o700)
        code = "import os, sys; from pathlib import Path; from launcher.host.output_paths import check_output_file, check_output_folder\n"
        code += "os.setgid(65534); os.setuid(65534)\n"
        code += "for path in sys.argv[1:]:\n"
        code += "  for check in (check_output_file, check_output_folder):\n"
        code += "    try: check('--x', Path(path))\n    except ValueError as error: print(error)\n"
        paths = [folder / "file", folder / "new" / "file", folder / "secret" / "file"]
        found = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=60)
        assert found.stdout.splitlines() == [
            f"--x cannot be written: {folder / 'file'}: it is not writable",
            f"--x cannot be written: {folder / 'file'}: it is not a folder",
            *[f"--x cannot be written: {folder}: Permission denied"] * 2,
            *[f"--x cannot be written: {folder / 'secret' / 'file'}: Permission denied"] * 2,
        ], found.stderr
    finally:
        for path in (folder / "file", folder / "secret"):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()
