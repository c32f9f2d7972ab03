"""Runs one rank: joins the others, executes its part of the task, and reports. Identical for ranks of our own parent and of torchrun."""

import time
from collections.abc import Sequence

import torch

from launcher.host.cores import bind_cores, count_cores, share_cores
from launcher.host.numa import prefer_own_node
from launcher.job.job import Job
from launcher.rendezvous.placement import RankPlacement
from launcher.worker.collectives import connect
from launcher.worker.rank import Emit, Kept, Rank
from launcher.worker.service import Inbox
from launcher.worker.tasks import run_task
from model.backends.registry import find_backend
from parallel.progress import Progress
from parallel.torch_internals import Store
from parallel.watched_collectives import WatchedCollectives


def run_rank(
    job: Job,
    seat: RankPlacement,
    store: Store | None,
    progress: Progress,
    emit: Emit,
    inbox: Inbox,
    *,
    wait_seconds: float,
    cores: Sequence[int] | None = None,
    kept: Kept | None = None,
) -> None:
    """Run `job` as the rank at `seat`. `emit` receives events on rank 0: progress, tokens, and the final result.

    `inbox` returns messages from the server. `wait_seconds` limits the wait for a peer that makes no progress. Raises StopRequested
    after the current token if asked to stop. `cores` are those to bind it to; None: as the job
    says. `kept` is what an earlier attempt in this process has left, and is filled for a later one.
    """
    started = time.perf_counter()
    kept = Kept() if kept is None else kept
    if kept.collectives is None:
        kept.threads = _take_cores(job, seat, cores)
    device = find_backend(job.device).open_device(seat.local_rank)
    peers = connect(job, seat, store, wait_seconds, device)
    if kept.collectives is None:
        kept.collectives = WatchedCollectives(peers, progress)
    else:
        kept.collectives.rejoin(peers)
    collectives = kept.collectives
    run_task(Rank(job, collectives, device, kept.threads, started, emit, inbox, progress, seat, store, kept))
    collectives.barrier()
    collectives.close()
    progress.set_operation("done")


def _take_cores(job: Job, seat: RankPlacement, cores: Sequence[int] | None) -> int:
    """Settle this rank's cores, and the memory near them, and return its number of threads."""
    if cores is not None or job.bind_cores:
        bind_cores(seat.local_rank, len(seat.local_ranks), cores)
        prefer_own_node()
        threads = job.threads_per_rank or count_cores()
    else:
        threads = job.threads_per_rank or (share_cores(len(seat.local_ranks)) if seat.shares_cores else count_cores())
    torch.set_num_threads(threads)
    return threads
