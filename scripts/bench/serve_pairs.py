"""Two servers under the same load in alternating rounds: medians over the rounds, and their ratios."""

import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serve_level import Level, Sender

FIGURES = ("tokens_per_second", "first_token_seconds", "between_tokens_seconds", "between_tokens_seconds_99")
"""Fields of a level that are compared."""

Measure = Callable[[Sender, int, str], Awaitable[Level]]
"""Measures one level: what sends, the number of clients, a label for its prompts."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What so many clients saw of both servers, by rounds."""

    clients: int
    ours: list[Level]
    theirs: list[Level]

    def find_ratio(self, figure: str) -> float | None:
        """Median of ours over the median of theirs; None where one of them has no such figure."""
        medians = [_median([getattr(level, figure) for level in levels]) for levels in (self.ours, self.theirs)]
        return medians[0] / medians[1] if medians[0] is not None and medians[1] else None

    def describe(self) -> dict[str, Any]:
        """For the JSON."""
        rounds = {name: [asdict(level) for level in levels] for name, levels in (("ours", self.ours), ("theirs", self.theirs))}
        return {"clients": self.clients, "ratios": {figure: self.find_ratio(figure) for figure in FIGURES}, **rounds}


async def measure_pairs(ours: Sender, theirs: Sender, clients: Sequence[int], rounds: int, measure: Measure) -> list[Pair]:
    """Every level on both servers, `rounds` times, the first of a round in turns."""
    pairs = [Pair(number, [], []) for number in clients]
    for turn in range(rounds):
        for pair in pairs:
            sides = [(ours, pair.ours), (theirs, pair.theirs)]
            for sender, levels in sides if turn % 2 == 0 else reversed(sides):
                print(f"round {turn + 1} of {rounds}, clients: {pair.clients}", file=sys.stderr, flush=True)
                levels.append(await measure(sender, pair.clients, f"round {turn} "))
    return pairs


def print_pairs(pairs: Sequence[Pair]) -> None:
    """The table: medians of both, and ratios."""
    print(f"{'':>8}{'tokens/s':>24}{'first token, ms':>26}{'between, 99 %, ms':>26}")
    print(f"{'clients':>8}" + f"{'ours':>8}{'theirs':>8}{'ratio':>8}" + f"{'ours':>9}{'theirs':>9}{'ratio':>8}" * 2)
    for pair in pairs:
        cells = ""
        for figure, scale, width in (("tokens_per_second", 1, 8), ("first_token_seconds", 1000, 9), ("between_tokens_seconds_99", 1000, 9)):
            medians = [_median([getattr(level, figure) for level in levels]) for levels in (pair.ours, pair.theirs)]
            ratio = pair.find_ratio(figure)
            cells += "".join(f"{'-' if one is None else f'{scale * one:.1f}':>{width}}" for one in medians)
            cells += f"{'-' if ratio is None else f'{ratio:.2f}':>8}"
        failed = sum(sum(level.failures.values()) for level in (*pair.ours, *pair.theirs))
        print(f"{pair.clients:>8}{cells}" + (f"  {failed} failed" if failed else ""))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
