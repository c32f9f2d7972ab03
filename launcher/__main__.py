"""`python -m launcher` is `tandem`."""

import os
import sys

# `python -m` puts the current folder first, where a model.py or json.py would hide the real one. Nothing else is imported before.
_home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
try:
    _is_elsewhere = os.path.abspath(sys.path[0]) == os.getcwd() != _home
except OSError:  # the current folder has been removed
    _is_elsewhere = False
if _is_elsewhere:
    del sys.path[0]

from launcher.cli import main  # noqa: E402

main()
