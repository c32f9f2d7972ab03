"""Begins the process that starts the ranks before a command's own imports, which take as long as those of that process."""

from typing import Any

from launcher.commands import preparation
from launcher.commands.begun_starter import begin_starter
from launcher.settings.options import RunOptions
from launcher.settings.program_options import ProgramOptions


def prepare(options: Any) -> Any:
    """Return the prepared options of a command that this process is about to run. Raises InputError.

    The process that starts its ranks ends with this one if the command is refused later.
    """
    options = preparation.prepare(options)
    if isinstance(options, ProgramOptions):
        begin_starter()
    elif isinstance(options, RunOptions):
        environment = preparation.read_run_environment(options)
        if not environment.is_rank and not environment.is_scheduler:
            begin_starter(preload=options.preload)
    return options
