"""Prompt-lookup speculation: draft the tokens that followed the last occurrence of a sequence's current suffix.

Wrong draft tokens cost batch rows but never change the result, since only tokens that the model chooses are accepted. A sequence whose
draft tokens are rejected drafts fewer, and less often.
"""

MAX_DRAFT = 8
"""Maximum draft tokens per pass."""
_LENGTHS = (3, 2, 1)
"""Suffix lengths to match, longest first."""


_FREE_MISSES, _LONGEST_PAUSE = 2, 16
"""Number of consecutive fully rejected drafts before pausing, and the maximum pause in tokens."""


class PromptLookup:
    """Index of the n-grams of one sequence."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._limit, self._pause, self._misses = MAX_DRAFT, 0, 0
        self._followed_at: dict[tuple[int, ...], int] = {}
        """For each n-gram, the position after its last occurrence."""

    def extend(self, ids: list[int] | tuple[int, ...]) -> None:
        """Append tokens of the sequence."""
        for token in ids:
            for length in _LENGTHS:
                if length <= len(self._ids):
                    self._followed_at[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(token)

    def draft(self, count: int) -> tuple[int, ...]:
        """Return up to `count` draft tokens; none if the suffix is new, or while paused after rejections."""
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
        """Record how many of the last draft tokens were accepted."""
        self._misses = 0 if right else self._misses + 1
        self._pause = min(_LONGEST_PAUSE, 2 ** (self._misses - _FREE_MISSES)) if self._misses > _FREE_MISSES else 0
        self._limit = MAX_DRAFT if right == guessed else right + 1
