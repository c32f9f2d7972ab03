"""The search for stop texts in an answer as it grows.

Stop texts are looked for in the answer with the text of its special tokens and in the answer without it, since a client may mean either:
`<|eot|>`, or a text that a special token interrupts. Only text without special tokens is given out. Depends on no tokenizer.
"""

from collections.abc import Sequence
from itertools import compress


class StopSearch:
    """One answer. What may become a stop text is held back until that is known."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=1) - 1
        self._held = ""
        self._shown: list[bool] = []
        """Of each held character, whether it belongs to the answer: text of special tokens does not."""

    def add(self, text: str, *, shown: bool = True) -> None:
        """The answer grows by a text, or where not `shown` by the text of a special token."""
        self._held += text
        self._shown += [shown] * len(text)

    def take(self, *, is_end: bool) -> tuple[str, bool]:
        """What can be given out now, everything at the end; and whether a stop text is complete, which ends the answer before it."""
        places = [place for place, shown in enumerate(self._shown) if shown]
        visible = self._held if len(places) == len(self._held) else "".join(compress(self._held, self._shown))
        # The stop text that is complete first counts, however characters are dealt to tokens; of several the longest.
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if visible is not self._held:
            starts = [(visible.find(stop), len(stop)) for stop in self._stops]
            found += [(places[start + length - 1] + 1, places[start]) for start, length in starts if start >= 0]
        if found:
            start = min(found)[1]
            text = "".join(compress(self._held[:start], self._shown))
            self._held, self._shown = "", []
            return text, True
        keep = 0
        if not is_end:
            keep = self._count_begun(self._held)
            if visible is not self._held and (begun := self._count_begun(visible)):
                keep = max(keep, len(self._held) - places[-begun])
        given = len(self._held) - keep
        text = "".join(compress(self._held[:given], self._shown))
        self._held, self._shown = self._held[given:], self._shown[given:]
        return text, False

    def _count_begun(self, text: str) -> int:
        """Characters at the end of a text with which a stop text begins."""
        sizes = range(min(self._longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
