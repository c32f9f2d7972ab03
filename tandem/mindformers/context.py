"""`build_context` and `build_parallel_config`: check the configuration and join the ranks.

The last configuration is kept, because scripts load a tokenizer by the model's name alone.
"""

from launcher.environment.detection import LaunchEnvironment, read_environment
from launcher.settings.yaml_settings import Settings, build_settings
from launcher.worker.rank_group import RankGroup, find_group
from parallel.errors import ConfigError
from tandem.mindformers.config import MindFormerConfig
from tandem.mindformers.log import logger
from tandem.ranks import init

_contexts: list[MindFormerConfig] = []


def build_context(config: MindFormerConfig) -> MindFormerConfig:
    """Check the configuration and join the ranks of the environment, see `tandem.init`. Returns the configuration.

    Raises ConfigError for a key or value that a run cannot use, on every rank, and for a process that MS_WORKER_NUM makes one of several
    although no launcher has started it.
    """
    if find_group() is None:
        _check_alone(read_environment())
    group = init()
    group.agree(lambda: check_config(config), lambda settings: {})
    _check_parallel(config, group)
    _contexts[:] = [config]
    return config


def _check_alone(environment: LaunchEnvironment) -> None:
    if not environment.is_rank and not environment.is_scheduler and (environment.worker_num or 1) > 1:
        raise ConfigError(
            f"MS_WORKER_NUM is {environment.worker_num}, but no launcher made this process a rank: each process would load the whole "
            "model: start the script with msrun, torchrun or tandem run, or unset MS_WORKER_NUM"
        )


def build_parallel_config(config: MindFormerConfig) -> MindFormerConfig:
    """Check the numbers of `parallel_config` against the ranks. Returns the configuration. Raises ConfigError."""
    group = init()
    asked = config.parallel_config or {}
    wanted = asked.get("model_parallel")
    if group.world_size > 1 and wanted not in (None, "None", 1, group.world_size):
        raise ConfigError(
            f"parallel_config.model_parallel is {wanted}, but there are {group.world_size} ranks: set it to their number, or leave it out"
        )
    for name in ("data_parallel", "pipeline_stage"):
        if group.world_size > 1 and group.rank == 0 and asked.get(name) not in (None, "None", 1):
            logger.warning("parallel_config.%s is %s, but all ranks split every layer: it is not used", name, asked[name])
    return config


def find_context() -> MindFormerConfig | None:
    """Return the configuration of the last `build_context`, or None."""
    return _contexts[0] if _contexts else None


def check_config(config: MindFormerConfig) -> Settings:
    """Return the settings of a configuration. Raises ConfigError for a key or value that a run cannot use."""
    source = config.source_files[-1] if config.source_files else "the configuration"
    try:
        return build_settings(config.to_dict(), source)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _check_parallel(config: MindFormerConfig, group: RankGroup) -> None:
    if group.world_size > 1 and not config.use_parallel and group.rank == 0:
        logger.warning("use_parallel is not set, but there are %d ranks: they decode one model together", group.world_size)
