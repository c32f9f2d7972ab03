"""Which of several sources of a setting counts."""

from typing import Any


def first_not_none(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)
