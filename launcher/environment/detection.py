"""Detection of the launcher that started this process, and of its rank; the only module that reads environment variables.

Chooses among the launchers of the table; starts nothing and opens no sockets.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.environment.launchers import LAUNCHERS, LOOPBACK, Found, Launcher
from launcher.environment.variables import parse_count
from parallel.errors import ConfigError

WORKER_NUM = "MS_WORKER_NUM"
"""Number of ranks to start, for a process that is not itself a rank."""

CPU_KERNELS = "TANDEM_CPU"
"""The instruction set of the CPU kernels, if --cpu-kernels names none."""

_NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchEnvironment:
    """The launch environment of this process; the rank's fields are None if it is not a rank."""

    launcher: str = _NONE
    """"none", or the name in the table of the launcher that made this process a rank or a scheduler."""
    is_scheduler: bool = False
    """Whether this process is msrun's scheduler, which serves the rendezvous, rather than a rank."""
    rank: int | None = None
    """Rank of this process."""
    world_size: int | None = None
    """Total number of ranks."""
    local_rank: int | None = None
    """Rank on this host; also None if the launcher does not tell."""
    local_world_size: int | None = None
    """Number of ranks on this host; also None if the launcher does not tell."""
    master_addr: str | None = None
    """Host of the rendezvous."""
    master_port: int | None = None
    """Port of the rendezvous."""
    store_host: str = "rank 0"
    """Which process listens there: "rank 0", "launcher" (torchrun's agent), or "scheduler" (msrun's)."""
    join_seconds: float | None = None
    """Seconds that ranks wait for each other at the start; None if the launcher sets no limit."""
    run_key: str | None = None
    """A string shared by all processes of one launch and distinct between launches; None if the launcher provides none."""
    restart_count: int = 0
    """Number of restarts of this group of ranks so far."""
    worker_num: int | None = None
    """Number of ranks requested by MS_WORKER_NUM."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """The variables that determined these fields, unmodified."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Maps field names to the variables they come from, separated by ', '."""

    def __post_init__(self) -> None:
        if self.is_rank:
            assert self.rank is not None and self.world_size is not None, "a rank knows its number and how many there are"

    @property
    def is_rank(self) -> bool:
        """Whether this process joins a run as a rank instead of starting one."""
        return self.launcher != _NONE and not self.is_scheduler

    def as_program(self) -> "LaunchEnvironment":
        """Return the environment of a process that srun or mpirun started as a program, which starts its own ranks."""
        if not any(launcher.name == self.launcher and launcher.starts_programs for launcher in LAUNCHERS):
            return self
        return LaunchEnvironment(worker_num=self.worker_num, variables=self.variables, sources=self.sources)


_BELOW = (("rank", "world_size"), ("local_rank", "world_size"), ("local_rank", "local_world_size"))
"""Pairs of fields; the first must be less than the second."""


def read_cpu_kernels() -> str | None:
    """Return the value of TANDEM_CPU; None if it is not set."""
    return os.environ.get(CPU_KERNELS, "").strip() or None


def read_environment(environ: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Read the variables; an empty variable counts as unset. Raises ConfigError for invalid values."""
    given = {name: text for name, text in (os.environ if environ is None else environ).items() if text.strip()}
    found: dict[str, Found] = {}
    if WORKER_NUM in given:
        found["worker_num"] = Found(parse_count((WORKER_NUM, given[WORKER_NUM])), (WORKER_NUM,))
    at_work = _leave_out_enclosing([launcher for launcher in LAUNCHERS if launcher.find_evidence(given)], given)
    # A single program started by srun or mpirun starts its own ranks.
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


def set_variables(variables: Mapping[str, str]) -> None:
    """Set variables of this process, as if it had been started with them."""
    os.environ.update(variables)


def decide_world_size(workers: int | None, environment: LaunchEnvironment, settings_model_parallel: int | None) -> int:
    """Return the number of ranks: `--workers`, otherwise MS_WORKER_NUM, otherwise the YAML's model_parallel, otherwise 1.

    In a process that is already a rank it is the launcher's world size, with which the first two must agree.
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
    """Remove launchers that only started the program of the innermost one, as srun does in `srun torchrun`."""
    inner = next((launcher for launcher in at_work if launcher.find_proof(given)), None)
    if inner is None:
        return at_work
    return [launcher for launcher in at_work if launcher is inner or (launcher.set_by_hand and not launcher.find_proof(given))]


def _is_lone(launcher: Launcher, given: Mapping[str, str]) -> bool:
    size = launcher.find("world_size", given) if launcher.starts_programs else None
    return size is not None and size.value == 1


def _read_rank(launchers: Sequence[Launcher], given: Mapping[str, str]) -> dict[str, Found]:
    """Return the fields from the first launcher that provides all required ones, after checking that the launchers agree."""
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
    # Without any sign of several hosts, assume one; ranks elsewhere would be reported as missing.
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
