"""The table of launchers that make a process a rank: their variables, and which field of the launch environment each sets.

Uses only the variables passed in, not this process's; does not choose between launchers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.environment.variables import (
    Given,
    derive_port,
    find_number,
    join_texts,
    parse_count,
    parse_first_host,
    parse_local_tasks,
    parse_number,
    parse_port,
    parse_text,
    parse_time_limit,
)
from parallel.errors import ConfigError

LOOPBACK = "127.0.0.1"
_FALLBACK_PORT = 29500
"""torchrun's default, used if neither MASTER_PORT nor a key of the launch determines a port."""

_RANK_FIELDS = ("rank", "local_rank")
"""Fields that a scheduler lacks, whatever its variables say."""


def _parse_run_id(given: Given) -> str | None:
    # torchrun's default, which all launches share.
    return None if (text := parse_text(given)) == "none" else text


def _parse_agent_store(given: Given) -> str:
    return "launcher" if parse_text(given) == "True" else "rank 0"


def _parse_lone_node(given: Given) -> str | None:
    return LOOPBACK if parse_count(given) == 1 else None


def _parse_lone_host(local_size: Given, size: Given) -> str | None:
    return LOOPBACK if parse_count(local_size) == parse_count(size) else None


def _parse_role(given: Given) -> bool:
    name, text = given
    if (role := text.strip()) not in ("MS_WORKER", "MS_SCHED"):
        raise ConfigError(f"{name} is {text!r}, but only MS_WORKER (a rank) and MS_SCHED (where ranks find each other) are supported")
    return role == "MS_SCHED"


def _parse_device(device: Given, worker_num: Given) -> int | None:
    # Also exported by hand to choose a device for a single process, in which case it is not a rank.
    number = parse_number(device)
    return number if number < parse_count(worker_num) else None


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to determine a field."""

    fills: str
    """Field of LaunchEnvironment."""
    names: tuple[str, ...]
    """The variables it uses; all must be set."""
    parse: Callable[..., Any] = parse_number
    """Converts each variable's name and value to the field; None means not available after all."""


@dataclass(frozen=True, slots=True)
class Found:
    """A field determined from variables."""

    value: Any
    """The value of the field."""
    names: tuple[str, ...]
    """The variables it comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """A launcher, described by the variables it sets."""

    name: str
    """Name in `tandem env`."""
    marks: tuple[tuple[str, ...], ...]
    """The launcher is active if all variables of any of these groups are set."""
    inner_proof: tuple[str, ...] = ()
    """Variables set only by the real launcher, and only for processes it starts itself. If one is set, this is the innermost launcher,
    and variables of the enclosing ones are ignored."""
    set_by_hand: bool = False
    """Whether users set its variables themselves, so that without the proof it cannot be an enclosing launcher."""
    starts_programs: bool = False
    """Whether it is also used to start a single program, which is then not a rank."""
    readings: tuple[Reading, ...]
    """In order of precedence for the same field."""
    required: tuple[str, ...] = ("rank", "world_size")
    """Fields that a rank must have."""
    equals: tuple[tuple[str, str], ...] = ()
    """Pairs of variables that must be equal if both are numbers."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields that no variable sets."""
    export_address: str = ""
    """How to pass MASTER_ADDR to its ranks, if the launcher does not provide the address itself."""

    def find(self, fills: str, variables: Mapping[str, str]) -> Found | None:
        """Return one field, or None if the variables do not determine it. Raises ConfigError."""
        for reading in self.readings:
            if reading.fills == fills and all(name in variables for name in reading.names):
                value = reading.parse(*((name, variables[name]) for name in reading.names))
                if value is not None:
                    return Found(value, reading.names)
        return None

    def find_all(self, variables: Mapping[str, str]) -> dict[str, Found]:
        """Return all fields that the variables determine. Raises ConfigError."""
        for first, second in self.equals:
            numbers = [find_number((name, variables.get(name, ""))) for name in (first, second)]
            if None not in numbers and numbers[0] != numbers[1]:
                raise ConfigError(f"{first} is {numbers[0]}, but {second} is {numbers[1]}; make them equal, or unset {second}")
        fields = dict.fromkeys(reading.fills for reading in self.readings)
        if "is_scheduler" in fields and (found := self.find("is_scheduler", variables)) and found.value:
            fields = {fills: None for fills in fields if fills not in _RANK_FIELDS}
        return {fills: found for fills in fields if (found := self.find(fills, variables))}

    def find_proof(self, variables: Mapping[str, str]) -> tuple[str, ...]:
        """Return the variables that prove this launcher to be the innermost one."""
        return tuple(name for name in self.inner_proof if name in variables)

    def find_evidence(self, variables: Mapping[str, str]) -> tuple[str, ...]:
        """Return the variables that show it to be active: its proof, otherwise its marks; empty if it is not active."""
        marks = tuple(dict.fromkeys(name for group in self.marks if all(name in variables for name in group) for name in group))
        return (self.find_proof(variables) or marks) if marks else ()

    def name_missing(self, found: Mapping[str, Found], variables: Mapping[str, str]) -> list[str]:
        """Return the variables that would set the required fields missing from `found`, with alternatives joined in one string."""
        scheduling = "is_scheduler" in found and found["is_scheduler"].value
        fields = [fills for fills in self.required if fills not in found and not (scheduling and fills in _RANK_FIELDS)]
        return [" or ".join(name for name in self.list_names(fills) if name not in variables) for fills in fields]

    def list_names(self, fills: str | None = None) -> list[str]:
        """Return the variables that set a field, or any field."""
        readings = (reading for reading in self.readings if fills in (None, reading.fills))
        return list(dict.fromkeys(name for reading in readings for name in reading.names))


