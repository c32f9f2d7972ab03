"""A process that has imported the launcher, and that forks for each command: tests pay once for what the parent of a command imports.

A fork has what a new process would have: arguments, environment (in /proc too), current folder, standard streams, signal handlers. The
process that starts its ranks is forked from the command for the same reason. A sitecustomize.py that a test has put in front of PYTHONPATH
runs in both, and what it replaces is replaced wherever it has been imported by name. Commands that show how the program itself starts are
not run here.

As a module this is the tests' side; as a program, with the descriptor of a socket, it is the host.
"""

import ctypes
import gc
import os
import pickle
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar, NoReturn

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
ENTRY = (sys.executable, "-m", "launcher")
_ROOM = "TANDEM_TEST_ROOM"
_ROOM_BYTES = 100_000
"""Room for the variables of a command where /proc shows those of the host; the kernel takes at most 128 KiB for one variable."""
_READ_AT_START = ("PYTHON", "LD_", "LC_", "LANG", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "HF_", "MALLOC_", "GLIBC_")
"""Variables that the interpreter and libraries read when they are loaded."""
_NO_THREADS = {"OPENBLAS_NUM_THREADS": "1"}
"""NumPy would start threads when it is imported; a process that forks must have none."""
_HELD_BACK = (signal.SIGINT, signal.SIGTERM)
_CLONE_NEWNET = 0x40000000


class HostedProcess:
    """A forked command, used like a `subprocess.Popen` with text streams."""

    stdin = None

    def __init__(self, args: Sequence[str], pid: int, status: int, stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        """`status` is a pipe that gives the exit code when the process has ended."""
        self.args, self.pid, self.stdout, self.stderr = args, pid, stdout, stderr
        self.returncode: int | None = None
        self._status = status
        self._readers: list[threading.Thread] = []
        self._texts = {1: "", 2: ""}

    def poll(self) -> int | None:
        """The exit code, or the negated signal; None while it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both outputs to their ends and wait. After subprocess.TimeoutExpired, another call goes on."""
        end = None if timeout is None else time.monotonic() + timeout
        if not self._readers:
            for number, stream in ((1, self.stdout), (2, self.stderr)):
                if stream is not None and not stream.closed:
                    self._readers.append(threading.Thread(target=self._read, args=(number, stream), daemon=True))
                    self._readers[-1].start()
        for reader in self._readers:
            reader.join(None if end is None else max(0, end - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if end is None else max(0, end - time.monotonic()))
        return self._texts[1], self._texts[2]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is not None:
            return self.returncode
        waiting = select.poll()  # select() takes no descriptors above 1023
        waiting.register(self._status, select.POLLIN)
        if waiting.poll(None if timeout is None else int(timeout * 1000)):
            told = os.read(self._status, 64)
            assert told, "the command host has ended"
            self.returncode = int(told)
            os.close(self._status)
        return self.returncode

    def _read(self, number: int, stream: IO[str]) -> None:
        with stream:
            self._texts[number] = stream.read()


class CommandHost:
    """The tests' side. The host is started when it is first needed."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: what commands have without variables of their own."""
        self._at_start = _pick(environment)
        self._path = environment.get("PATH", os.defpath)
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def takes(self, command: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Whether a command is `python -m launcher`, and has the variables with which the host was started, but for a planted file."""
        found = _pick(environment)
        if self._find_plant(environment) is not None:
            found["PYTHONPATH"] = self._at_start["PYTHONPATH"]
        return tuple(command[:3]) == ENTRY and found == self._at_start

    def _find_plant(self, environment: Mapping[str, str]) -> Path | None:
        """The sitecustomize.py of a folder in front of the PYTHONPATH of the host."""
        folder, _, others = environment.get("PYTHONPATH", "").partition(os.pathsep)
        file = Path(folder, "sitecustomize.py")
        return file if others == self._at_start.get("PYTHONPATH") and file.is_file() else None

    def start(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: Path,
        stdin: int,
        stderr: int | None = None,
        network: Path | None = None,
    ) -> HostedProcess:
        """Start a command. Without a descriptor for standard error it goes into a pipe, as standard output does.

        `network`: the file of the network namespace that it is to run in, instead of that of the tests.
        """
        connection = self._socket or self._launch()
        stdout_read, stdout = os.pipe()
        stderr_read, stderr_written = os.pipe() if stderr is None else (None, os.dup(stderr))
        status, status_written = os.pipe()
        request = os.memfd_create("request")
        asked = {"command": list(command), "environment": dict(environment), "cwd": str(cwd), "network": network}
        os.write(request, pickle.dumps({**asked, "plant": self._find_plant(environment)}))
        given = (stdout, stderr_written, status_written, request)
        socket.send_fds(connection, [b"."], [stdin, *given])
        for descriptor in given:
            os.close(descriptor)
        pid = int(connection.recv(64))
        errors = None if stderr_read is None else open(stderr_read, encoding="utf-8")
        return HostedProcess(command, pid, status, open(stdout_read, encoding="utf-8"), errors)

    def close(self) -> None:
        """End the host. Commands that still run are left alone."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait(60)
            self._socket = self._process = None

    def _launch(self) -> socket.socket:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**self._at_start, **_NO_THREADS, "PATH": self._path, _ROOM: "." * _ROOM_BYTES},
                pass_fds=[theirs.fileno()],
            )
        return self._socket


def _pick(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)}


