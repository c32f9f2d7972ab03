"""`tandem run`: starts N ranks that execute a user's program, with logs and a verdict."""

import hashlib
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

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
from parallel.errors import ConfigError


def run(options: ProgramOptions) -> None:
    """Run the program on every rank. Raises InputError before anything starts, RanksFailedError, StoppedError."""
    environment = read_environment()
    if environment.is_rank or environment.is_scheduler:
        raise ConfigError(
            f"tandem run starts ranks, but {environment.launcher} started this process as one of several: run the program directly"
        )
    task = _plan_program(options)
    check_log_folder(options.log_dir)
    job = _build_job(task, decide_world_size(options.workers, environment, None))
    console = ProgramConsole()

    def tell(number: int, cause: str, at_seconds: float) -> None:
        print(f"{cause}; restart {number} of {options.max_restarts}: all ranks run the program again", file=sys.stderr)

    with open_log_folder(options.log_dir, is_first=True, can_move=True) as log_dir, as_run_failure():
        try:
            spawn_ranks(job, Nodes(local_workers=job.world_size), log_dir, options.max_restarts, console, tell)
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
    """Check that the program exists. Raises ConfigError."""
    folder, words = os.getcwd(), options.words
    if options.module is not None:
        top = options.module.partition(".")[0]
        if not options.module or PathFinder.find_spec(top, [folder, *sys.path]) is None:
            raise ConfigError(f"there is no module {options.module!r} in {folder} or among the installed packages")
        return Program(script="", module=options.module, arguments=words, folder=folder, timeout_seconds=options.timeout_seconds)
    if not words:
        raise ConfigError("no program: give a Python file, as in tandem run script.py --workers 2, or -m MODULE")
    path = Path(words[0])
    try:
        problem = None if path.is_file() else "is a folder, but a Python file is needed" if path.is_dir() else "does not exist"
    except OSError as error:
        problem = f"cannot be read: {describe_os_error(error)}"
    if problem is not None:
        raise ConfigError(f"the program {path} {problem}")
    return Program(script=words[0], module="", arguments=words[1:], folder=folder, timeout_seconds=options.timeout_seconds)


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
        bind_cores=False,
        timeout_seconds=float(MAX_SECONDS),  # a program may compute for as long as it likes between two steps of its model
        max_batch_size=1,
        block_size=DEFAULT_BLOCK_SIZE,
        num_blocks=None,
        prefix_cache=False,
        speculate=False,
        task=task,
    )
