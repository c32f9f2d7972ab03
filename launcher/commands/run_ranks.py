"""Running ranks, for all commands: read the inputs of a run, plan the job, start the ranks or become one.

All input errors are raised here, before any process starts. Depends on no particular task, nor on typer.
"""

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from launcher.commands.begun_starter import take_starter
from launcher.commands.device_memory import fit_blocks
from launcher.commands.devices import check_collectives, choose_device
from launcher.commands.draft_model import OpenedDraftModel, open_draft_model
from launcher.commands.opened_model import OpenedModel, open_adapters, open_model, read_tokenizer_of
from launcher.commands.preparation import plan_run_nodes, read_run_environment
from launcher.commands.refusal import refusal
from launcher.environment.detection import LaunchEnvironment, decide_world_size, read_cpu_kernels
from launcher.host.core_claims import claim_cores
from launcher.host.cores import share_cores
from launcher.host.file_errors import as_run_failure, describe_os_error
from launcher.host.log_folder import check_log_folder, open_log_folder
from launcher.host.shared_memory import shared_memory_works
from launcher.job.device_facts import DeviceFacts
from launcher.job.device_memory import DEFAULT_MEMORY_FRACTION
from launcher.job.job import Adapter, DraftCheckpoint, Job
from launcher.job.memory_forecast import forecast_memory
from launcher.job.observer import RunObserver
from launcher.job.prefetch import prefetch
from launcher.job.tasks import Bench, Quantize, Task
from launcher.rendezvous.nodes import Nodes
from launcher.reporting.console import WorkConsole
from launcher.settings.options import MAX_SECONDS, CollectivesName, CpuKernels, Device, EngineOptions, RunOptions
from launcher.settings.precedence import first_not_none
from launcher.settings.tokenizer_location import locate_tokenizer
from launcher.settings.yaml_settings import Settings, open_settings
from launcher.supervision.rank_starter import RankStarter
from launcher.supervision.spawn import spawn_ranks
from launcher.supervision.verdict import RanksFailedError
from model.backends.device_types import is_host_memory
from model.checkpoint.fingerprint import Fingerprint, check_unchanged, read_fingerprint, read_state
from model.checkpoint.formats import open_checkpoint
from model.checkpoint.lora_folder import LoraFolder
from model.draft_planning import add_draft_model
from model.engine.speculation import DEFAULT_DRAFT_TOKENS
from model.kernels.library import choose_kernels
from model.planning import RankPlan, Workload, plan_ranks
from model.spec.config import DEFAULT_BLOCK_SIZE, DTYPES, build_config, check_blocks
from model.spec.run_scheme import PRECISIONS
from model.spec.scheme import read_scheme
from model.text.end_of_text import decide_end_of_text
from model.text.tokenizer import Tokenizer
from parallel.errors import ConfigError, RunError

DEFAULT_TIMEOUT_SECONDS = 300.0
DEFAULT_MAX_RESTARTS = 1
_DESCRIPTORS, _RANK_DESCRIPTORS = 32, 4
"""Minimum number of file descriptors and processes a run uses, per run and per rank."""


