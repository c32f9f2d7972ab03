"""One rank's part of `tandem run`: executes the user's program in this process, as `python` would.

The program joins its ranks with `tandem.init`, or by loading a model. Standard output of rank 0 is the command's; that of the others goes
to their logs.
"""

import atexit
import os
import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.job.messages import Printed
from launcher.job.tasks import TANDEM_RUN, Program
from launcher.worker.rank import Emit, Rank
from launcher.worker.rank_group import RankGroup, set_group

_CHUNK_BYTES = 1 << 16


def run_program(me: Rank, task: Program) -> None:
    """Run the program to its end. Raises its exception, and SystemExit unless it exits with 0."""
    set_group(RankGroup(TANDEM_RUN, me.seat, me.store, task.timeout_seconds, me.progress))
    os.chdir(task.folder)
    sys.argv = [task.module or task.script, *task.arguments]
    with _forwarded_output(me.emit if me.seat.rank == 0 else None):
        try:
            if task.module:
                sys.path.insert(0, task.folder)
                runpy.run_module(task.module, run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, str(Path(task.script).resolve().parent))
                runpy.run_path(task.script, run_name="__main__")
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise
        _finish()


def _finish() -> None:
    """Do what the interpreter does at the end of a program, since a forked rank exits without it."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()


@contextmanager
def _forwarded_output(emit: Emit | None) -> Iterator[None]:
    """Send what the block and its child processes print to `emit` as well as to the log; None: to the log only."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    if emit is None:
        yield
        return
    reader, writer = os.pipe()
    log = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    thread = threading.Thread(target=_forward, args=(reader, log, emit), daemon=True, name="output")
    thread.start()
    try:
        yield
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()
        os.dup2(log, 1)  # closes the pipe, unless a child process of the program still has it
        thread.join(timeout=1.0)


def _forward(reader: int, log: int, emit: Emit) -> None:
    while chunk := os.read(reader, _CHUNK_BYTES):
        os.write(log, chunk)
        # Any bytes survive as text: the codec writes surrogates as escapes.
        emit(Printed(chunk.decode("utf-8", "surrogateescape")))
