"""The inputs of a run, read before any process starts: options, YAML, launch environment, checkpoint, adapters and draft model."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from launcher.commands.begun_starter import take_starter
from launcher.commands.draft_model import OpenedDraftModel, open_draft_model
from launcher.commands.opened_model import OpenedModel, open_adapters, open_model, read_tokenizer_of
from launcher.commands.preparation import plan_run_nodes, read_run_environment
from launcher.environment.detection import LaunchEnvironment, decide_world_size
from launcher.host.log_folder import check_log_folder
from launcher.job.device_facts import DeviceFacts
from launcher.job.job import Job
from launcher.rendezvous.nodes import Nodes
from launcher.settings.options import EngineOptions, RunOptions
from launcher.settings.precedence import first_not_none
from launcher.settings.tokenizer_location import locate_tokenizer
from launcher.settings.yaml_settings import Settings, open_settings
from launcher.supervision.rank_starter import RankStarter
from model.checkpoint.lora_folder import LoraFolder
from model.draft_planning import add_draft_model
from model.planning import RankPlan, Workload, plan_ranks
from model.text.tokenizer import Tokenizer
from parallel.errors import ConfigError

DEFAULT_TIMEOUT_SECONDS = 300.0


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

        sys.exit(serve_ranks(environment, decide_join_seconds(options, environment) or DEFAULT_TIMEOUT_SECONDS))
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
    check_log_folder(find_log_dir(options, settings))
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


def decide_join_seconds(options: RunOptions, environment: LaunchEnvironment) -> float | None:
    """Return how long a launcher's ranks wait for each other: the launcher's limit or --timeout, whichever is less."""
    limits = [limit for limit in (environment.join_seconds, options.timeout_seconds) if limit is not None]
    return min(limits, default=None)


def find_log_dir(options: RunOptions, settings: Settings) -> Path | None:
    """Return the log folder of the command line, otherwise the YAML's."""
    return options.log_dir or (Path(settings.tandem.log_dir) if settings.tandem.log_dir else None)
