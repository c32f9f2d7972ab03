"""What a format does with each key of its settings: read, required to have a value, ignored with a warning, harmless, or unknown.

A table per format is the one place that says it; docs/formats.md is tested against the tables. Depends on nothing of a format.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model.spec.quoting import quote, quote_name
from parallel.errors import ConfigError

_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTable:
    """The keys of one section of settings."""

    name: str
    """The section, for messages and the documentation."""
    read: frozenset[str]
    """Keys whose values are used; whoever uses them checks them."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that change the arithmetic, with the values that are supported; null and a missing key are. The rest is refused."""
    ignored: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that the reference implementation ignores for Llama, with the values that mean nothing; others are reported."""
    harmless: frozenset[str] = frozenset()
    """Keys that never change a result."""
    harmless_prefixes: tuple[str, ...] = ()
    """Beginnings of such keys."""

    def check(self, values: Mapping[str, Any], source: str) -> None:
        """Raise ConfigError for a value of a `fixed` key that is not supported."""
        for key, allowed in self.fixed.items():
            value = values.get(key)
            if value is not None and not _is_one_of(value, allowed):
                raise ConfigError(f"{source}: {key} is {quote(value)}, but only {_name_values(allowed)} is supported")

    def describe(self, values: Mapping[str, Any], source: str) -> list[str]:
        """What is not used of `values`, at most one line for ignored keys and one for unknown ones."""
        ignored = [
            f"{key} is {quote(values[key])}"
            for key, neutral in self.ignored.items()
            if values.get(key) is not None and not _is_one_of(values[key], neutral)
        ]
        unread = [quote_name(key) for key in values if not self.knows(key)]
        lines = []
        if ignored:
            lines.append(f"{source}: {_shorten(ignored)}: ignored, as transformers ignores it for Llama")
        if unread:
            lines.append(f"{source}: unknown keys, not read: {_shorten(unread)}")
        return lines

    def knows(self, key: str) -> bool:
        """Whether the table says what becomes of a key."""
        return (
            key in self.read
            or key in self.fixed
            or key in self.ignored
            or key in self.harmless
            or (bool(self.harmless_prefixes) and key.startswith(self.harmless_prefixes))
        )

    def list_keys(self) -> list[str]:
        """Every key that the table names."""
        return sorted({*self.read, *self.fixed, *self.ignored, *self.harmless, *self.harmless_prefixes})


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Equal to one of them, or a list of such; where none is named, an empty container."""
    if isinstance(value, (list, dict)) and not value:
        return not allowed
    if isinstance(value, list):
        return all(_is_one_of(one, allowed) for one in value)
    return any(value == one and isinstance(value, (bool, int, float)) == isinstance(one, (bool, int, float)) for one in allowed)


def _name_values(allowed: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in allowed) or "null"


def _shorten(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
