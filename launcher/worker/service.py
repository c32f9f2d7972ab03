"""One rank's part of `tandem serve`: all ranks agree on the new messages from the front, take a step, and report.

The front receives every token, and twice a second the timings of each rank.
"""

import time
from collections import deque
from collections.abc import Callable
from statistics import median

import torch

from launcher.host.process_memory import read_rss_bytes
from launcher.job.codec import read_commands, write
from launcher.job.messages import Add, Cancel, Command, End, Event, Failures, RankReport, Refused, Report, Scores, Tokens
from model.engine.generation import Engine
from model.engine.request import Request
from parallel.collectives import Collectives

Inbox = Callable[[float], list[Command]]
"""Returns the pending commands; waits up to the given number of seconds for the first one."""

IDLE_SECONDS = 0.5
"""Interval between rounds of idle ranks, each of which shows the front that all ranks respond."""
_REPORT_SECONDS = 0.5
_STEPS = 32
"""Number of recent steps over which medians are computed."""
_PAYLOAD_COLUMNS = 4096


class RankService:
    """The service loop of one rank."""

    def __init__(
        self,
        engine: Engine,
        collectives: Collectives,
        read_gather_nanoseconds: Callable[[], int],
        inbox: Inbox,
        emit: Callable[[Event], None],
        count_device_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self._engine, self._collectives = engine, collectives
        self._read_gather_nanoseconds, self._inbox, self._emit = read_gather_nanoseconds, inbox, emit
        self._count_device_bytes = count_device_bytes
        self._step = (0.0, 0.0)
        self._steps: list[deque[tuple[float, float]]] = [deque(maxlen=_STEPS) for _ in range(collectives.world_size)]
        self._reported = 0.0
        self._is_ending = False

    def run(self) -> None:
        """Serve until the front ends it."""
        while not self._is_ending or self._engine.has_unfinished:
            commands: list[Command] = []
            if self._collectives.rank == 0:
                commands = self._inbox(0.0 if self._engine.has_unfinished else IDLE_SECONDS)
            everyone, commands = self._agree(commands)
            for command in commands:
                self._heed(command)
            if self._engine.has_unfinished:
                self._take_step()
            if self._collectives.rank == 0 and time.monotonic() > self._reported + _REPORT_SECONDS:
                self._report(everyone)

    def add(self, request: Request) -> None:
        """Queue a request. A request that cannot run fails alone, with the same error on every rank."""
        try:
            self._engine.add(request)
        except (ValueError, TypeError, OverflowError) as error:  # a RequestError is a ValueError
            if self._collectives.rank == 0:
                self._emit(Refused(request.index, str(error)))

    def _heed(self, command: Command) -> None:
        match command:
            case Add():
                self.add(command.request)
            case Cancel():
                self._engine.cancel(command.index)
            case End():
                self._is_ending = True

    def _take_step(self) -> None:
        waited, started = self._read_gather_nanoseconds(), time.perf_counter()
        events = self._engine.step()
        took = time.perf_counter() - started
        self._step = took, (self._read_gather_nanoseconds() - waited) * 1e-9
        scores = self._engine.take_scores()
        if scores and self._collectives.rank == 0:
            self._emit(Scores(tuple(scores)))
        if events and self._collectives.rank == 0:
            self._emit(Tokens(tuple(events)))
        if self._engine.failures:
            self._emit(Failures(tuple(self._engine.failures)))

    def _agree(self, commands: list[Command]) -> tuple[list[list[float]], list[Command]]:
        """Gather the step times of all ranks and distribute rank 0's commands."""
        collectives, world_size = self._collectives, self._collectives.world_size
        payload = write(commands).encode() if commands else b""
        mine = torch.tensor([[len(payload), *self._step, read_rss_bytes(), self._count_device_bytes()]], dtype=torch.float64)
        self._step = 0.0, 0.0
        rows = collectives.gather_columns(mine, [mine.shape[1]] * world_size).view(world_size, -1).tolist()
        size = int(rows[0][0])
        for steps, row in zip(self._steps, rows, strict=True):
            if row[1]:
                steps.append((row[1], row[2]))
        if size and world_size > 1:
            commands = read_commands(self._share(payload, size))
        return rows, commands

    def _share(self, payload: bytes, size: int) -> bytes:
        """Broadcast rank 0's bytes, as rows of equal width to which the other ranks contribute no columns."""
        collectives, count = self._collectives, -(-size // _PAYLOAD_COLUMNS)
        sizes = [_PAYLOAD_COLUMNS] + [0] * (collectives.world_size - 1)
        local = torch.empty((count, sizes[collectives.rank]), dtype=torch.uint8)
        if collectives.rank == 0:
            padded = bytearray(payload.ljust(count * _PAYLOAD_COLUMNS))
            local = torch.frombuffer(padded, dtype=torch.uint8).view(count, -1)
        whole = collectives.gather_columns(local, sizes)
        return whole.numpy().tobytes()[:size]

    def _report(self, rows: list[list[float]]) -> None:
        self._reported = time.monotonic()
        engine = self._engine
        ranks = [
            RankReport(
                step_seconds=median(step for step, _ in steps) if steps else None,
                gather_seconds=median(gather for _, gather in steps) if steps else None,
                rss_bytes=int(row[3]),
                device_bytes=int(row[4]),
            )
            for steps, row in zip(self._steps, rows, strict=True)
        ]
        self._emit(
            Report(
                ranks=tuple(ranks),
                slowest_seconds=max((step for step, _ in self._steps[0]), default=0.0),
                blocks_used=engine.num_used_blocks,
                prefill_tokens=engine.times.prefill_tokens,
                prefix_queries=engine.counts.prefix_queries,
                prefix_hits=engine.counts.prefix_hits,
                preemptions=engine.counts.preemptions,
                speculated_tokens=engine.times.speculated_tokens,
                accepted_tokens=engine.times.accepted_tokens,
            )
        )