@dataclass(frozen=True, slots=True)
class Run:
    """The inputs from which a job is planned."""

    options: RunOptions
    settings: Settings
    environment: LaunchEnvironment
    world_size: int
    nodes: Nodes
    """The nodes of the run, if tandem starts the ranks."""
    opened: OpenedModel
    adapters: Mapping[str, LoraFolder] = field(default_factory=dict)
    """The LoRA adapters by name."""
    draft: OpenedDraftModel | None = None
    """The draft model, if there is one."""
    starter: RankStarter | None = None
    """The process that starts the ranks, if tandem does; it imports PyTorch while this one reads and checks the input."""

    @property
    def num_local_ranks(self) -> int:
        """Number of ranks on this host, as far as known; all ranks if the launcher does not tell."""
        environment = self.environment
        return environment.local_world_size or self.world_size if environment.is_rank else self.nodes.local_workers

    @property
    def context_tokens(self) -> int:
        """Maximum sequence length: the checkpoint's, or a lower limit from the YAML."""
        longest = self.opened.config.max_position_embeddings
        return min(longest, self.settings.seq_length or longest)

    def read_devices(self, checks: bool) -> DeviceFacts:
        """Look at the devices of this host, or of this rank if a launcher started it. `checks`: with the self-check of their backend.

        Raises ConfigError if they cannot be used.
        """
        if self.starter is not None:
            return self.starter.probe_devices(checks=checks)
        from launcher.supervision.device_probe import read_devices

        try:
            return read_devices(self.environment.local_rank or 0, checks=checks)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"the devices of this host cannot be used ({type(error).__name__}: {reason})") from None

    def read_tokenizer(self) -> Tokenizer:
        """Read the tokenizer of the YAML, otherwise the checkpoint's.

        Raises ConfigError if there is none, or if the YAML names one that does not exist; CheckpointError if its ids do not match the
        model.
        """
        source = self.opened.source
        path = locate_tokenizer(self.settings, source.tokenizer_path())
        if path is None and source.path.suffix != ".gguf":
            place = "in" if source.path.is_dir() else "next to"
            raise ConfigError(
                f"no tokenizer: neither tokenizer.model nor tokenizer.json is {place} {source.path}; put one there, or name it as "
                "processor.tokenizer.vocab_file in the YAML"
            )
        return read_tokenizer_of(path or source.path, self.opened.config, self.settings)

    def plan_ranks(self, job: Job, workload: Workload) -> list[RankPlan]:
        """Plan the ranks' parts of the model and its draft model."""
        opened = self.opened
        stored = {name: info.form for name, info in opened.source.tensors.items()}
        updates = [folder.updates for folder in self.adapters.values()]
        scheme = job.plan_scheme(opened.config, opened.scheme)
        plans = plan_ranks(opened.config, scheme, self.world_size, workload, stored, updates)
        if self.draft is None:
            return plans
        return add_draft_model(plans, self.draft.plan(self.world_size, workload, self.options.kv_cache_dtype))

    @property
    def tokenizer_path(self) -> Path:
        """Folder or file of the tokenizer; the checkpoint itself if there is none. Raises the errors of `locate_tokenizer`."""
        source = self.opened.source
        return locate_tokenizer(self.settings, source.tokenizer_path()) or source.path


def open_run(options: RunOptions, *, quantized: bool = True, opener: Callable[[Settings], OpenedModel] | None = None) -> Run:
    """Read all inputs of a run. Raises InputError. See `open_model` for `quantized`; `opener` replaces it.

    Does not return in msrun's scheduler process, which serves the ranks and exits.
    """
    environment = read_run_environment(options)
    if environment.is_scheduler:
        from launcher.rendezvous.msrun_scheduler import serve_ranks  # with PyTorch

        sys.exit(serve_ranks(environment, _decide_join_seconds(options, environment) or DEFAULT_TIMEOUT_SECONDS))
    if environment.is_rank:
        import launcher.supervision.foreign_launchers  # noqa: F401  # with PyTorch, which comes before the native kernels
    starter = None if environment.is_rank else take_starter(preload=options.preload)
    try:
        return replace(_open_run(options, environment, opener or partial(open_model, options, quantized=quantized)), starter=starter)
    except BaseException:
        if starter is not None:
            starter.close()
        raise


