"""What every command that runs ranks shares: open the checkpoint, decide the job, start the ranks or be one of them.

Everything that can be wrong is found here, before any process starts. Knows no typer, and no task.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from launcher.environment.detection import LaunchEnvironment, decide_world_size, read_environment
from launcher.job.job import Job
from launcher.job.memory_forecast import forecast_memory
from launcher.job.observer import RunObserver
from launcher.job.prefetch import read_ahead
from launcher.job.tasks import Task
from launcher.rendezvous.msrun_scheduler import serve_ranks
from launcher.rendezvous.nodes import Nodes, plan_nodes
from launcher.reporting.console import ByteProgress, WorkConsole
from launcher.settings.options import CheckpointOptions, RunOptions
from launcher.settings.yaml_settings import Settings, open_settings
from launcher.supervision.foreign_launchers import join_ranks
from launcher.supervision.spawn import spawn_ranks
from launcher.supervision.verdict import RanksFailedError
from launcher.worker.collectives import shared_memory_works
from model.backends.registry import DEVICE_TYPES, find_backend
from model.checkpoint.formats import OpenOptions, open_checkpoint
from model.checkpoint.source import CheckpointSource
from model.checkpoint.verification import require_intact
from model.decoder.loading import check_checkpoint
from model.spec.config import DEFAULT_BLOCK_SIZE, DTYPES, LlamaConfig, build_config, check_blocks
from model.spec.scheme import Scheme, read_scheme
from model.text.tokenizer import Tokenizer, read_tokenizer
from parallel.errors import ConfigError

DEFAULT_LOG_DIR = "output/log"
DEFAULT_TIMEOUT_SECONDS = 300.0
DEFAULT_MAX_RESTARTS = 1
COLLECTIVES = ("auto", "shm", "gloo", "nccl")
DEVICES = ("auto", *DEVICE_TYPES)


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint whose headers fit its config and the YAML."""

    source: CheckpointSource
    config: LlamaConfig
    scheme: Scheme
    opening: OpenOptions
    """How it was opened."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is about to be planned."""

    options: RunOptions
    settings: Settings
    environment: LaunchEnvironment
    world_size: int
    nodes: Nodes
    """What this node starts, where it starts ranks."""
    opened: OpenedModel

    @property
    def context_tokens(self) -> int:
        """Longest sequence: the checkpoint's, or less where the YAML says so."""
        longest = self.opened.config.max_position_embeddings
        return min(longest, self.settings.seq_length or longest)

    def read_tokenizer(self) -> Tokenizer:
        """The tokenizer of the YAML, else the checkpoint's."""
        if self.settings.vocab_file:
            return read_tokenizer(Path(self.settings.vocab_file))
        return read_tokenizer(self.opened.source.tokenizer_path() or self.opened.source.path)


def open_run(options: RunOptions, *, quantized: bool = True, opener: Callable[[Settings], OpenedModel] | None = None) -> Run:
    """Read everything that a run is decided from. Raises InputError. For `quantized` see `open_model`; `opener` stands in for it.

    A process that is msrun's scheduler does not return: it serves the ranks and exits.
    """
    environment = read_environment()
    if environment.is_scheduler:
        sys.exit(serve_ranks(environment, options.timeout_seconds or DEFAULT_TIMEOUT_SECONDS))
    if options.num_nodes or options.local_workers:
        # Who says what each node starts has had srun or mpirun start one such command a node: it is no rank.
        environment = environment.as_program()
    settings = open_settings(options.config)
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    world_size = decide_world_size(options.workers, environment, settings.model_parallel)
    nodes = Nodes() if environment.is_rank else _plan_nodes(options, world_size)
    opened = opener(settings) if opener else open_model(options, settings, quantized=quantized)
    if options.verify and not opened.source.checksums:
        print(f"warning: no checksums are recorded of {opened.source.path}: its headers and sizes were checked", file=sys.stderr)
    opened.config.layout().check(world_size)
    return Run(options, settings, environment, world_size, nodes, opened)


def plan_opening(options: CheckpointOptions, settings: Settings) -> OpenOptions:
    """How the checkpoint is to be opened."""
    key_file = str(options.key_file.absolute()) if options.key_file else None
    return OpenOptions(format=options.format, key_file=key_file, values=settings.build_model_values())


def find_checkpoint(option: Path | None, settings: Settings) -> Path:
    """The checkpoint of the command line, else the YAML's. Raises ConfigError when neither names one."""
    path = option or settings.load_checkpoint
    if not path:
        raise ConfigError("no checkpoint: give --checkpoint")
    return Path(path)


def open_model(options: CheckpointOptions, settings: Settings, *, quantized: bool = True) -> OpenedModel:
    """Open a checkpoint and hold it against its own config.json, the YAML and, where asked, its checksums. Raises InputError.

    `quantized`: whether the YAML's quantization_config describes this checkpoint, and not one still to be made.
    """
    path = find_checkpoint(options.checkpoint, settings)
    opening = plan_opening(options, settings)
    source = open_checkpoint(path, opening)
    config, scheme = build_config(source.config, str(source.path / "config.json")), read_scheme(source.config)
    settings.compare_model_config(config, str(path))
    if quantized and settings.quantization is not None:
        settings.quantization.check_scheme(scheme, str(path), settings.source)
    check_checkpoint(source, config, scheme)
    if options.verify:
        require_intact(source, ByteProgress("verifying"))
    return OpenedModel(source, config, scheme, opening)