# Users who set these for srun or mpirun do so deliberately: they override the launcher.
_MASTER_ADDR = Reading("master_addr", ("MASTER_ADDR",), parse_text)
_MASTER_PORT = Reading("master_port", ("MASTER_PORT",), parse_port)


def _keyed(*names: str) -> tuple[Reading, Reading]:
    return Reading("run_key", names, join_texts), Reading("master_port", names, derive_port)


LAUNCHERS = (
    Launcher(
        name="torchrun",
        marks=(("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",)),
        inner_proof=("TORCHELASTIC_RUN_ID",),
        set_by_hand=True,
        readings=(
            Reading("rank", ("RANK",)),
            Reading("world_size", ("WORLD_SIZE",), parse_count),
            Reading("local_rank", ("LOCAL_RANK",)),
            Reading("local_world_size", ("LOCAL_WORLD_SIZE",), parse_count),
            Reading("restart_count", ("TORCHELASTIC_RESTART_COUNT",)),
            # Shells often export these two for other purposes, so they do not mark a launch.
            _MASTER_ADDR,
            _MASTER_PORT,
            Reading("store_host", ("TORCHELASTIC_USE_AGENT_STORE",), _parse_agent_store),
            Reading("run_key", ("TORCHELASTIC_RUN_ID",), _parse_run_id),
        ),
        required=("rank", "world_size", "local_rank", "master_addr", "master_port"),
    ),
    Launcher(
        name="mindspore",
        marks=(("MS_ROLE",),),
        # msrun sets it for its scheduler and its workers; users who set MS_ROLE by hand rarely do.
        inner_proof=("MS_TOPO_TIMEOUT",),
        set_by_hand=True,
        readings=(
            Reading("is_scheduler", ("MS_ROLE",), _parse_role),
            # Any text is allowed, but msrun itself writes the rank.
            Reading("rank", ("MS_NODE_ID",), find_number),
            Reading("rank", ("RANK_ID",)),
            Reading("world_size", ("MS_WORKER_NUM",), parse_count),
            Reading("local_rank", ("DEVICE_ID", "MS_WORKER_NUM"), _parse_device),
            Reading("master_addr", ("MS_SCHED_HOST",), parse_text),
            Reading("master_port", ("MS_SCHED_PORT",), parse_port),
            Reading("join_seconds", ("MS_TOPO_TIMEOUT",), parse_time_limit),
        ),
        required=("is_scheduler", "rank", "world_size", "master_addr", "master_port"),
        equals=(("MS_WORKER_NUM", "RANK_SIZE"), ("MS_NODE_ID", "RANK_ID")),
        defaults={"store_host": "scheduler"},
    ),
    Launcher(
        name="openmpi",
        marks=(("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",)),
        # Up to version 4, and from version 5.
        inner_proof=("OMPI_MCA_ess_base_jobid", "PRTE_LAUNCHED"),
        starts_programs=True,
        readings=(
            Reading("rank", ("OMPI_COMM_WORLD_RANK",)),
            Reading("world_size", ("OMPI_COMM_WORLD_SIZE",), parse_count),
            Reading("local_rank", ("OMPI_COMM_WORLD_LOCAL_RANK",)),
            Reading("local_world_size", ("OMPI_COMM_WORLD_LOCAL_SIZE",), parse_count),
            _MASTER_ADDR,
            Reading("master_addr", ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"), _parse_lone_host),
            _MASTER_PORT,
            *_keyed("PMIX_NAMESPACE"),
            *_keyed("OMPI_MCA_ess_base_jobid"),
        ),
        defaults={"master_port": _FALLBACK_PORT},
        export_address="mpirun -x MASTER_ADDR=first-host ...",
    ),
    Launcher(
        name="slurm",
        # A batch script also has SLURM_PROCID and often SLURM_NTASKS, but is not part of a step.
        marks=(("SLURM_STEP_ID", "SLURM_PROCID"), ("SLURM_STEP_NODELIST", "SLURM_PROCID")),
        starts_programs=True,
        readings=(
            Reading("rank", ("SLURM_PROCID",)),
            # With srun --preserve-env, and under mpiexec, SLURM_NTASKS is that of the allocation rather than the step.
            Reading("world_size", ("SLURM_STEP_NUM_TASKS",), parse_count),
            Reading("world_size", ("SLURM_NTASKS",), parse_count),
            Reading("local_rank", ("SLURM_LOCALID",)),
            Reading("local_world_size", ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"), parse_local_tasks),
            Reading("local_world_size", ("SLURM_TASKS_PER_NODE", "SLURM_NODEID"), parse_local_tasks),
            _MASTER_ADDR,
            Reading("master_addr", ("SLURM_STEP_NUM_NODES",), _parse_lone_node),
            Reading("master_addr", ("SLURM_STEP_NODELIST",), parse_first_host),
            _MASTER_PORT,
            *_keyed("SLURM_JOB_ID", "SLURM_STEP_ID"),
        ),
        defaults={"master_port": _FALLBACK_PORT},
        export_address="export MASTER_ADDR=first-host before srun",
    ),
    Launcher(
        name="pmi",
        marks=(("PMI_RANK",), ("PMI_SIZE",)),
        # From the hydra of MPICH and Intel MPI, but not from srun's PMI. (HYDI_CONTROL_FD is unset if hydra starts through srun.)
        inner_proof=("MPI_LOCALRANKID",),
        starts_programs=True,
        readings=(
            Reading("rank", ("PMI_RANK",)),
            Reading("world_size", ("PMI_SIZE",), parse_count),
            Reading("local_rank", ("MPI_LOCALRANKID",)),
            Reading("local_world_size", ("MPI_LOCALNRANKS",), parse_count),
            _MASTER_ADDR,
            Reading("master_addr", ("MPI_LOCALNRANKS", "PMI_SIZE"), _parse_lone_host),
            _MASTER_PORT,
        ),
        defaults={"master_port": _FALLBACK_PORT},
        export_address="mpiexec -genv MASTER_ADDR first-host ...",
    ),
)
"""In order of precedence if several agree: those that provide more fields come first, and one whose scheduler waits for its ranks
precedes those that only number them."""
