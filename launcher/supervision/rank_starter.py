"""The launcher's side of the process that starts the ranks (`launcher/supervision/starter_process.py`)."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import finalize

from launcher.job.device_facts import DeviceFacts
from launcher.supervision.rank_process import RankOrder, start_code
from parallel.errors import ConfigError, RunError

_MAX_MESSAGE_BYTES = 1 << 16
_CLOSE_SECONDS = 5.0
_PROBE_SECONDS = 120.0
_LOOK_SECONDS = 0.05
_TAIL_LINES = 12


@dataclass(frozen=True, slots=True)
class RankHandle:
    """A rank that has been started."""

    pid: int
    descriptor: int
    """Its pidfd, which the owner closes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnd:
    """How a rank's process ended."""

    pid: int
    exit_code: int | None
    """None if it was terminated by a signal."""
    signal: int | None
    """The signal that terminated it."""


class StarterEndedError(RunError):
    """The process that starts the ranks ended before its time; its ranks were killed with it."""

    def __init__(self, end: RankEnd, words: str) -> None:
        how = signal.Signals(end.signal).name if end.signal else f"exit code {end.exit_code}"
        super().__init__(f"the process that starts the ranks ended with {how}")
        self.end = end
        self.words = words
        """The last lines it wrote."""


class RankStarter:
    """Starts the process, which imports PyTorch in the meantime. The calling thread has to outlive it. Raises OSError."""

    def __init__(self, *, preload: bool = True) -> None:
        """Without `preload`, every rank is a new interpreter."""
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stderr = os.memfd_create("tandem starter")
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", start_code("starter_process")),
                    *(str(os.getpid()), str(theirs.fileno()), "preload" if preload else "fresh"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._ends: list[RankEnd] = []
        self.preload, self.pid = preload, self._process.pid
        self._started: list[int] = []
        self._finalize = finalize(self, _end, self._line, self._process, self._stderr, self._started)
        self._finalize.atexit = False  # the kernel ends it with this process; a fork of this process must not

    def start(self, order: RankOrder, log: Path, check: Callable[[], None] = lambda: None) -> RankHandle:
        """Start a rank that writes its standard error to `log`. `check` is called while the process still imports, and may raise.

        Raises StarterEndedError, and OSError if the log cannot be opened.
        """
        with log.open("w") as file:
            try:
                socket.send_fds(self._line, [order.to_json().encode()], [file.fileno()])
            except OSError:
                raise self._describe_end() from None
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        while True:
            while not poll.poll(_LOOK_SECONDS * 1000):
                check()
            message, descriptors = self._receive()
            if "started" in message:
                self._started.append(message["started"])
                return RankHandle(message["started"], descriptors[0])
            if "failed" in message:
                raise RunError(message["failed"])

    def probe_devices(self, *, checks: bool) -> DeviceFacts:
        """Return the facts about this host's devices. `checks`: with the self-check of their backend.

        Raises StarterEndedError, ConfigError if the devices cannot be used, and RunError if their driver hangs.
        """
        file = os.memfd_create("devices")
        try:
            try:
                socket.send_fds(self._line, [b"check devices" if checks else b"look at devices"], [file])
            except OSError:
                raise self._describe_end() from None
            self._line.settimeout(_PROBE_SECONDS)
            try:
                message, _ = self._receive()
            except TimeoutError:
                raise RunError(f"the driver of the devices has not answered within {_PROBE_SECONDS:g} s: use --device cpu") from None
            finally:
                self._line.settimeout(None)
            found = os.pread(file, _MAX_MESSAGE_BYTES, 0).decode()
            if message["probed"]:
                reason = found or f"the process that looked at them ended with code {message['probed']}"
                raise ConfigError(f"the devices of this host cannot be used ({reason})")
            return DeviceFacts.from_json(found)
        finally:
            os.close(file)

    def wait(self, seconds: float) -> Sequence[RankEnd]:
        """Return the ranks that have ended since the last call, and wait up to `seconds` for the first. Raises StarterEndedError."""
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        while poll.poll(0 if self._ends else seconds * 1000):
            self._receive()
            seconds = 0
        ends, self._ends = self._ends, []
        return ends

    def close(self) -> None:
        """End the process and every rank that is left."""
        self._finalize()

    def _receive(self) -> tuple[dict, list[int]]:  # type: ignore[type-arg]
        try:
            data, descriptors, _, _ = socket.recv_fds(self._line, _MAX_MESSAGE_BYTES, 1)
        except ConnectionResetError:
            data, descriptors = b"", []
        if not data:
            raise self._describe_end()
        message = json.loads(data)
        self._ends += [RankEnd(**end) for end in message.get("ended", ())]
        return message, descriptors

    def _describe_end(self) -> StarterEndedError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        code = self._process.poll() or 0
        end = RankEnd(pid=self.pid, exit_code=code if code >= 0 else None, signal=-code if code < 0 else None)
        words = os.pread(self._stderr, _MAX_MESSAGE_BYTES, 0).decode(errors="replace")
        return StarterEndedError(end, "\n".join(words.splitlines()[-_TAIL_LINES:]))


def _end(line: socket.socket, process: "subprocess.Popen[bytes]", stderr: int, started: list[int]) -> None:
    line.close()
    if not started:
        process.kill()  # it may still be importing
    # The process kills its ranks before it exits; where it cannot, the kernel kills them with it.
    try:
        process.wait(_CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    os.close(stderr)
