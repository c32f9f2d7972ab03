"""Guesses the next tokens of a sequence from its own past: what followed the last time that it ended like this.

Guesses cost rows of a pass, not truth: a token counts only where the model chooses it too. Knows ids; no model, no tensors.
"""

MAX_DRAFT = 8
"""Guessed tokens in a pass at most."""
_LENGTHS = (3, 2, 1)
"""Tokens that have to be the same, the longest first."""


class PromptLookup:
    """The past of one sequence, by what it holds."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}
        """Of every few tokens in a row, where the token behind their last occurrence stands."""

    def extend(self, ids: list[int] | tuple[int, ...]) -> None:
        """The sequence goes on with these."""
        for token in ids:
            for length in _LENGTHS:
                if length <= len(self._ids):
                    self._followed_at[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(token)

    def draft(self, count: int) -> tuple[int, ...]:
        """Up to `count` guesses; none, where the end of the sequence is new."""
        for length in _LENGTHS:
            place = self._followed_at.get(tuple(self._ids[-length:])) if length <= len(self._ids) else None
            if place is not None:
                return tuple(self._ids[place : place + max(0, count)])
        return ()
