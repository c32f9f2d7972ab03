"""Who started this process, and as which rank: the only reader of the environment variables.

Decides between the launchers of the table; starts nothing, opens no sockets, sees no YAML but the rank count it is handed.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.environment.launchers import LAUNCHERS, LOOPBACK, Found, Launcher
from launcher.environment.variables import parse_count
from parallel.errors import ConfigError

WORKER_NUM = "MS_WORKER_NUM"
"""How many ranks to start, for a process that is not a rank itself."""

_NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchEnvironment:
    """What the environment says about this process; the rank's own fields are None when it is not a rank."""

    launcher: str = _NONE
    """'none', or the launcher that made this process a rank or a scheduler: a name of the table."""
    is_scheduler: bool = False
    """Whether this is no rank, but where msrun's ranks find each other."""
    rank: int | None = None
    """Number of this rank, from 0."""
    world_size: int | None = None
    """Ranks in all."""
    local_rank: int | None = None
    """Number of this rank on its host, from 0; None also when the launcher does not say."""
    local_world_size: int | None = None
    """Ranks on this host; None also when the launcher does not say."""
    master_addr: str | None = None
    """Host on which ranks find each other."""
    master_port: int | None = None
    """Port on which ranks find each other."""
    store_host: str = "rank 0"
    """Who listens there: 'rank 0', 'launcher' (torchrun's agent), or 'scheduler' (msrun's)."""
    run_key: str | None = None
    """A text that all processes of one launch share, and those of another do not; None when the launcher has none."""
    restart_count: int = 0
    """Which start of the same group this is, from 0."""
    worker_num: int | None = None
    """Ranks asked for by MS_WORKER_NUM."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """The variables that decided all this, as they were."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Which of them each field comes from, by the field's name; several are separated by ', '."""

    def __post_init__(self) -> None:
        if self.is_rank:
            assert self.rank is not None and self.world_size is not None, "a rank knows its number and how many there are"

    @property
    def is_rank(self) -> bool:
        """Whether this process joins a run as a rank instead of starting one."""
        return self.launcher != _NONE and not self.is_scheduler

    def as_program(self) -> "LaunchEnvironment":
        """The same for a process that a launcher of programs, as srun and mpirun are, has started to start ranks itself."""
        if not any(launcher.name == self.launcher and launcher.starts_programs for launcher in LAUNCHERS):
            return self
        return LaunchEnvironment(worker_num=self.worker_num, variables=self.variables, sources=self.sources)


_BELOW = (("rank", "world_size"), ("local_rank", "world_size"), ("local_rank", "local_world_size"))
"""Pairs of fields of which the first counts from 0 up to below the second."""


