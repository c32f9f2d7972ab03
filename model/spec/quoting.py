"""Values and names out of files, as they stand in messages: cut, and in printable characters, whatever the file says.

Knows nothing of where they come from.
"""

import reprlib

_MAX_NAME = 200
_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxlevel = 100, 100, 3


def quote(value: object) -> str:
    """The value as Python writes it, cut where it is long or deep."""
    return _REPR.repr(value)


def quote_name(name: str) -> str:
    """The name as it stands when it can be printed in a line, else quoted."""
    return name if is_plain(name) else quote(name)


def is_plain(name: str) -> bool:
    """Whether a name can be printed as it stands."""
    return len(name) <= _MAX_NAME and name.isprintable()
