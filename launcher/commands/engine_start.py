"""Entry of the engine process of an `LLM`: begins the process that starts its ranks before the imports of the engine itself."""

import sys
from contextlib import suppress

from launcher.commands.begun_starter import begin_starter
from launcher.environment.detection import read_environment
from parallel.errors import InputError


def main() -> None:
    """Run with the arguments DESCRIPTOR PROGRAM_PID preload|fresh."""
    with suppress(InputError, OSError):  # the engine tells the program of them
        environment = read_environment()
        if not environment.is_rank and not environment.is_scheduler:
            begin_starter(preload=sys.argv[3] == "preload")
    from launcher.commands.engine import main as run

    run()
