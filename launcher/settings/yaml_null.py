"""Unset values of a YAML file."""

from typing import Any


def is_null(value: Any) -> bool:
    """Return whether a value is unset: null, or the word None, which YAML parses as text."""
    return value is None or value == "None"
