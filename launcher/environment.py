"""Who started this process, and as which rank: the only reader of the environment variables.

Knows the variables of launchers; starts nothing, opens no sockets, sees no YAML but the rank count it is handed.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel.errors import ConfigError

WORKER_NUM = "MS_WORKER_NUM"
"""How many ranks to start, for a process that is not a rank itself."""

_MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchEnvironment:
    """What the environment says about this process; the rank's own fields are None when it is not a rank."""

    launcher: str = "none"
    """'none', or the launcher that made this process a rank: a name of the table below."""
    rank: int | None = None
    """Number of this rank, from 0."""
    world_size: int | None = None
    """Ranks in all."""
    local_rank: int | None = None
    """Number of this rank on its host, from 0."""
    local_world_size: int | None = None
    """Ranks on this host; None also when the launcher does not say."""
    master_addr: str | None = None
    """Host on which ranks find each other."""
    master_port: int | None = None
    """Port on which ranks find each other."""
    restart_count: int = 0
    """Which start of the same group this is, from 0."""
    worker_num: int | None = None
    """Ranks asked for by MS_WORKER_NUM."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """The variables that decided all this, as they were."""

    def __post_init__(self) -> None:
        if self.is_rank:
            assert self.rank is not None and self.world_size is not None, "a rank knows its number and how many there are"

    @property
    def is_rank(self) -> bool:
        """Whether this process joins a run instead of starting one."""
        return self.launcher != "none"


def _parse_text(name: str, text: str) -> str:
    return text.strip()


def _parse_number(name: str, text: str) -> int:
    stripped = text.strip()
    if not (stripped.isascii() and stripped.isdecimal()):
        raise ConfigError(f"{name} is {text!r}, but a whole number of at least 0 is needed")
    return int(stripped)


def _parse_count(name: str, text: str) -> int:
    count = _parse_number(name, text)
    if count < 1:
        raise ConfigError(f"{name} is {count}, but a whole number of at least 1 is needed")
    return count


def _parse_port(name: str, text: str) -> int:
    port = _parse_count(name, text)
    if port > _MAX_PORT:
        raise ConfigError(f"{name} is {port}, but a port of at most {_MAX_PORT} is needed")
    return port


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variable:
    """One variable of a launcher and the field that it fills."""

    name: str
    """Name in the environment."""
    fills: str
    """Field of LaunchEnvironment."""
    parse: Callable[[str, str], Any] = _parse_number
    """From name and text to the field's value."""
    required: bool = True
    """Whether a rank cannot do without it."""
    marks: bool = False
    """Whether its presence alone says that this launcher was at work."""


_LAUNCHERS: dict[str, tuple[_Variable, ...]] = {
    "torchrun": (
        _Variable(name="RANK", fills="rank", marks=True),
        _Variable(name="WORLD_SIZE", fills="world_size", parse=_parse_count, marks=True),
        _Variable(name="LOCAL_RANK", fills="local_rank", marks=True),
        _Variable(name="LOCAL_WORLD_SIZE", fills="local_world_size", parse=_parse_count, required=False),
        _Variable(name="TORCHELASTIC_RESTART_COUNT", fills="restart_count", required=False),
        # Shells often export these two for other purposes, so they mark nothing.
        _Variable(name="MASTER_ADDR", fills="master_addr", parse=_parse_text),
        _Variable(name="MASTER_PORT", fills="master_port", parse=_parse_port),
    ),
}
"""Launchers by name; the first whose marks are found decides."""

_BELOW = (("rank", "world_size"), ("local_rank", "world_size"), ("local_rank", "local_world_size"))
"""Pairs of fields of which the first counts from 0 up to below the second."""


def read_environment(environ: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """What the variables say; an empty variable says nothing. Raises ConfigError for values that cannot be used."""
    given = {name: text for name, text in (os.environ if environ is None else environ).items() if text.strip()}
    variables = {name: given[name] for name in (WORKER_NUM,) if name in given}
    worker_num = _parse_count(WORKER_NUM, given[WORKER_NUM]) if WORKER_NUM in given else None
    for launcher, row in _LAUNCHERS.items():
        if not any(variable.marks and variable.name in given for variable in row):
            continue
        values = _read_rank(launcher, row, given)
        variables.update({variable.name: given[variable.name] for variable in row if variable.name in given})
        return LaunchEnvironment(launcher=launcher, worker_num=worker_num, variables=variables, **values)
    return LaunchEnvironment(worker_num=worker_num, variables=variables)


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
                source = f"{environment.launcher}'s {_name_variable(environment.launcher, 'world_size')}"
                raise ConfigError(f"{name} is {count}, but {source} is {environment.world_size}; make them equal, or leave out {name}")
        return environment.world_size
    candidates = (workers, environment.worker_num, settings_model_parallel, 1)
    return next(count for count in candidates if count is not None)


def _read_rank(launcher: str, row: tuple[_Variable, ...], given: Mapping[str, str]) -> dict[str, Any]:
    missing = [variable.name for variable in row if variable.required and variable.name not in given]
    if missing:
        present = ", ".join(f"{variable.name}={given[variable.name]}" for variable in row if variable.name in given)
        raise ConfigError(
            f"the environment looks like {launcher}'s ({present}) but lacks {', '.join(missing)};"
            " set what is missing, or unset the rest to start without it"
        )
    values = {variable.fills: variable.parse(variable.name, given[variable.name]) for variable in row if variable.name in given}
    for low, high in _BELOW:
        if low in values and high in values and values[low] >= values[high]:
            raise ConfigError(
                f"{_name_variable(launcher, low)} is {values[low]}, but {_name_variable(launcher, high)} is {values[high]}:"
                f" 0 to {values[high] - 1} is needed"
            )
    return values


def _name_variable(launcher: str, fills: str) -> str:
    return next(variable.name for variable in _LAUNCHERS[launcher] if variable.fills == fills)