def build_job(run: Run, task: Task, *, dtype: str | None = None) -> Job:
    """Fill in every decision. Options go over the YAML, the YAML over defaults. Raises InputError.

    `dtype`: what to compute in where neither says so; None takes the YAML's compute_dtype, else the checkpoint's.
    """
    options, settings, config = run.options, run.settings, run.opened.config
    own, said_ids = settings.tandem, settings.model_values
    job = Job(
        checkpoint=str(run.opened.source.path.absolute()),
        opening=run.opened.opening,
        kv_cache=settings.decide_cache(options.kv_cache_dtype, run.opened.scheme),
        world_size=run.world_size,
        context_tokens=run.context_tokens,
        # Ids that the YAML names go over the checkpoint's, as in MindFormers.
        eos_token_ids=(said_ids["eos_token_id"],) if "eos_token_id" in said_ids else config.eos_token_ids,
        pad_token_id=said_ids.get("pad_token_id", config.pad_token_id),
        dtype=_one_of("dtype", first_said(options.dtype, dtype, own.dtype, settings.compute_dtype, config.dtype), tuple(DTYPES)),
        device=_choose_device(_one_of("device", first_said(options.device, own.device, "auto"), DEVICES)),
        collectives=_one_of("collectives", first_said(options.collectives, own.collectives, "auto"), COLLECTIVES),
        threads_per_rank=first_said(options.threads_per_rank, own.threads_per_rank),
        bind_cores=_parse_flag("--bind-cores", options.bind_cores),
        timeout_seconds=first_said(options.timeout_seconds, own.timeout_seconds, DEFAULT_TIMEOUT_SECONDS),
        max_batch_size=first_said(options.max_batch_size, own.max_batch_size),
        block_size=first_said(options.block_size, settings.block_size, DEFAULT_BLOCK_SIZE),
        num_blocks=first_said(options.num_blocks, settings.num_blocks),
        prefix_cache=first_said(options.prefix_cache, own.prefix_cache, True),
        speculate=first_said(options.speculate, own.speculate, False),
        task=task,
    )
    for name in ("threads_per_rank", "max_batch_size", "timeout_seconds"):
        value = getattr(job, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}, but has to be above 0")
    check_blocks(job.block_size, job.num_blocks)
    if job.collectives == "shm" and (not find_backend(job.device).in_host_memory or not shared_memory_works()):
        raise ConfigError("collectives shm need CPU ranks on an x86-64 Linux; use --collectives gloo")
    if job.collectives == "shm" and run.nodes.num_nodes > 1:
        raise ConfigError(f"collectives shm work inside one node, but --nnodes is {run.nodes.num_nodes}; use --collectives auto")
    return job


def run_job(run: Run, job: Job, observer: RunObserver) -> int:
    """Start the ranks, or be one of those that a launcher started; give the number of restarts.

    Raises RanksFailedError when ranks failed; its verdict has been written. StoppedError on SIGTERM and SIGINT.
    """
    options, own, environment = run.options, run.settings.tandem, run.environment
    log_dir = Path(options.log_dir or own.log_dir or DEFAULT_LOG_DIR).absolute()
    if environment.is_rank:
        join_ranks(environment, job, log_dir, observer)
        return environment.restart_count
    opened = run.opened
    stored = {name: info.dtype_name for name, info in opened.source.tensors.items()}
    if warning := forecast_memory(job, opened.config, opened.scheme, stored, run.nodes.local_workers):
        print(f"warning: {warning}", file=sys.stderr)
    read_ahead(opened.source, opened.config, opened.scheme, run.nodes.local_ranks(run.world_size), run.world_size)
    max_restarts = first_said(options.max_restarts, own.max_restarts, DEFAULT_MAX_RESTARTS)

    def tell(number: int, cause: str, at_seconds: float) -> None:
        observer.note_failure(cause, at_seconds)
        print(f"{cause}; restart {number} of {max_restarts}: all ranks load again and {observer.redone}", file=sys.stderr)

    try:
        return spawn_ranks(job, run.nodes, log_dir, max_restarts, observer, tell)
    except RanksFailedError as error:
        error.verdict.write(log_dir)
        raise


def run_to_result(run: Run, job: Job, what: str, redone: str) -> dict[str, Any] | None:
    """Run a job that ends in one result, its progress shown as `what`; None on a rank above 0 that a launcher started.

    `redone`: see RunObserver. Raises what `run_job` raises.
    """
    console = WorkConsole(run.world_size, what, redone)
    try:
        run_job(run, job, console)
    finally:
        console.close()
    assert run.environment.rank or console.result is not None
    return None if run.environment.rank else console.result


def read_version() -> str:
    """Of this program."""
    with suppress(PackageNotFoundError):
        return version("tandem-launcher")
    return "not installed"


def _plan_nodes(options: RunOptions, world_size: int) -> Nodes:
    return plan_nodes(
        world_size,
        num_nodes=options.num_nodes,
        node_rank=options.node_rank,
        local_workers=options.local_workers,
        master_addr=options.master_addr,
        master_port=options.master_port,
    )


def _parse_flag(name: str, word: str | None) -> bool:
    flags = {None: False, "true": True, "false": False, "1": True, "0": False}
    found = flags.get(word.lower() if word else None)
    if found is None:
        raise ConfigError(f"{name} is {word!r}, but True or False is needed")
    return found


def first_said(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _choose_device(word: str) -> str:
    available = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if word == "auto":
        return available.type if available is not None else "cpu"
    if word != "cpu" and (available is None or available.type != word):
        raise ConfigError(f"device {word} is not here: PyTorch sees {available.type if available else 'cpu'} only; use --device auto")
    return word


def _one_of(name: str, value: str, words: tuple[str, ...]) -> str:
    if value not in words:
        raise ConfigError(f"{name} is {value!r}, but has to be one of {', '.join(words)}")
    return value
