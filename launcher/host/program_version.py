"""The version of this program."""

from contextlib import suppress


def read_version() -> str:
    """Return the installed version."""
    from importlib.metadata import PackageNotFoundError, version  # only here: it takes a twentieth of a refusal

    with suppress(PackageNotFoundError):
        return version("tandem-launcher")
    return "not installed"
