"""Options of msrun that change nothing here: accepted with a note, or refused where they ask for something else than a run.

msrun's other options are aliases of tandem's own, see `options.py`.
"""

from dataclasses import dataclass
from typing import Annotated

from launcher.settings.option_declarations import CLUSTER, option
from parallel.errors import ConfigError

_MAX_LEVEL = 3
MSRUN_HELP = "An option of msrun."


@dataclass(frozen=True, kw_only=True)  # no slots, which only one base of a class may have
class MsrunOptions:
    """The options; not shown in the help."""

    join: Annotated[str | None, option("--join", metavar="True|False", help=MSRUN_HELP, panel=CLUSTER, hidden=True)] = None
    rank_table_file: Annotated[str | None, option("--rank_table_file", help=MSRUN_HELP, panel=CLUSTER, hidden=True)] = None
    simulation_level: Annotated[int | None, option("--sim_level", help=MSRUN_HELP, panel=CLUSTER, hidden=True)] = None
    simulated_rank: Annotated[int | None, option("--sim_rank_id", help=MSRUN_HELP, panel=CLUSTER, hidden=True)] = None
    worker_log_name: Annotated[str | None, option("--worker_log_name", help=MSRUN_HELP, panel=CLUSTER, hidden=True)] = None
    tail_worker_log: Annotated[str | None, option("--tail_worker_log", help=MSRUN_HELP, panel=CLUSTER, hidden=True)] = None


def check_msrun_options(options: MsrunOptions) -> list[str]:
    """Return notes for the user about msrun's options on this command line. Raises ConfigError for values that msrun has not either,
    and for --sim_level."""
    notes = []
    if options.join not in (None, "True", "False"):
        raise ConfigError(f"--join is {options.join!r}, but True or False is needed")
    if options.join == "False":
        notes.append("--join False: tandem waits for its ranks all the same, and prints the results here")
    level = options.simulation_level
    if level is not None and not -1 <= level <= _MAX_LEVEL:
        raise ConfigError(f"--sim_level is {level}, but -1 to {_MAX_LEVEL} is needed")
    if level is not None and level >= 0:
        raise ConfigError(f"--sim_level {level} asks for a dry run: use tandem plan, with the same model and --workers")
    if options.simulated_rank is not None and options.simulated_rank != -1:
        raise ConfigError("--sim_rank_id goes with --sim_level, a dry run: use tandem plan, with the same model and --workers")
    if options.rank_table_file:
        notes.append(f"--rank_table_file {options.rank_table_file} describes Ascend devices and is not used: ranks meet at --master-addr")
    if options.worker_log_name:
        notes.append(f"--worker_log_name {options.worker_log_name} is not used: logs are named worker_N.log")
    if options.tail_worker_log is not None and not _lists_ranks(options.tail_worker_log):
        raise ConfigError(f"--tail_worker_log is {options.tail_worker_log!r}, but -1 (all ranks) or ranks such as 0,2-3 are needed")
    return notes


def _lists_ranks(text: str) -> bool:
    """Return whether this is -1, or ranks and ranges separated by commas."""
    if text == "-1":
        return True
    ends = [part.split("-") for part in text.split(",")]
    return all(1 <= len(pair) <= 2 and all(word.strip().isdecimal() for word in pair) for pair in ends)
