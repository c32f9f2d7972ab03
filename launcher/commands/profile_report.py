"""Reports from the spans of `tandem bench --profile`: a terminal table, and a trace for Perfetto and chrome://tracing.

Time is attributed to the innermost span that covers it, otherwise to the operation that must run between two spans: attention between its
two matmuls, and other small operators.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.table import Table

from launcher.job.tasks import DECODE, PREFILL
from parallel.recorder import BARRIER, GATHER

_LAYER = re.compile(r"layers\.(\d+)(?:\.(.+))?$")
_SEPARATE = re.compile(r"\.linears\.\d+$")
ATTENTION, OTHER = "attention", "other"
_BETWEEN = {"qkv_proj": ATTENTION}
"""Operation that runs after a module and before the next, if it is more than small operators."""

Span = Sequence[int]
"""Name index, start and duration in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous part of one rank's time."""

    phase: str
    """PREFILL or DECODE."""
    layer: int | None
    """Decoder layer, or None outside of them."""
    operation: str
    """Operation name shown in the table."""
    start: int
    """Start in nanoseconds."""
    duration: int
    """Duration in nanoseconds."""
    span: int | None = None
    """Index of the span if this is a complete one; None for time between spans."""


class _Walk:
    """Cuts the spans of one rank into pieces in order of time."""

    def __init__(self, names: Sequence[str], spans: Sequence[Span]) -> None:
        self._names, self._spans = names, spans
        self._order = sorted(range(len(spans)), key=lambda index: (spans[index][1], -spans[index][2]))
        self._next = 0
        self._phase, self._layer, self._last = "", None, ""  # type: str, int | None, str
        self.pieces: list[Piece] = []

    def run(self) -> list[Piece]:
        """Return the pieces of all steps; time outside of steps is ignored."""
        while self._next < len(self._order):
            index = self._order[self._next]
            self._next += 1
            name = self._names[self._spans[index][0]]
            if name in (PREFILL, DECODE):
                self._phase, self._layer, self._last = name, None, ""
                self._enter(index, container=True)
        return self.pieces

    def _enter(self, index: int, *, container: bool) -> None:
        """Process one span: its children and the time between them."""
        number, start, duration = self._spans[index]
        cursor, end, first = start, start + duration, len(self.pieces)
        own = self._operation(self._names[number])
        while self._next < len(self._order) and self._spans[self._order[self._next]][1] < end:
            child = self._order[self._next]
            self._next += 1
            self._give_between(cursor, self._spans[child][1], None if container else own)
            name = self._names[self._spans[child][0]]
            found = _LAYER.match(name)
            self._layer = int(found[1]) if found else self._layer if name in (GATHER, BARRIER, ATTENTION) else None
            self._enter(child, container=bool(found and not found[2]))
            cursor = self._spans[child][1] + self._spans[child][2]
        if len(self.pieces) == first and not container:
            self.pieces.append(Piece(self._phase, self._layer, own, start, duration, index))
        else:
            self._give_between(cursor, end, None if container else own)
        if not container and own.split(" ")[0] != GATHER:
            self._last = own

    def _give_between(self, start: int, end: int, inside: str | None) -> None:
        if end > start:
            self.pieces.append(Piece(self._phase, self._layer, inside or _BETWEEN.get(self._last, OTHER), start, end - start))

    def _operation(self, name: str) -> str:
        if name == GATHER:
            return f"{GATHER} after {_BETWEEN.get(self._last, self._last)}" if self._last else GATHER
        found = _LAYER.match(name)
        return _SEPARATE.sub("", found[2] or OTHER if found else name)


def cut_spans(names: Sequence[str], spans: Sequence[Span]) -> list[Piece]:
    """Attribute the time of all steps of one rank."""
    return _Walk(names, spans).run()


