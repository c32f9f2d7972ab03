"""Options of the command line given as keyword arguments of Python: the same names with underscores, the same checks.

An option has the names of its field and of all its flags, aliases included: `workers`, `tensor_parallel_size`.
"""

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

from launcher.settings.option_declarations import check_values, find_metadata, list_flags
from parallel.errors import ConfigError

Options = TypeVar("Options")
_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", Path: "a path", bool: "True or False"}


def read_options(kind: type[Options], given: Mapping[str, Any], call: str, *, allowed: Collection[str] | None = None) -> Options:
    """Build an options dataclass from keyword arguments. `call` names the function in messages; `allowed` limits the fields.

    Raises ConfigError for an unknown name, two names of one option, and a value of the wrong type or out of range.
    """
    hints = get_type_hints(kind, include_extras=True)
    names = {
        name: own
        for own, hint in hints.items()
        if find_metadata(hint, typer.models.ParameterInfo) is not None and (allowed is None or own in allowed)
        for name in (own, *_list_names(hint))
    }
    values: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in given.items():
        field = names.get(name)
        if field is None:
            close = difflib.get_close_matches(name, names, n=3)
            remedy = f"; did you mean {' or '.join(close)}?" if close else f"; the options are {', '.join(sorted(set(names.values())))}"
            raise ConfigError(f"{call} has no option {name!r}{remedy}")
        if field in said:
            raise ConfigError(f"{said[field]} and {name} are two names of one option: give one")
        said[field], values[field] = name, _convert(name, value, hints[field])
    options = kind(**values)
    check_values(options, said)
    return options


def _list_names(hint: Any) -> list[str]:
    return [flag.removeprefix("--").replace("-", "_") for flag in list_flags(hint) if flag.startswith("--")]


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Return a value of the option's type. Types that cannot be mistaken are converted: texts to paths, integers to floats."""
    kind = hint.__origin__ if find_metadata(hint, object) is not None else hint
    parts = [part for part in get_args(kind) if part is not NoneType] if get_origin(kind) is not Literal else []
    if value is None and (kind is NoneType or NoneType in get_args(kind)):
        return None
    if get_origin(kind) is tuple:
        one = get_args(kind)[0]
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{name} is {value!r}, but a list is needed")
        return tuple(_convert_one(name, entry, one) for entry in value)
    return _convert_one(name, value, *(parts or [kind]))


def _convert_one(name: str, value: Any, *kinds: Any) -> Any:
    plain = [str if get_origin(kind) is Literal else kind for kind in kinds]
    if type(value) in plain:
        return value
    if isinstance(value, str | Path) and (Path in plain or str in plain):
        return Path(value) if Path in plain and str not in plain else str(value)
    if float in plain and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if str in plain and isinstance(value, bool):  # options such as --bind-cores True
        return str(value)
    raise ConfigError(f"{name} is {value!r}, but {_WORDS.get(plain[0], 'another type')} is needed")
