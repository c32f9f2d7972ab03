"""Sandbox process for chat templates (untrusted programs from the checkpoint), with limits on time, memory and output size.

Started on first use, then reused; killed if a template does not terminate. Exits with its parent.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.text.chat_template import MAX_CHARACTERS, ChatTemplate
from parallel.errors import CheckpointError, InputError, RequestError

_KINDS: dict[str, type[InputError]] = {kind.__name__: kind for kind in (CheckpointError, RequestError)}
_HEAD = struct.Struct("!Q")
_START_SECONDS = 60.0
"""Startup timeout; startup takes 0.2 s on an idle machine."""
_PR_SET_PDEATHSIG = 1
_START = "import sys; sys.path[:] = sys.argv[5:]; from launcher.server.template_process import main; main(*map(int, sys.argv[1:5]))"
"""Not `-m`, which would search the current directory for the package first."""


class TemplateProcess:
    """Client of the template process. Not thread-safe."""

    def __init__(
        self,
        *,
        seconds: float = 5.0,
        wall_seconds: float = 15.0,
        memory_bytes: int = 128_000_000,
        max_characters: int = MAX_CHARACTERS,
    ) -> None:
        """`seconds` limits the CPU time of a call and `wall_seconds` its duration; `memory_bytes` is in addition to the interpreter's own
        memory."""
        self._seconds, self._wall_seconds = seconds, wall_seconds
        self._memory_bytes, self._max_characters = memory_bytes, max_characters
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._is_closed = False

    def check(self, source: str, where: str) -> None:
        """Raise CheckpointError if a template cannot be compiled within the limits."""
        try:
            self._call({"source": source, "where": where})
        except RequestError as error:
            raise CheckpointError(str(error)) from None

    def render(self, source: str, where: str, variables: Mapping[str, Any]) -> str:
        """Render a template. Raises RequestError if it fails or exceeds a limit, CheckpointError if it cannot be compiled."""
        return self._call({"source": source, "where": where, "variables": variables})

    def close(self) -> None:
        """Kill the process, even if it is busy; concurrent and later calls fail."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        process, connection = self._process, self._socket
        self._process = self._socket = None
        if process is not None and connection is not None:
            process.kill()
            process.wait()
            connection.close()

    def _call(self, request: Mapping[str, Any]) -> str:
        where = request["where"]
        payload = json.dumps(request).encode()
        for is_last in (False, True):
            connection = self._start(where)
            try:
                connection.settimeout(self._wall_seconds)
                _send(connection, payload)
                answer = json.loads(_receive(connection, time.monotonic() + self._wall_seconds))
                break
            except TimeoutError:
                self._end()
                raise RequestError(f"the chat template of {where} took longer than {self._wall_seconds:g} s") from None
            except OSError:
                status = self._find_end()
                if status == -signal.SIGPROF:
                    raise RequestError(f"the chat template of {where} took more than {self._seconds:g} s of processor time") from None
                # It may have been killed while idle, by PDEATHSIG when the thread that started it exited or from outside: retry once.
                if is_last:
                    raise RequestError(
                        f"the chat template of {where} ended its process (status {status}): it may need too much memory"
                    ) from None
        if "text" in answer:
            return str(answer["text"])
        if answer.get("ends"):
            self._find_end()
        raise _KINDS[answer["kind"]](answer["error"])

    def _find_end(self) -> int | None:
        process = self._process
        if process is not None:
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                pass
        self._end()
        return None if process is None else process.returncode

    def _start(self, where: str) -> socket.socket:
        if self._socket is not None:
            return self._socket
        if self._is_closed:
            raise RequestError("the server is shutting down")
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                root = str(Path(__file__).resolve().parents[2])
                limits = (os.getpid(), int(self._seconds * 1e6), self._memory_bytes, self._max_characters)
                arguments = [*map(str, limits), root, *map(os.path.abspath, sys.path)]
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _START, *arguments],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                )
        except OSError as error:
            raise RequestError(f"the chat template of {where} cannot be run now: {error.strerror}") from None
        self._socket = ours
        try:
            _receive(ours, time.monotonic() + _START_SECONDS)
        except OSError:
            status = self._find_end()
            raise RequestError(f"the chat template of {where} cannot be run now: its process did not start (status {status})") from None
        return ours


def main(parent: int, microseconds: int, memory_bytes: int, max_characters: int) -> None:
    """Serve the parent until it exits or a limit is reached."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has already exited
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ChatTemplate("", "").render({})  # import everything before memory is limited
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + memory_bytes
    for limit, value in ((resource.RLIMIT_AS, most), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (value, value))
    templates: dict[str, ChatTemplate] = {}
    with socket.socket(fileno=0) as connection:
        _send(connection, b"")
        while True:
            try:
                request = _receive(connection, None)
            except OSError:
                return
            # The kernel terminates a template that runs too long, whatever Python is executing.
            signal.setitimer(signal.ITIMER_PROF, microseconds / 1e6)
            answer = _answer(request, templates, max_characters)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(connection, json.dumps(answer).encode())
            if "ends" in answer:
                return


def _answer(request: bytes, templates: dict[str, ChatTemplate], max_characters: int) -> dict[str, Any]:
    where = "this checkpoint"
    try:
        values = json.loads(request)
        source, where, variables = values["source"], values["where"], values.get("variables")
        if source not in templates:
            templates[source] = ChatTemplate(source, where)
        return {"text": "" if variables is None else templates[source].render(variables, max_characters)}
    except InputError as error:
        # The interpreter's state is unreliable after it ran out of memory.
        ends = {"ends": True} if "too much memory" in str(error) else {}
        return {"kind": type(error).__name__, "error": str(error), **ends}
    except MemoryError:
        return {"kind": "RequestError", "error": f"the chat template of {where} needs too much memory", "ends": True}
    except RecursionError:
        return {"kind": "RequestError", "error": "the conversation is nested too deeply for a chat template"}


def _send(connection: socket.socket, payload: bytes) -> None:
    connection.sendall(_HEAD.pack(len(payload)))
    connection.sendall(payload)


def _receive(connection: socket.socket, deadline: float | None) -> bytes:
    """Receive one message. Raises TimeoutError, and ConnectionError if the peer has exited."""
    (length,) = _HEAD.unpack(_receive_exactly(connection, _HEAD.size, deadline))
    return _receive_exactly(connection, length, deadline)


def _receive_exactly(connection: socket.socket, length: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        if deadline is not None:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise ConnectionError("the other side has ended")
        parts += part
    return bytes(parts)
