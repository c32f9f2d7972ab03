"""Alternating rounds and what follows from them: the order of programs, and ratios between two of them.

The machine is shared and drifts, so figures are compared within a round only: a ratio for each round, then their median and spread.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Figures = Mapping[str, float]
"""Of one program in one round: metric to tokens a second."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Some figures of the same thing."""

    median: float
    least: float
    most: float
    count: int


def rotate_order(names: Sequence[str], index: int) -> list[str]:
    """The order of round `index`: everybody is first, second, … equally often, so that none always finds the warmer machine."""
    start = index % len(names)
    return [*names[start:], *names[:start]]


def spread(values: Sequence[float]) -> Spread:
    """Median, least and most of at least one figure."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def collect(rounds: Sequence[Mapping[str, Figures]], name: str, metric: str) -> list[float]:
    """One program's figures of one metric, in order of rounds; rounds without it are left out."""
    return [figures[name][metric] for figures in rounds if metric in figures.get(name, {})]


def list_metrics(rounds: Sequence[Mapping[str, Figures]]) -> list[str]:
    """All that anybody gave, `prefill` first, then decode by batch size."""
    found = {metric for figures in rounds for one in figures.values() for metric in one}
    return sorted(found, key=lambda metric: (metric.startswith("decode"), int(metric.partition("@")[2] or 0)))


def compare(rounds: Sequence[Mapping[str, Figures]], mine: Sequence[str], theirs: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every metric that one of `mine` and one of `theirs` have in the same round: the spread of mine / theirs."""
    rows = []
    for metric in list_metrics(rounds):
        for peer in theirs:
            for own in mine:
                ratios = [
                    figures[own][metric] / figures[peer][metric]
                    for figures in rounds
                    if metric in figures.get(own, {}) and figures.get(peer, {}).get(metric)
                ]
                if ratios:
                    rows.append({"metric": metric, "tandem": own, "peer": peer, **asdict(spread(ratios))})
    return rows
