"""Incremental search for stop strings.

A stop string may name a special token (`<|eot|>`) or span one, so the search covers the answer both with and without the text of its
special tokens. Only text without special tokens is returned.
"""

from collections.abc import Sequence
from itertools import compress


class StopSearch:
    """Stop search in one answer. Text that may turn out to be the start of a stop string is held back."""

    def __init__(self, stops: Sequence[str], *, keeps_stop: bool = False) -> None:
        """`keeps_stop`: whether the text ends after the stop string rather than before it."""
        self._stops, self._keeps_stop = tuple(stops), keeps_stop
        self.found: str | None = None
        """The stop string that ended the answer."""
        self._longest = max(map(len, self._stops), default=1) - 1
        self._held = ""
        self._shown: list[bool] = []
        """For each held character, whether it is part of the answer; text of special tokens is not."""

    def add(self, text: str, *, shown: bool = True) -> None:
        """Append text to the answer; `shown` is False for the text of a special token."""
        self._held += text
        self._shown += [shown] * len(text)

    def take(self, *, is_end: bool) -> tuple[str, bool]:
        """Return the text that can be released, all of it at the end, and whether a stop string was found, before which the text ends."""
        places = [place for place, shown in enumerate(self._shown) if shown]
        visible = self._held if len(places) == len(self._held) else "".join(compress(self._held, self._shown))
        # The stop string completed first wins, independent of token boundaries; of several, the longest.
        found = [(place + len(stop), place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if visible is not self._held:
            starts = [(visible.find(stop), stop) for stop in self._stops]
            found += [(places[start + len(stop) - 1] + 1, places[start], stop) for start, stop in starts if start >= 0]
        if found:
            end, start, self.found = min(found)
            text = "".join(compress(self._held[: end if self._keeps_stop else start], self._shown))
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
        """Return the length of the longest suffix of `text` with which a stop string begins."""
        sizes = range(min(self._longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
