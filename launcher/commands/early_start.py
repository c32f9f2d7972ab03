"""Begins the process that starts the ranks before a command's own imports, which take as long as those of that process."""

from typing import Any

from launcher.commands import preparation
from launcher.settings.options import RunOptions
from launcher.settings.program_options import ProgramOptions
from launcher.supervision.rank_starter import RankStarter

_begun: list[RankStarter] = []
"""At most one."""


def prepare(options: Any) -> Any:
    """Return the prepared options of a command that this process is about to run. Raises InputError.

    The process that starts its ranks ends with this one if the command is refused later.
    """
    options = preparation.prepare(options)
    if isinstance(options, ProgramOptions):
        _begun[:] = [RankStarter()]
    elif isinstance(options, RunOptions):
        environment = preparation.read_run_environment(options)
        if not environment.is_rank and not environment.is_scheduler:
            _begun[:] = [RankStarter(preload=options.preload)]
    return options


def take_starter(*, preload: bool = True) -> RankStarter:
    """Return the process that was begun, or another one. The caller closes it."""
    return _begun.pop() if _begun and _begun[0].preload == preload else RankStarter(preload=preload)