def _open_run(options: RunOptions, environment: LaunchEnvironment, opener: Callable[[Settings], OpenedModel]) -> Run:
    settings = _override(open_settings(options.config, options.checkpoint), options)
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    check_log_folder(_find_log_dir(options, settings))
    world_size = decide_world_size(options.workers, environment, settings.model_parallel)
    nodes = Nodes() if environment.is_rank else plan_run_nodes(options, world_size)
    opened = opener(settings)
    if options.verify and not opened.source.checksums:
        print(f"warning: no checksums are recorded for {opened.source.path}: only headers and sizes were checked", file=sys.stderr)
    opened.config.layout().check(world_size)
    adapters = open_adapters(options.lora, opened, follow_links=options.follow_links) if isinstance(options, EngineOptions) else {}
    run = Run(options, settings, environment, world_size, nodes, opened, adapters)
    if options.draft_model is None:
        return run
    draft = open_draft_model(options, Path(options.draft_model), world_size)
    draft.check_vocabulary(run.read_tokenizer())
    return replace(run, draft=draft)


def _override(settings: Settings, options: RunOptions) -> Settings:
    """Return the YAML's settings with those that run_mindformer.py has options for."""
    return replace(
        settings,
        vocab_file=str(options.vocab_file) if options.vocab_file else settings.vocab_file,
        seq_length=first_not_none(options.seq_length, settings.seq_length),
    )


def build_job(run: Run, task: Task, *, dtype: str | None = None, tokenizer: Tokenizer | None = None) -> Job:
    """Resolve every setting. Options override the YAML, which overrides defaults. Raises InputError.

    `dtype` is the compute dtype if neither specifies one; None uses the YAML's compute_dtype, otherwise the checkpoint's. `tokenizer` is
    that of `Run.read_tokenizer`, for tasks whose answers end at its stop tokens.
    """
    options, settings, config = run.options, run.settings, run.opened.config
    own, yaml_ids = settings.tandem, settings.model_values
    tokenizer_path = run.tokenizer_path if tokenizer is not None else None
    end = decide_end_of_text(
        run.opened.source, config.vocab_size, named=yaml_ids.get("eos_token_id"), tokenizer=tokenizer, tokenizer_path=tokenizer_path
    )
    if tokenizer is not None and not run.environment.rank:
        for warning in end.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    ranks_per_device = first_not_none(options.ranks_per_device, own.ranks_per_device, 1)
    device = choose_device(
        _one_of("device", first_not_none(options.device, own.device, "auto"), get_args(Device)),
        run.environment,
        run.num_local_ranks,
        ranks_per_device,
        run.read_devices,
    )
    fraction = first_not_none(options.memory_fraction, own.memory_fraction, DEFAULT_MEMORY_FRACTION)
    if not 0 < fraction <= 1:
        raise ConfigError(f"memory_fraction is {fraction}, but has to be above 0 and at most 1")
    job = Job(
        checkpoint=str(run.opened.source.path.absolute()),
        opening=run.opened.opening,
        fingerprint=read_fingerprint(run.opened.source, config, run.opened.scheme),
        kv_cache=settings.decide_cache(options.kv_cache_dtype, run.opened.scheme),
        activations=_decide_precision("activations", options.activations, own.activations, task),
        lm_head=_decide_precision("lm-head", options.lm_head, own.lm_head, task),
        world_size=run.world_size,
        context_tokens=run.context_tokens,
        eos_token_ids=end.ids,
        pad_token_id=yaml_ids.get("pad_token_id", config.pad_token_id),
        dtype=_one_of("dtype", first_not_none(options.dtype, dtype, own.dtype, settings.compute_dtype, config.dtype), tuple(DTYPES)),
        device=device.kind,
        ranks_per_device=ranks_per_device,
        collectives=_one_of("collectives", first_not_none(options.collectives, own.collectives, "auto"), get_args(CollectivesName)),
        threads_per_rank=first_not_none(options.threads_per_rank, own.threads_per_rank),
        cpu_kernels=_one_of(
            "cpu-kernels (TANDEM_CPU)", first_not_none(options.cpu_kernels, read_cpu_kernels(), "auto"), get_args(CpuKernels)
        ),
        bind_cores=_parse_flag("--bind-cores", options.bind_cores),
        timeout_seconds=first_not_none(options.timeout_seconds, own.timeout_seconds, DEFAULT_TIMEOUT_SECONDS),
        join_seconds=_decide_join_seconds(options, run.environment),
        max_batch_size=first_not_none(options.max_batch_size, own.max_batch_size),
        block_size=first_not_none(options.block_size, settings.block_size, DEFAULT_BLOCK_SIZE),
        num_blocks=first_not_none(options.num_blocks, settings.num_blocks),
        prefix_cache=first_not_none(options.prefix_cache, own.prefix_cache, True),
        speculate=first_not_none(options.speculate, own.speculate, False) and run.draft is None,
        draft=run.draft.describe(options.kv_cache_dtype) if run.draft is not None else None,
        draft_tokens=first_not_none(options.draft_tokens, DEFAULT_DRAFT_TOKENS),
        task=task,
        adapters=tuple(Adapter(name, str(folder.path.absolute()), folder.fingerprint) for name, folder in run.adapters.items()),
    )
    job.plan_scheme(config, run.opened.scheme)
    for name in ("threads_per_rank", "max_batch_size", "timeout_seconds"):
        value = getattr(job, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}, but has to be above 0")
    if not job.timeout_seconds <= MAX_SECONDS:  # also rejects nan
        raise ConfigError(f"timeout_seconds is {job.timeout_seconds}, but has to be above 0 and at most {MAX_SECONDS}")
    check_blocks(job.block_size, job.num_blocks)
    choose_kernels(job.cpu_kernels)
    check_collectives(job.collectives, job.device, device.sharing)
    if job.collectives == "shm" and not shared_memory_works():
        raise ConfigError("collectives shm need the native kernels on processors other than x86-64; use --collectives gloo")
    if job.collectives == "shm" and run.nodes.num_nodes > 1:
        raise ConfigError(f"collectives shm work inside one node, but --nnodes is {run.nodes.num_nodes}; use --collectives auto")
    if device.rank_bytes is not None and not isinstance(task, Quantize):
        job = replace(job, fitting_blocks=fit_blocks(job, partial(run.plan_ranks, job), device.rank_bytes, fraction))
    return job


