"""MindFormers' `logger`: writes to standard error, so that standard output holds only what the script prints."""

import logging
import sys


class _StandardError(logging.Handler):
    """Handler that writes to what sys.stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        print(self.format(record), file=sys.stderr, flush=True)


def _build_logger() -> logging.Logger:
    made = logging.getLogger("tandem.mindformers")
    if not made.handlers:
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))
        made.addHandler(handler)
        made.setLevel(logging.INFO)
        made.propagate = False
    return made


logger = _build_logger()
"""The logger of the script."""
