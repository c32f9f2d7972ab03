"""`tandem run`: starts N ranks that execute a user's program, with logs and a verdict."""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.commands.begun_starter import take_starter
from launcher.environment.detection import decide_world_size, read_environment
from launcher.host.file_errors import as_run_failure, describe_os_error
from launcher.host.log_folder import check_log_folder, open_log_folder
from launcher.job.job import Job
from launcher.job.messages import Event, Printed, RankWarning
from launcher.job.observer import RunObserver
from launcher.job.tasks import Program
from launcher.rendezvous.nodes import Nodes
from launcher.settings.options import MAX_SECONDS
from launcher.settings.program_options import ProgramOptions
from launcher.supervision.spawn import spawn_ranks
from launcher.supervision.verdict import RanksFailedError
from model.checkpoint.fingerprint import Fingerprint
from model.checkpoint.formats import OpenOptions
from model.spec.config import DEFAULT_BLOCK_SIZE


def run(options: ProgramOptions) -> None:
    """Run the program on every rank. Raises InputError before anything starts, RanksFailedError, StoppedError."""
    task = _plan_program(options)
    check_log_folder(options.log_dir)
    job = _build_job(task, decide_world_size(options.workers, read_environment(), None))
    console = ProgramConsole()

    def tell(number: int, cause: str, at_seconds: float, restarted: Sequence[int]) -> None:
        print(f"{cause}; restart {number} of {options.max_restarts}: all ranks run the program again", file=sys.stderr)

    with open_log_folder(options.log_dir, is_first=True, can_move=True) as log_dir, as_run_failure():
        try:
            spawn_ranks(job, Nodes(local_workers=job.world_size), log_dir, options.max_restarts, console, tell, take_starter())
        except RanksFailedError as error:
            try:
                error.verdict.write(log_dir)
            except OSError as fault:  # a full disk must not hide the original failure
                print(f"warning: the verdict was not written: {describe_os_error(fault)}", file=sys.stderr)
            raise


class ProgramConsole(RunObserver):
    """Prints what rank 0 prints."""

    redone = "run the program again"

    def on_event(self, event: Event) -> None:
        """Take one event of rank 0."""
        match event:
            case Printed():
                sys.stdout.flush()
                sys.stdout.buffer.write(event.text.encode("utf-8", "surrogateescape"))
                sys.stdout.buffer.flush()
            case RankWarning():
                print(f"warning: {event.message}", file=sys.stderr)

    def ask_to_stop(self, number: int) -> float | None:
        """Stop at once: a program has no current token to finish."""
        return 0.0


def _plan_program(options: ProgramOptions) -> Program:
    script, *arguments = options.words if options.module is None else ("", *options.words)
    return Program(
        script=script,
        module=options.module or "",
        arguments=tuple(arguments),
        folder=os.getcwd(),
        timeout_seconds=options.timeout_seconds,
    )


def _build_job(task: Program, world_size: int) -> Job:
    """Return the job of ranks that have no model of tandem's: the program loads its own."""
    content = hashlib.sha256(Path(task.script).read_bytes()).hexdigest()[:16] if task.script else ""
    return Job(
        checkpoint=task.script or task.module,
        opening=OpenOptions(),
        fingerprint=Fingerprint(content, "", {}),
        kv_cache=None,
        world_size=world_size,
        context_tokens=0,
        eos_token_ids=(),
        pad_token_id=None,
        dtype="float32",
        device="cpu",
        collectives="auto",
        threads_per_rank=None,
        cpu_kernels="auto",
        bind_cores=False,
        timeout_seconds=float(MAX_SECONDS),  # a program may compute for as long as it likes between two steps of its model
        max_batch_size=1,
        block_size=DEFAULT_BLOCK_SIZE,
        num_blocks=None,
        prefix_cache=False,
        speculate=False,
        task=task,
    )
