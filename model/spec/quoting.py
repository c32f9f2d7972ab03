"""Quote values and names from files in messages: truncated, and with printable characters only."""

import reprlib

_MAX_NAME = 200
_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxlevel = 100, 100, 3


def quote(value: object) -> str:
    """Return the value's repr, truncated if it is long or deeply nested."""
    return _REPR.repr(value)


def quote_name(name: str) -> str:
    """Return the name unchanged if it is printable on one line, otherwise quoted."""
    return name if is_plain(name) else quote(name)


def is_plain(name: str) -> bool:
    """Return whether a name can be printed unchanged."""
    return len(name) <= _MAX_NAME and name.isprintable()