class _Host:
    """The host's side: forks, and tells how the forks have ended."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.getenv.restype = ctypes.c_void_p
        self._room: int = self._libc.getenv(_ROOM.encode())
        self._interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
        self._selector = selectors.PollSelector()
        self._selector.register(connection, selectors.EVENT_READ)

    def serve(self) -> list[str] | None:
        """In a fork, return its command; in the host, None when the tests' side has gone."""
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._tell_end(key.fd, *key.data)
                    continue
                said, descriptors, _, _ = socket.recv_fds(self._connection, 1, 5)
                if not said:
                    return None
                if command := self._fork(descriptors):
                    return command

    def _fork(self, descriptors: list[int]) -> list[str] | None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)  # until the fork handles them as a new process does
        pid = os.fork()
        if not pid:
            return self._become(descriptors)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
        *others, status, request = descriptors
        for descriptor in (*others, request):
            os.close(descriptor)
        self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, status))
        self._connection.send(str(pid).encode())
        return None

    def _tell_end(self, ended: int, pid: int, status: int) -> None:
        self._selector.unregister(ended)
        os.close(ended)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            os.write(status, str(code).encode())
        except BrokenPipeError:  # nobody asks any more
            pass
        os.close(status)

    def _become(self, descriptors: list[int]) -> list[str]:
        """Make this fork what a new process would be; returns its command."""
        *streams, _, request = descriptors
        with open(request, "rb") as file:
            file.seek(0)
            asked: dict[str, Any] = pickle.load(file)
        for target, descriptor in enumerate(streams):
            os.dup2(descriptor, target)
        self._connection.detach()
        os.closerange(3, 1 + max(int(name) for name in os.listdir("/proc/self/fd")))
        os.chdir(asked["cwd"])
        if asked["network"] is not None:
            self._enter(asked["network"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        block = b"\0" + b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in asked["environment"].items())
        assert len(block) <= _ROOM_BYTES, "the variables of a command need more room"
        ctypes.memmove(self._room, block.ljust(_ROOM_BYTES, b"\0"), _ROOM_BYTES)
        signal.signal(signal.SIGINT, self._interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
        sys.orig_argv = asked["command"]
        if asked["plant"] is not None:
            sys.path.insert(0, str(asked["plant"].parent))
            _run_plant(asked["plant"])
            _ForkedStarter.plant = asked["plant"]
        return sys.orig_argv

    def _enter(self, network: Path) -> None:
        with open(network, "rb") as file:
            if self._libc.setns(file.fileno(), _CLONE_NEWNET):  # os.setns() came with Python 3.12
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(network))


class _ForkedStarter:
    """The process that starts the ranks, forked from the command; used like the `subprocess.Popen` that it stands for."""

    plant: ClassVar[Path | None] = None

    def __init__(self, command: Sequence[str], *, stderr: int, pass_fds: Sequence[int], **others: object) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run(command, stderr, pass_fds[0])

    def poll(self) -> int | None:
        """The exit code, or the negated signal; None while it runs."""
        if self.returncode is None and (status := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(status[1])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("starter", timeout or 0)
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _run(self, command: Sequence[str], stderr: int, line: int) -> NoReturn:
        """Make this fork what a new interpreter would be, and start ranks."""
        code = 1
        try:
            gc.freeze()  # what the command has open is closed here, and not once more when an object goes
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDWR)
            for target, descriptor in enumerate((nothing, nothing, stderr)):
                os.dup2(descriptor, target)
            os.closerange(3, line)
            os.closerange(line + 1, 1 + max(int(name) for name in os.listdir("/proc/self/fd")))
            for number in signal.valid_signals():
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
            sys.argv, sys.orig_argv = ["-c", *command[3:]], list(command)
            if self.plant is not None:
                _run_plant(self.plant)
            from launcher.supervision.starter_process import main

            main()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def _start_starter(command: Sequence[str], **options: Any) -> "_ForkedStarter | subprocess.Popen[bytes]":
    return _ForkedStarter(command, **options) if command[-1] == "preload" else subprocess.Popen(command, **options)


def _run_plant(file: Path) -> None:
    """Run a sitecustomize.py. Functions that it replaces in a module are replaced in those too that have imported them by name."""
    modules = [vars(module) for name, module in sys.modules.items() if name.partition(".")[0] in ("launcher", "model", "parallel")]
    before = [dict(module) for module in modules]
    exec(compile(file.read_text(), file, "exec"), {"__name__": "sitecustomize", "__file__": str(file)})
    new = {id(old): now[name] for was, now in zip(before, modules, strict=True) for name, old in was.items() if now[name] is not old}
    for was, now in zip(before, modules, strict=True):
        now.update({name: new[id(old)] for name, old in was.items() if id(old) in new})


def _import_commands() -> None:
    """Import what commands import; nothing may have started a thread."""
    import importlib
    import pkgutil

    import launcher.cli.main
    import launcher.commands

    for module in pkgutil.iter_modules(launcher.commands.__path__):
        importlib.import_module(f"launcher.commands.{module.name}")
    importlib.import_module("launcher.supervision.spawned_rank")
    starter = importlib.import_module("launcher.supervision.rank_starter")
    starter.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": _start_starter})  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/task")) == 1, "a thread runs, which no fork would have"
    # What is collected is not copied into each fork.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    _import_commands()
    command = _Host(socket.socket(fileno=int(sys.argv[1]))).serve()
    if command is not None:
        import runpy
        import tempfile

        tempfile.tempdir = None  # another TMPDIR may hold now
        sys.argv = [str(PROJECT_ROOT / "launcher" / "__main__.py"), *command[3:]]
        runpy.run_module("launcher", run_name="__main__", alter_sys=True)
