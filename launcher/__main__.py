"""Entry point of `python -m launcher` and of the console script `tandem`; handles interrupts while the commands are still being
imported."""

import os
import sys

# `python -m` puts the current directory first, where a model.py or json.py would shadow the real one. Nothing else is imported before.
_home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
try:
    _is_elsewhere = os.path.abspath(sys.path[0]) == os.getcwd() != _home
except OSError:  # the current directory has been removed
    _is_elsewhere = False
if _is_elsewhere and __name__ == "__main__":
    del sys.path[0]

from launcher.host.interruption import interruption  # noqa: E402


def main() -> None:
    """Run the command line and exit."""
    try:
        interruption.catch()
        from launcher.cli.main import main as run

        run()
    except BaseException:
        if interruption.number is not None:
            interruption.exit()
        raise


if __name__ == "__main__":
    main()
