"""A rank started by tandem's own parent: reads the job from the run's folder, and reports through the socket and the board in it."""

import faulthandler
import os
import signal
import sys
import traceback
from multiprocessing.connection import Client
from pathlib import Path

from torch.distributed.distributed_c10d import PrefixStore

from launcher.environment.detection import read_environment
from launcher.job.codec import read_command, read_job, write
from launcher.job.messages import Command, Event
from launcher.rendezvous.key_value_store import connect_store
from launcher.rendezvous.placement import find_alone, meet
from launcher.supervision.rank_failure import RankFailure
from launcher.supervision.rank_process import BOARD_FILE, JOB_FILE, SOCKET_FILE
from launcher.supervision.rank_watch import STACK_SIGNAL, error_file, stack_file
from launcher.worker.rank import Emit, StopRequested
from launcher.worker.run import run_rank
from launcher.worker.service import Inbox
from parallel.progress import Progress, ProgressBoard

_SLACK_SECONDS = 15.0
"""Extra time a rank waits for a peer, so that the parent, which can identify the culprit, times out first."""


def _silent(event: Event) -> None:
    """Ranks above 0 report nothing."""


def _hear_nothing(wait_seconds: float) -> list[Command]:
    """Only rank 0 receives commands."""
    return []


def _connect_to_parent(folder: Path) -> tuple[Emit, Inbox]:
    connection = Client(str(folder / SOCKET_FILE), "AF_UNIX")

    def emit(event: Event) -> None:
        connection.send_bytes(write(event).encode())

    def receive(wait_seconds: float) -> list[Command]:
        commands: list[Command] = []
        while connection.poll(0.0 if commands else wait_seconds):
            commands.append(read_command(connection.recv_bytes()))
        return commands

    return emit, receive


def run_spawned_rank(folder: Path) -> None:
    """Run this rank until it exits."""
    os.dup2(2, 1)  # standard error is the log file; results are sent through the socket
    environment = read_environment()
    rank, local_rank, world_size = environment.rank, environment.local_rank, environment.world_size
    assert rank is not None and local_rank is not None and world_size is not None and environment.local_world_size is not None
    attempt = environment.restart_count
    with stack_file(folder, attempt, local_rank).open("w") as stack:
        faulthandler.enable(stack)
        faulthandler.register(STACK_SIGNAL, stack)
        progress = Progress(ProgressBoard(folder / BOARD_FILE, environment.local_world_size).line(local_rank))
        job = read_job((folder / JOB_FILE).read_text(encoding="utf-8"))
        try:
            if world_size == 1:
                seat, store = find_alone(), None
            else:
                address, port = environment.master_addr, environment.master_port
                assert address is not None and port is not None
                wait_seconds = job.timeout_seconds + _SLACK_SECONDS
                store = PrefixStore(f"tandem/ranks_{attempt}", connect_store(address, port, wait_seconds))
                seat = meet(store, rank, world_size, address, {}, wait_seconds)  # the nodes have already compared their runs
            emit, inbox = _connect_to_parent(folder) if rank == 0 else (_silent, _hear_nothing)
            run_rank(job, seat, store, progress, emit, inbox, wait_seconds=job.timeout_seconds + _SLACK_SECONDS)
        except StopRequested:
            signal.pause()  # the parent has its results and kills all ranks
        except BaseException as error:
            traceback.print_exc()
            RankFailure.of(error).write(error_file(folder, attempt, local_rank))
            sys.stderr.flush()
            # Skip the interpreter's slow shutdown: peers and parent are waiting for this exit.
            os._exit(1)
