"""Running ranks, for all commands: start the ranks of a job, or become one. Depends on no particular task, nor on typer."""

import resource
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.commands.opened_run import Run, find_log_dir
from launcher.commands.refusal import refusal
from launcher.host.core_claims import claim_cores
from launcher.host.cores import share_cores
from launcher.host.file_errors import as_run_failure, describe_os_error
from launcher.host.log_folder import open_log_folder
from launcher.job.job import DraftCheckpoint, Job
from launcher.job.memory_forecast import forecast_memory
from launcher.job.observer import RunObserver
from launcher.job.prefetch import prefetch
from launcher.job.tasks import Bench
from launcher.rendezvous.nodes import Nodes
from launcher.reporting.console import WorkConsole
from launcher.settings.precedence import first_not_none
from launcher.supervision.spawn import spawn_ranks
from launcher.supervision.verdict import RanksFailedError
from model.backends.device_types import is_host_memory
from model.checkpoint.fingerprint import Fingerprint, check_unchanged, read_fingerprint, read_state
from model.checkpoint.formats import open_checkpoint
from model.spec.config import build_config
from model.spec.scheme import read_scheme
from parallel.errors import ConfigError, RunError

DEFAULT_MAX_RESTARTS = 1
_DESCRIPTORS, _RANK_DESCRIPTORS = 32, 4
"""Minimum number of file descriptors and processes a run uses, per run and per rank."""


def run_job(run: Run, job: Job, observer: RunObserver) -> int:
    """Start the ranks, or become a rank that a launcher started; returns the number of restarts.

    Raises RanksFailedError if ranks failed, after writing the verdict; StoppedError on SIGTERM and SIGINT.
    """
    _check_descriptors(job.world_size)
    environment = run.environment
    is_first = not (environment.rank if environment.is_rank else run.nodes.node_rank)
    folder = open_log_folder(find_log_dir(run.options, run.settings), is_first=is_first, can_move=not environment.is_rank)
    with folder as log_dir, as_run_failure():
        if environment.is_rank:
            from launcher.supervision.foreign_launchers import join_ranks

            refusal.end()
            join_ranks(environment, job, log_dir, observer)
            return environment.restart_count
        observer.use_log_folder(log_dir)
        return _spawn(run, job, log_dir, observer)


def _spawn(run: Run, job: Job, log_dir: Path, observer: RunObserver) -> int:
    options, own = run.options, run.settings.tandem
    if warning := forecast_memory(job, partial(run.plan_ranks, job), run.nodes.local_workers):
        print(f"warning: {warning}", file=sys.stderr)
    for opened in [run.opened, *([] if run.draft is None else [run.draft.opened])]:
        prefetch(opened.source, opened.config, opened.scheme, run.nodes.local_ranks(run.world_size), run.world_size)
    max_restarts = first_not_none(options.max_restarts, own.max_restarts, DEFAULT_MAX_RESTARTS)

    def tell(number: int, cause: str, at_seconds: float, reloading: Sequence[int]) -> None:
        observer.note_failure(cause, at_seconds)
        if not isinstance(job.task, Bench):  # a Bench keeps nothing from a failed attempt
            check_unchanged(job.fingerprint, partial(_read_again, job))
            if job.draft is not None:
                check_unchanged(job.draft.fingerprint, partial(_read_again, job.draft))
            for adapter, folder in zip(job.adapters, run.adapters.values(), strict=True):
                check_unchanged(adapter.fingerprint, partial(read_state, folder))
        print(f"{cause}; restart {number} of {max_restarts}: {_say_reloading(reloading, run.nodes)} {observer.redone}", file=sys.stderr)

    try:
        with _claim_cores(run, job) as cores:
            return spawn_ranks(replace(job, cores=cores), run.nodes, log_dir, max_restarts, observer, tell, run.starter)
    except RanksFailedError as error:
        try:
            error.verdict.write(log_dir)
        except OSError as fault:  # a full disk must not hide the original failure
            print(f"warning: the verdict was not written: {describe_os_error(fault)}", file=sys.stderr)
        raise


def _claim_cores(run: Run, job: Job) -> AbstractContextManager[tuple[tuple[int, ...], ...] | None]:
    """Claim the cores that the ranks of this host compute on; see `claim_cores`."""
    if not is_host_memory(job.device):
        return nullcontext()
    threads = job.threads_per_rank or share_cores(run.nodes.local_workers)
    return claim_cores(run.nodes.local_workers, threads, may_bind=job.bind_cores is None)


def _say_reloading(ranks: Sequence[int], nodes: Nodes) -> str:
    """Return the beginning of what happens after a restart; the ranks that do not reload have kept their weights."""
    if len(ranks) == nodes.local_workers:
        return "all ranks reload and"
    if len(ranks) == 1:
        return f"rank {ranks[0]} reloads, then all"
    return f"ranks {', '.join(map(str, ranks))} reload, then all"


def _check_descriptors(world_size: int) -> None:
    """Raise ConfigError if the open-file limit is so low that libtorch would abort the process without a message."""
    limit, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], _DESCRIPTORS + _RANK_DESCRIPTORS * world_size
    if limit not in (resource.RLIM_INFINITY, -1) and limit < needed:
        raise ConfigError(f"the limit of open files is {limit}, but {world_size} rank(s) need at least {needed}: raise it with ulimit -n")


def _read_again(job: Job | DraftCheckpoint) -> Fingerprint:
    """Return the fingerprint of what a restart would load."""
    source = open_checkpoint(Path(job.checkpoint), job.opening)
    return read_fingerprint(source, build_config(source.config), read_scheme(source.config))


def run_to_result(run: Run, job: Job, what: str, redone: str) -> dict[str, Any] | None:
    """Run a job that yields one result, showing its progress as `what`. Returns None on a launcher's ranks above 0.

    See RunObserver for `redone`. Raises the errors of `run_job`, and RunError if the ranks report that there is no result.
    """
    console = WorkConsole(run.world_size, what, redone)
    try:
        run_job(run, job, console)
    finally:
        console.close()
    if console.failure is not None:
        raise RunError(console.failure)
    assert run.environment.rank or console.result is not None
    return None if run.environment.rank else console.result
