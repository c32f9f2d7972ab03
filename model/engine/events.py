"""What the token generator gives: new tokens, log-probabilities of prompts, and sequences that ended without their next token.

Plain values of ids and numbers.
"""

from dataclasses import dataclass

from model.engine.choice import Choice


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token."""

    index: int
    """The request's number."""
    token_id: int
    """The token."""
    logprob: float | None
    """Its log-probability, where asked for."""
    finish_reason: str | None
    """"eos" or "length" with the last token."""
    position: int
    """How many new tokens came before it."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of the likeliest tokens there, where asked for."""


@dataclass(frozen=True, slots=True)
class SequenceFailure:
    """A sequence that ended without its next token."""

    index: int
    """The request's number."""
    position: int
    """How many new tokens it has."""
    message: str
    """Why, and what to do."""
    by_request: bool = False
    """Whether the request excludes every token, rather than the model having none."""


@dataclass(frozen=True, slots=True)
class PromptScore:
    """One token of a prompt whose log-probabilities were asked for; the first token has none."""

    index: int
    """The request's number."""
    position: int
    """Of the token in the prompt."""
    choice: Choice
    """The token with its log-probability, and the most likely ones."""
