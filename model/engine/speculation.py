"""Prompt-lookup speculation: draft the tokens that followed the last occurrence of a sequence's current suffix.

Wrong draft tokens cost batch rows but never change the result, since only tokens that the model chooses are accepted. A sequence whose
draft tokens are rejected drafts fewer, and less often.
"""

MAX_DRAFT = 8
"""Maximum draft tokens per pass of prompt lookup."""
DEFAULT_DRAFT_TOKENS, MAX_DRAFT_TOKENS = 4, 32
"""Maximum draft tokens per pass of a draft model: unless specified, and the largest that may be."""
_LENGTHS = (3, 2, 1)
"""Suffix lengths to match, longest first."""
_FREE_MISSES, _LONGEST_PAUSE = 2, 16
"""Number of consecutive fully rejected drafts before pausing, and the maximum pause in tokens."""


class DraftPace:
    """How many tokens to draft for one sequence: fewer, and less often, after rejections."""

    def __init__(self, most: int) -> None:
        """`most`: maximum draft tokens per pass."""
        self._most = self._limit = most
        self._pause = self._misses = 0

    def plan(self) -> int:
        """Return the maximum for the next pass; 0 while paused."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._limit

    def judge(self, drafted: int, accepted: int) -> None:
        """Record how many of the last draft tokens were accepted."""
        self._misses = 0 if accepted else self._misses + 1
        self._pause = min(_LONGEST_PAUSE, 2 ** (self._misses - _FREE_MISSES)) if self._misses > _FREE_MISSES else 0
        self._limit = self._most if accepted == drafted else accepted + 1


class PromptLookup:
    """Index of the n-grams of one sequence."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self.pace = DraftPace(MAX_DRAFT)
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
        count = max(0, min(count, self.pace.plan()))
        for length in _LENGTHS if count else ():
            place = self._followed_at.get(tuple(self._ids[-length:])) if length <= len(self._ids) else None
            if place is not None:
                return tuple(self._ids[place : place + count])
        return ()

    def judge(self, guessed: int, right: int) -> None:
        """Record how many of the last draft tokens were accepted."""
        self.pace.judge(guessed, right)