def read_environment(environ: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """What the variables say; an empty variable says nothing. Raises ConfigError for values that cannot be used."""
    given = {name: text for name, text in (os.environ if environ is None else environ).items() if text.strip()}
    found: dict[str, Found] = {}
    if WORKER_NUM in given:
        found["worker_num"] = Found(parse_count((WORKER_NUM, given[WORKER_NUM])), (WORKER_NUM,))
    at_work = _leave_out_enclosing([launcher for launcher in LAUNCHERS if launcher.find_evidence(given)], given)
    # A single program that srun or mpirun started somewhere starts its ranks itself.
    speaking = [launcher for launcher in at_work if not _is_lone(launcher, given)]
    if speaking:
        found.update(_read_rank(speaking, given))
    elif at_work and (size := at_work[0].find("world_size", given)):
        found["launcher"] = Found(_NONE, size.names)
    return LaunchEnvironment(
        **{fills: entry.value for fills, entry in found.items()},
        variables={name: given[name] for entry in found.values() for name in entry.names},
        sources={fills: ", ".join(entry.names) for fills, entry in found.items() if entry.names},
    )


def decide_world_size(workers: int | None, environment: LaunchEnvironment, settings_model_parallel: int | None) -> int:
    """How many ranks a run has: `--workers` over MS_WORKER_NUM over the YAML's model_parallel, 1 when nobody says.

    A process that already is a rank has the world size of its launcher; then the first two must agree with it.
    """
    explicit = (("--workers", workers), (WORKER_NUM, environment.worker_num))
    for name, count in (*explicit, ("parallel_config.model_parallel", settings_model_parallel)):
        if count is not None and count < 1:
            raise ConfigError(f"{name} is {count}, but at least 1 rank is needed")
    if environment.world_size is not None:
        for name, count in explicit:
            if count is not None and count != environment.world_size:
                source = f"{environment.launcher}'s {environment.sources.get('world_size', 'world size')}"
                raise ConfigError(f"{name} is {count}, but {source} is {environment.world_size}; make them equal, or leave out {name}")
        return environment.world_size
    candidates = (workers, environment.worker_num, settings_model_parallel, 1)
    return next(count for count in candidates if count is not None)


def _leave_out_enclosing(at_work: list[Launcher], given: Mapping[str, str]) -> list[Launcher]:
    """Without the launchers that only started the program of the innermost one, as srun does in `srun torchrun`."""
    inner = next((launcher for launcher in at_work if launcher.find_proof(given)), None)
    if inner is None:
        return at_work
    return [launcher for launcher in at_work if launcher is inner or (launcher.set_by_hand and not launcher.find_proof(given))]


def _is_lone(launcher: Launcher, given: Mapping[str, str]) -> bool:
    size = launcher.find("world_size", given) if launcher.starts_programs else None
    return size is not None and size.value == 1


def _read_rank(launchers: Sequence[Launcher], given: Mapping[str, str]) -> dict[str, Found]:
    """What the first of some launchers that says enough says, where they agree."""
    readings = [launcher.find_all(given) for launcher in launchers]
    _require_agreement(launchers, readings)
    missing = [launcher.name_missing(found, given) for launcher, found in zip(launchers, readings, strict=True)]
    number = next((number for number, names in enumerate(missing) if not names), 0)
    launcher, found = launchers[number], readings[number]
    if missing[number]:
        present = ", ".join(f"{name}={given[name]}" for name in launcher.list_names() if name in given)
        raise ConfigError(
            f"the environment looks like {launcher.name}'s ({present}) but lacks {', '.join(missing[number])};"
            " set what is missing, or unset the rest to start without it"
        )
    for low, high in _BELOW:
        if low in found and high in found and found[low].value >= found[high].value:
            below = found[high].value
            raise ConfigError(f"{_say(found[low])}, but {_say(found[high])}: 0 to {below - 1} is needed")
    if "master_addr" not in found and "local_world_size" in found:
        raise ConfigError(
            f"{_say(found['world_size'])}, but {_say(found['local_world_size'])}: ranks on other hosts cannot tell where rank 0 is;"
            f" export MASTER_ADDR to all of them ({launcher.export_address})"
        )
    # Where nothing says that there are several hosts there is one; ranks elsewhere would be missed by name.
    defaults = {fills: Found(value, ()) for fills, value in {"master_addr": LOOPBACK, **launcher.defaults}.items()}
    return {"launcher": Found(launcher.name, launcher.find_evidence(given)), **defaults, **found}


def _require_agreement(launchers: Sequence[Launcher], readings: Sequence[Mapping[str, Found]]) -> None:
    for fills in ("world_size", "rank"):
        said = [(launcher.name, found[fills]) for launcher, found in zip(launchers, readings, strict=True) if fills in found]
        for name, entry in said[1:]:
            if entry.value != said[0][1].value:
                raise ConfigError(
                    f"{_say(said[0][1])}, but {_say(entry)}: {said[0][0]} and {name} disagree about this process;"
                    " unset the variables of the one that did not start it"
                )


def _say(found: Found) -> str:
    return f"{found.names[0]} is {found.value}"