def _decide_join_seconds(options: RunOptions, environment: LaunchEnvironment) -> float | None:
    """Return how long a launcher's ranks wait for each other: the launcher's limit or --timeout, whichever is less."""
    limits = [limit for limit in (environment.join_seconds, options.timeout_seconds) if limit is not None]
    return min(limits, default=None)


def run_job(run: Run, job: Job, observer: RunObserver) -> int:
    """Start the ranks, or become a rank that a launcher started; returns the number of restarts.

    Raises RanksFailedError if ranks failed, after writing the verdict; StoppedError on SIGTERM and SIGINT.
    """
    _check_descriptors(job.world_size)
    environment = run.environment
    is_first = not (environment.rank if environment.is_rank else run.nodes.node_rank)
    folder = open_log_folder(_find_log_dir(run.options, run.settings), is_first=is_first, can_move=not environment.is_rank)
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


def _find_log_dir(options: RunOptions, settings: Settings) -> Path | None:
    """Return the log folder of the command line, otherwise the YAML's."""
    return options.log_dir or (Path(settings.tandem.log_dir) if settings.tandem.log_dir else None)


def _parse_flag(name: str, word: str | None) -> bool | None:
    flags = {"true": True, "false": False, "1": True, "0": False}
    if word is not None and word.lower() not in flags:
        raise ConfigError(f"{name} is {word!r}, but True or False is needed")
    return None if word is None else flags[word.lower()]


def _decide_precision(name: str, option: str | None, yaml: str | None, task: Task) -> str:
    """Return one of PRECISIONS: the command line's, otherwise the YAML's. A quantization computes in floats."""
    return "auto" if isinstance(task, Quantize) else _one_of(name, first_not_none(option, yaml, "auto"), PRECISIONS)


def _one_of(name: str, value: str, words: tuple[str, ...]) -> str:
    if value not in words:
        raise ConfigError(f"{name} is {value!r}, but has to be one of {', '.join(words)}")
    return value
