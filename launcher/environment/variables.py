"""Parsers for environment variables: counts, ports, and Slurm's notations. Error messages name the variable."""

import math
import re
import zlib

from parallel.errors import ConfigError

_MAX_PORT = 65535
_NO_LIMIT_SECONDS = 365 * 24 * 3600.0
_FIRST_DERIVED_PORT = 20000
_NUM_DERIVED_PORTS = 10000
"""Derived ports go up to 29999, below Linux's ephemeral ports from 32768."""

Given = tuple[str, str]
"""Name and value of a variable."""


def parse_text(given: Given) -> str:
    """Strip surrounding whitespace."""
    return given[1].strip()


def parse_number(given: Given) -> int:
    """Parse an integer of at least 0."""
    name, text = given
    if (number := find_number(given)) is None:
        raise ConfigError(f"{name} is {text!r}, but a whole number of at least 0 is needed")
    return number


def parse_count(given: Given) -> int:
    """Parse an integer of at least 1."""
    count = parse_number(given)
    if count < 1:
        raise ConfigError(f"{given[0]} is {count}, but a whole number of at least 1 is needed")
    return count


def parse_time_limit(given: Given) -> float:
    """Parse seconds; a negative number means no limit, which is a year."""
    name, text = given
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds or not math.isfinite(seconds):
        raise ConfigError(f"{name} is {text!r}, but seconds are needed, or -1 for no limit")
    return min(seconds, _NO_LIMIT_SECONDS) if seconds > 0 else _NO_LIMIT_SECONDS


def parse_port(given: Given) -> int:
    """Parse a TCP port."""
    port = parse_count(given)
    if port > _MAX_PORT:
        raise ConfigError(f"{given[0]} is {port}, but a port of at most {_MAX_PORT} is needed")
    return port


def parse_first_host(given: Given) -> str:
    """Return the first host of Slurm's `node[01-03,7],other`, keeping leading zeros."""
    name, text = given
    first = re.match(r"(?:[^,\[\]]|\[\w[^\[\]]*\])+(?=,|$)", text.strip())
    if first is None:
        raise ConfigError(f"{name} is {text!r}, but hosts such as node[01-03,7] are needed; export MASTER_ADDR with the name of the first")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def parse_local_tasks(tasks: Given, node: Given) -> int | None:
    """Return the number of tasks on a node from Slurm's `2(x3),1`; None if it lists fewer nodes."""
    counts: list[int] = []
    for part in tasks[1].strip().split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if match is None:
            raise ConfigError(f"{tasks[0]} is {tasks[1]!r}, but tasks of each node such as 2(x3),1 are needed")
        counts += [int(match[1])] * int(match[2] or 1)
    number = parse_number(node)
    return counts[number] if number < len(counts) else None


def derive_port(*key: Given) -> int:
    """Derive a port that is equal in all processes of a launch, and probably different in the next."""
    return _FIRST_DERIVED_PORT + zlib.crc32(join_texts(*key).encode()) % _NUM_DERIVED_PORTS


def find_number(given: Given) -> int | None:
    """Parse an integer of at least 0; None for any other text."""
    text = given[1].strip()
    return int(text) if text.isascii() and text.isdecimal() else None


def join_texts(*key: Given) -> str:
    """Join the values with dots."""
    return ".".join(parse_text(given) for given in key)
