"""Runs one rank: joins the others, executes its part of the task, and reports. Identical for ranks of our own parent and of torchrun."""

import time

import torch
from torch.distributed.distributed_c10d import Store

from launcher.host.cores import bind_cores, count_cores, share_cores
from launcher.job.job import Job
from launcher.rendezvous.placement import RankPlacement
from launcher.worker.collectives import connect
from launcher.worker.rank import Emit, Rank
from launcher.worker.service import Inbox
from launcher.worker.tasks import run_task
from model.backends.registry import find_backend
from parallel.progress import Progress, WatchedCollectives


def run_rank(
    job: Job, seat: RankPlacement, store: Store | None, progress: Progress, emit: Emit, inbox: Inbox, *, wait_seconds: float
) -> None:
    """Run `job` as the rank at `seat`. `emit` receives events on rank 0: progress, tokens, and the final result.

    `inbox` returns messages from the server. `wait_seconds` limits the wait for a peer that makes no progress. Raises StopRequested
    after the current token if asked to stop.
    """
    started = time.perf_counter()
    if job.bind_cores:
        bind_cores(seat.local_rank, len(seat.local_ranks))
        threads = job.threads_per_rank or count_cores()
    else:
        threads = job.threads_per_rank or (share_cores(len(seat.local_ranks)) if seat.shares_cores else count_cores())
    torch.set_num_threads(threads)
    device = find_backend(job.device).open_device(seat.local_rank)
    collectives = WatchedCollectives(connect(job, seat, store, wait_seconds), progress)
    me = Rank(job, collectives, device, threads, started, emit, inbox, progress, seat, store)
    run_task(me)
    collectives.barrier()
    collectives.close()
    progress.set_operation("done")
