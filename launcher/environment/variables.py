"""What the text of an environment variable means: counts, ports, and the notations of Slurm.

Names the variable in its messages; knows neither launchers nor the variables of this process.
"""

import re
import zlib

from parallel.errors import ConfigError

_MAX_PORT = 65535
_FIRST_DERIVED_PORT = 20000
_NUM_DERIVED_PORTS = 10000
"""Up to 29999: below the ports that Linux hands out by itself, 32768 and above."""

Given = tuple[str, str]
"""Name and text of a variable."""


def parse_text(given: Given) -> str:
    """The text without blanks around it."""
    return given[1].strip()


def parse_number(given: Given) -> int:
    """A whole number of at least 0."""
    name, text = given
    if (number := find_number(given)) is None:
        raise ConfigError(f"{name} is {text!r}, but a whole number of at least 0 is needed")
    return number


def parse_count(given: Given) -> int:
    """A whole number of at least 1."""
    count = parse_number(given)
    if count < 1:
        raise ConfigError(f"{given[0]} is {count}, but a whole number of at least 1 is needed")
    return count


def parse_port(given: Given) -> int:
    """A TCP port."""
    port = parse_count(given)
    if port > _MAX_PORT:
        raise ConfigError(f"{given[0]} is {port}, but a port of at most {_MAX_PORT} is needed")
    return port


def parse_first_host(given: Given) -> str:
    """The first host of Slurm's `node[01-03,7],other`, with its leading zeros."""
    name, text = given
    first = re.match(r"(?:[^,\[\]]|\[\w[^\[\]]*\])+(?=,|$)", text.strip())
    if first is None:
        raise ConfigError(f"{name} is {text!r}, but hosts such as node[01-03,7] are needed; export MASTER_ADDR with the name of the first")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def parse_local_tasks(tasks: Given, node: Given) -> int | None:
    """How many tasks Slurm's `2(x3),1` gives to a node, None when it tells of fewer nodes."""
    counts: list[int] = []
    for part in tasks[1].strip().split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if match is None:
            raise ConfigError(f"{tasks[0]} is {tasks[1]!r}, but tasks of each node such as 2(x3),1 are needed")
        counts += [int(match[1])] * int(match[2] or 1)
    number = parse_number(node)
    return counts[number] if number < len(counts) else None


def derive_port(*key: Given) -> int:
    """The same port in all processes of a launch, and probably another in the next."""
    return _FIRST_DERIVED_PORT + zlib.crc32(join_texts(*key).encode()) % _NUM_DERIVED_PORTS


def find_number(given: Given) -> int | None:
    """A whole number of at least 0, None for any other text."""
    text = given[1].strip()
    return int(text) if text.isascii() and text.isdecimal() else None


def join_texts(*key: Given) -> str:
    """The texts with dots between them."""
    return ".".join(parse_text(given) for given in key)