def find_waits(names: Sequence[str], ranks: Sequence[Sequence[Span]]) -> list[dict[int, int]]:
    """For each rank, return the time in nanoseconds that each gather (by span index) waited for the last rank to arrive.

    All ranks execute the same gathers in the same order; if their counts differ, the result is empty.
    """
    order = [[index for index, span in enumerate(spans) if names[span[0]] == GATHER] for spans in ranks]
    waits: list[dict[int, int]] = [{} for _ in ranks]
    if len({len(gathers) for gathers in order}) > 1:
        return waits
    for same in zip(*order, strict=True):
        last = max(spans[index][1] for spans, index in zip(ranks, same, strict=True))
        for rank, index in enumerate(same):
            _, start, duration = ranks[rank][index]
            waits[rank][index] = min(last - start, duration)
    return waits


def build_trace(profile: dict[str, Any]) -> dict[str, Any]:
    """Build a trace in Chrome's format: one process per rank, timestamps in microseconds of CLOCK_MONOTONIC."""
    names, ranks = profile["names"], profile["ranks"]
    kinds = {GATHER: "collective", BARRIER: "collective", PREFILL: "step", DECODE: "step"}
    events: list[dict[str, Any]] = []
    for rank, (spans, waits) in enumerate(zip(ranks, find_waits(names, ranks), strict=True)):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        for index, (number, start, duration) in enumerate(spans):
            name = names[number]
            event = {"ph": "X", "name": name, "cat": kinds.get(name, "module"), "pid": rank, "tid": 0}
            event.update(ts=start / 1e3, dur=duration / 1e3)
            if index in waits:
                event["args"] = {"waiting_us": waits[index] / 1e3}
            events.append(event)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def print_profile(profile: dict[str, Any], file: TextIO) -> None:
    """Print two tables of means over the ranks: by operation and by layer."""
    names, ranks = profile["names"], profile["ranks"]
    all_waits = find_waits(names, ranks)
    # By (operation or layer, phase): time, waiting time, calls.
    sums: dict[tuple[object, str], list[float]] = defaultdict(lambda: [0, 0, 0])
    steps = {phase: max(1, sum(names[span[0]] == phase for span in ranks[0])) for phase in (PREFILL, DECODE)}
    for spans, waits in zip(ranks, all_waits, strict=True):
        for piece in cut_spans(names, spans):
            wait = waits.get(piece.span, 0) if piece.span is not None else 0
            for key in (piece.operation, piece.layer, "all"):
                row = sums[key, piece.phase]
                row[0] += piece.duration / 1e6 / len(ranks) / steps[piece.phase]
                row[1] += wait / 1e6 / len(ranks) / steps[piece.phase]
                row[2] += (piece.span is not None) / len(ranks) / steps[piece.phase]
    operations = sorted({key for key, _ in sums if isinstance(key, str)} - {"all"}, key=lambda key: -sums[key, DECODE][0])
    layers = sorted(key for key in {key for key, _ in sums} if isinstance(key, int))
    rows: list[tuple[str, object]] = [*((name, name) for name in operations), ("all", "all")]
    by_layer: list[tuple[str, object]] = [*((f"layer {layer}", layer) for layer in layers), ("outside", None), ("all", "all")]
    for title, entries in (("by operation", rows), ("by layer", by_layer)):
        table = Table(title, "decode ms/step", "share", "of it waiting", "calls", "prefill ms", "share", "of it waiting")
        for words, row_key in entries:
            cells = []
            for phase in (DECODE, PREFILL):
                took, waited, calls = sums[row_key, phase]
                cells += [f"{took:.3f}", f"{took / max(1e-9, sums['all', phase][0]):.1%}", f"{waited:.3f}"]
                cells += [f"{calls:.0f}"] if phase == DECODE else []
            table.add_row(words, *cells)
        Terminal(file=file, width=130).print(table)
    if len(ranks) > 1:
        print("Mean over the ranks. Waiting: until the last rank reached the gather; the rest of a gather is copying.", file=file)
