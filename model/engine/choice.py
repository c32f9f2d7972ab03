"""The token that sampling chose for one sequence."""

from typing import NamedTuple


class Choice(NamedTuple):
    """A chosen token."""

    token_id: int
    logprob: float | None
    """If requested."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of the most likely tokens in descending order, if requested."""
    rank: int = 0
    """Place among all tokens by log-probability, from 1, if that is reported."""


NO_TOKEN = Choice(-1, None)
"""The result where grammar and restrictions together allow no token."""
