"""The program of a rank that our own parent started: `python -m launcher.rank_process FOLDER`.

Reads the job from FOLDER, reports to the parent through the socket in it, and ends with the parent.
"""

import ctypes
import json
import os
import signal
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Client
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from launcher.environment import LaunchEnvironment, read_environment
from launcher.job import Job
from launcher.worker import Emit, run_rank
from parallel.errors import PeerError

JOB_FILE = "job.json"
SOCKET_FILE = "events.sock"
_PR_SET_PDEATHSIG = 1
_SECONDS_FOR_THE_CULPRIT = 3.0


def waiting_file(attempt: int, rank: int) -> str:
    """Where a rank that another one's failure ends leaves the name of the operation that it was in."""
    return f"waiting_{attempt}_{rank}"


def join_store(environment: LaunchEnvironment, timeout_seconds: float) -> Store | None:
    """The key-value store of the ranks, as the launcher's environment names it; None for a single rank."""
    rank, world_size = environment.rank, environment.world_size
    assert rank is not None and world_size is not None
    if world_size == 1:
        return None
    timeout = timedelta(seconds=timeout_seconds)
    store: Store = next(rendezvous("env://", rank, world_size, timeout=timeout))[0]
    store.set_timeout(timeout)
    # The agent's store outlives a restart; what the ranks of an earlier attempt left in it must not be found.
    return PrefixStore(f"tandem/attempt_{environment.restart_count}", store)


def _silent(event: dict[str, Any]) -> None:
    """Ranks above 0 report nothing."""


def _connect_to_parent(folder: Path) -> Emit:
    connection = Client(str(folder / SOCKET_FILE), "AF_UNIX")

    def emit(event: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(event).encode())

    emit({"event": "start"})
    return emit


def _leave(note: Path, frame: FrameType | None) -> None:
    """End as SIGTERM does, but leave behind the outermost collective, or else the innermost function, that was running."""
    names = []
    while frame is not None:
        names.append((Path(frame.f_code.co_filename).parent.name, frame.f_code.co_name))
        frame = frame.f_back
    collectives = [name for folder, name in names if folder == "parallel"]
    if not note.exists():
        note.write_text(collectives[-1] if collectives else names[0][1], encoding="utf-8")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


@record
def main() -> None:
    """Run this rank to its end."""
    os.dup2(2, 1)  # standard error is the log file; results go through the socket
    # A parent that is killed cannot stop its ranks; the kernel does.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    folder = Path(sys.argv[1])
    environment = read_environment()
    assert environment.rank is not None and environment.local_rank is not None
    rank = environment.rank
    note = folder / waiting_file(environment.restart_count, rank)
    signal.signal(signal.SIGTERM, lambda number, frame: _leave(note, frame))
    job = Job.from_json((folder / JOB_FILE).read_text(encoding="utf-8"))
    store = join_store(environment, job.timeout_seconds)
    emit = _connect_to_parent(folder) if rank == 0 else _silent
    try:
        run_rank(job, rank, environment.local_rank, environment.local_world_size or job.world_size, store, emit)
    except PeerError as error:
        note.write_text(error.operation, encoding="utf-8")
        # The agent shall see the rank that failed first, not this one; it ends this one when it has.
        time.sleep(_SECONDS_FOR_THE_CULPRIT)
        raise


if __name__ == "__main__":
    main()
