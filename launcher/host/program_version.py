"""The version of this program."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def read_version() -> str:
    """Return the installed version."""
    with suppress(PackageNotFoundError):
        return version("tandem-launcher")
    return "not installed"
