"""Entry point of a rank started by tandem's own parent, with two arguments: FOLDER PARENT_PID.

Ties the process to its parent before the import of PyTorch, which takes seconds; the rank is in `launcher/supervision/spawned_rank.py`.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

JOB_FILE = "job.json"
SOCKET_FILE = "events.sock"
BOARD_FILE = "board"
_PR_SET_PDEATHSIG = 1
_OOM_SCORE = 500
"""Added to the OOM score, in thousandths of memory, so that the OOM killer kills a rank and the parent survives to report it."""
_MAX_OOM_SCORE = 1000


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent exits; exit now if it already has."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def prefer_for_oom_killer(path: Path = Path("/proc/self/oom_score_adj")) -> None:
    """Make the OOM killer prefer this process over its parent. Raising the score needs no privilege."""
    with suppress(OSError, ValueError):  # sandboxes may lack /proc or forbid the write
        path.write_text(str(min(int(path.read_text()) + _OOM_SCORE, _MAX_OOM_SCORE)))


def main() -> None:
    """Run this rank until it exits."""
    end_with_parent(int(sys.argv[2]))
    prefer_for_oom_killer()
    from launcher.supervision.spawned_rank import run_spawned_rank

    run_spawned_rank(Path(sys.argv[1]))
