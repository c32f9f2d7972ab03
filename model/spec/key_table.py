"""How a format handles each key of its settings: read, required to have a certain value, ignored with a warning, harmless, or unknown.

Each format has one table; docs/formats.md is tested against the tables.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model.spec.quoting import quote, quote_name
from parallel.errors import ConfigError

_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTable:
    """The keys of one settings section."""

    name: str
    """Name of the section, for messages and the documentation."""
    read: frozenset[str]
    """Keys whose values are used; their readers validate them."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that change the arithmetic, with the supported values, in addition to null and missing. All others are rejected."""
    ignored: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that the reference implementation ignores, with the values that have no effect; other values are reported."""
    harmless: frozenset[str] = frozenset()
    """Keys that never affect the result."""
    harmless_prefixes: tuple[str, ...] = ()
    """Prefixes of such keys."""

    def adapt(
        self,
        name: str,
        *,
        read: Iterable[str] = (),
        fixed: Mapping[str, tuple[Any, ...]] | None = None,
        ignored: Mapping[str, tuple[Any, ...]] | None = None,
        harmless: Iterable[str] = (),
    ) -> "KeyTable":
        """Return the table of a similar section, in which these keys are handled in another way."""
        moved = {*read, *(fixed or {}), *(ignored or {}), *harmless}
        return KeyTable(
            name=name,
            read=(self.read - moved) | set(read),
            fixed={key: value for key, value in self.fixed.items() if key not in moved} | dict(fixed or {}),
            ignored={key: value for key, value in self.ignored.items() if key not in moved} | dict(ignored or {}),
            harmless=(self.harmless - moved) | set(harmless),
            harmless_prefixes=self.harmless_prefixes,
        )

    def check(self, values: Mapping[str, Any], source: str) -> None:
        """Raise ConfigError for an unsupported value of a `fixed` key."""
        for key, allowed in self.fixed.items():
            value = values.get(key)
            if value is not None and not _is_one_of(value, allowed):
                raise ConfigError(f"{source}: {key} is {quote(value)}, but only {_name_values(allowed)} is supported")

    def describe(self, values: Mapping[str, Any], source: str) -> list[str]:
        """Describe the unused part of `values`: at most one line for ignored keys and one for unknown ones."""
        ignored = [
            f"{key} is {quote(values[key])}"
            for key, neutral in self.ignored.items()
            if values.get(key) is not None and not _is_one_of(values[key], neutral)
        ]
        unread = [quote_name(key) for key in values if not self.knows(key)]
        lines = []
        if ignored:
            lines.append(f"{source}: {_shorten(ignored)}: ignored, as in transformers")
        if unread:
            lines.append(f"{source}: unknown keys, not read: {_shorten(unread)}")
        return lines

    def knows(self, key: str) -> bool:
        """Return whether the table defines how a key is handled."""
        return (
            key in self.read
            or key in self.fixed
            or key in self.ignored
            or key in self.harmless
            or (bool(self.harmless_prefixes) and key.startswith(self.harmless_prefixes))
        )

    def list_keys(self) -> list[str]:
        """Return every key in the table."""
        return sorted({*self.read, *self.fixed, *self.ignored, *self.harmless, *self.harmless_prefixes})


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Return whether the value equals an allowed one or is a list of such; if none are given, whether it is an empty container."""
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
