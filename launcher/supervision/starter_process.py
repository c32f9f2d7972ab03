"""The process that starts the ranks of a run: it imports PyTorch and the rank's code once, and forks every rank from that state.

It has a single thread, no device and no OpenMP team, so that a forked rank is like one in a new interpreter. It is the parent of the ranks:
they die with it, and it dies with the launcher. It reports their ends in order. Arguments: PARENT_PID DESCRIPTOR preload|fresh.
"""

import gc
import json
import os
import random
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from launcher.supervision.device_probe import write_devices
from launcher.supervision.rank_process import RankOrder, end_with_parent, name_process, run_order, start_code

PROBES = {b"look at devices": False, b"check devices": True}
"""Orders to look at the host's devices instead of starting a rank, and whether the self-check runs."""
_MAX_MESSAGE_BYTES = 1 << 16


def main() -> None:
    """Start ranks until the launcher closes the connection."""
    end_with_parent(int(sys.argv[1]))
    line = socket.socket(fileno=int(sys.argv[2]))
    name_process("tandem starter")
    _Starter(line, forks=sys.argv[3] == "preload" and _preload()).serve()


def _preload() -> bool:
    """Import the modules of a rank; returns whether ranks can be forked from here."""
    gc.disable()  # no garbage is worth a collection during the imports, of which it would take a tenth
    try:
        import launcher.supervision.spawned_rank  # noqa: F401
    except Exception:  # a rank that tries again reports it
        return False
    finally:
        gc.enable()
    # The first fork ends the threads of libraries that handle forks, as OpenBLAS does. Others would be missing in the ranks.
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    gc.collect()
    gc.freeze()  # a collection in a rank would copy the pages that it shares
    return len(os.listdir("/proc/self/task")) == 1


class _Starter:
    def __init__(self, line: socket.socket, *, forks: bool) -> None:
        self._line, self._forks, self._pid = line, forks, os.getpid()
        self._pids: dict[int, int] = {}

    def serve(self) -> None:
        """Handle orders and the ends of ranks. Kills what is left when the launcher has closed the connection."""
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poll.poll()]
            ended = [descriptor for descriptor in ready if descriptor in self._pids]
            for descriptor in ended:
                poll.unregister(descriptor)
            # Ranks that ended since the last look are told together: of two, the first may have been the cause of the second.
            if ended:
                self._send({"ended": [self._reap(descriptor) for descriptor in ended]})
            if self._line.fileno() in ready:
                try:
                    data, descriptors, _, _ = socket.recv_fds(self._line, _MAX_MESSAGE_BYTES, 1)
                except ConnectionResetError:
                    data = b""
                if not data:
                    break
                if data in PROBES:
                    self._send({"probed": self._probe(descriptors[0], checks=PROBES[data])})
                elif (started := self._start(data.decode(), descriptors[0])) is not None:
                    poll.register(started, select.POLLIN)
                os.close(descriptors[0])
        for descriptor in list(self._pids):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            self._reap(descriptor)

    def _start(self, order: str, log: int) -> int | None:
        """Start a rank whose standard error is `log`; returns its pidfd."""
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError as error:
            self._send({"failed": f"a rank cannot be started: {error.strerror}"})
            return None
        if pid == 0:
            self._become_rank(order, log)
        descriptor = os.pidfd_open(pid)
        self._pids[descriptor] = pid
        socket.send_fds(self._line, [json.dumps({"started": pid}).encode()], [descriptor])
        return descriptor

    def _probe(self, file: int, *, checks: bool) -> int:
        """Write the facts about the devices to `file`, in a process of its own; returns its exit code."""
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        code = 1
        try:
            end_with_parent(self._pid)
            if not self._forks:
                os.set_inheritable(file, True)
                os.execv(sys.executable, [sys.executable, "-c", start_code("device_probe"), str(file), "check" if checks else "look"])
            write_devices(file, checks=checks)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _become_rank(self, order: str, log: int) -> NoReturn:
        code = 1
        try:
            end_with_parent(self._pid)
            os.setsid()
            self._line.close()
            for descriptor in self._pids:
                os.close(descriptor)
            _take_over_log(log)
            if not self._forks:
                os.execv(sys.executable, [sys.executable, "-c", start_code("rank_process"), order, str(self._pid)])
            _reseed()
            run_order(RankOrder.from_json(order))
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stderr.flush()
            os._exit(code)

    def _reap(self, descriptor: int) -> dict[str, int | None]:
        pid = self._pids.pop(descriptor)
        _, status = os.waitpid(pid, 0)
        os.close(descriptor)
        code = os.waitstatus_to_exitcode(status)
        return {"pid": pid, "exit_code": code if code >= 0 else None, "signal": -code if code < 0 else None}

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # the launcher has gone, and this process is about to
            self._line.send(json.dumps(message).encode())


def _take_over_log(log: int) -> None:
    """Make `log` the standard error, beginning with what the imports wrote."""
    written = b""
    with suppress(OSError):
        written = os.pread(2, _MAX_MESSAGE_BYTES, 0)
    os.dup2(log, 2)
    os.close(log)
    os.write(2, written)


def _reseed() -> None:
    """Seed global generators from the system's, as the imports of a new interpreter do."""
    random.seed()
    sys.modules["torch"].default_generator.seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
