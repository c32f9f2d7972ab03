"""Guesses the next tokens of a sequence from its own past: what followed the last time that it ended like this.

Guesses cost rows of a pass, not truth: a token counts only where the model chooses it too. So a sequence whose guesses were wrong
guesses less, and more seldom. Knows ids; no model, no tensors.
"""

MAX_DRAFT = 8
"""Guessed tokens in a pass at most."""
_LENGTHS = (3, 2, 1)
"""Tokens that have to be the same, the longest first."""


_FREE_MISSES, _LONGEST_PAUSE = 2, 16
"""So often in a row all guesses may be wrong; then come tokens without guesses, up to so many."""


class PromptLookup:
    """The past of one sequence, by what it holds."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._limit, self._pause, self._misses = MAX_DRAFT, 0, 0
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
        """Up to `count` guesses; none, where the end of the sequence is new, and for a while after wrong ones."""
        if self._pause:
            self._pause -= 1
            return ()
        count = max(0, min(count, self._limit))
        for length in _LENGTHS:
            place = self._followed_at.get(tuple(self._ids[-length:])) if length <= len(self._ids) else None
            if place is not None:
                return tuple(self._ids[place : place + count])
        return ()

    def judge(self, guessed: int, right: int) -> None:
        """So many of the last guesses were right."""
        self._misses = 0 if right else self._misses + 1
        self._pause = min(_LONGEST_PAUSE, 2 ** (self._misses - _FREE_MISSES)) if self._misses > _FREE_MISSES else 0
        self._limit = MAX_DRAFT if right == guessed else right + 1
