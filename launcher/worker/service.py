"""One rank's part of `tandem serve`: all ranks agree on what has come from the front, take a step, and report.

The front is told of every token; twice a second it gets what each rank's time went to. Knows the engine and collectives; what is asked,
and by whom, is the front's affair.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from msgspec import convert

from launcher.host.process_memory import read_rss_bytes
from model.engine.generation import Engine
from model.engine.request import Request
from parallel.collectives import Collectives

Message = Mapping[str, Any]
Inbox = Callable[[float], list[Message]]
"""Gives what the front has sent; waits up to so many seconds for the first message."""

IDLE_SECONDS = 0.5
"""Between two rounds of ranks that have nothing to do: each shows the front that all of them answer."""
_REPORT_SECONDS = 0.5
_STEPS = 32
"""The last ones, of which medians are told."""
_PAYLOAD_COLUMNS = 4096


class RankService:
    """The loop of one rank."""

    def __init__(
        self,
        engine: Engine,
        collectives: Collectives,
        device: torch.device,
        read_gather_nanoseconds: Callable[[], int],
        inbox: Inbox,
        emit: Callable[[dict[str, Any]], None],
    ) -> None:
        self._engine, self._collectives, self._device = engine, collectives, device
        self._read_gather_nanoseconds, self._inbox, self._emit = read_gather_nanoseconds, inbox, emit
        self._step = (0.0, 0.0)
        self._steps: list[deque[tuple[float, float]]] = [deque(maxlen=_STEPS) for _ in range(collectives.world_size)]
        self._reported = 0.0
        self._is_ending = False

    def run(self) -> None:
        """Serve until the front says that it is over."""
        while not self._is_ending or self._engine.has_unfinished:
            messages: list[Message] = []
            if self._collectives.rank == 0:
                messages = self._inbox(0.0 if self._engine.has_unfinished else IDLE_SECONDS)
            everyone, messages = self._agree(messages)
            for message in messages:
                self._heed(message)
            if self._engine.has_unfinished:
                self._take_step()
            if self._collectives.rank == 0 and time.monotonic() > self._reported + _REPORT_SECONDS:
                self._report(everyone)

    def add(self, request: dict[str, Any]) -> None:
        """Queue a request, as a mapping of its fields. One that cannot run fails alone: what is wrong with it is the same on every rank."""
        try:
            self._engine.add(convert(request, Request))
        except (ValueError, TypeError, OverflowError) as error:  # a RequestError is a ValueError
            if self._collectives.rank == 0:
                self._emit({"event": "refused", "index": request["index"], "message": str(error)})

    def _heed(self, message: Message) -> None:
        kind = message["do"]
        if kind == "add":
            self.add(message["request"])
        elif kind == "cancel":
            self._engine.cancel(message["index"])
        else:
            assert kind == "end", message
            self._is_ending = True

    def _take_step(self) -> None:
        waited, started = self._read_gather_nanoseconds(), time.perf_counter()
        events = self._engine.step()
        took = time.perf_counter() - started
        self._step = took, (self._read_gather_nanoseconds() - waited) * 1e-9
        scores = self._engine.take_scores()
        if scores and self._collectives.rank == 0:
            self._emit({"event": "scores", "scores": [(one.index, one.position, *one.choice) for one in scores]})
        if events and self._collectives.rank == 0:
            tokens = [(e.index, e.position, e.token_id, e.finish_reason, e.logprob, e.top_logprobs) for e in events]
            self._emit({"event": "tokens", "tokens": tokens})
        if self._engine.failures:
            self._emit({"event": "failures", "failures": [(one.index, one.message) for one in self._engine.failures]})

    def _agree(self, messages: list[Message]) -> tuple[list[list[float]], list[Message]]:
        """What every rank says of its last step, and rank 0's messages, on all ranks."""
        collectives, world_size = self._collectives, self._collectives.world_size
        payload = json.dumps(messages).encode() if messages else b""
        mine = torch.tensor([[len(payload), *self._step, read_rss_bytes()]], dtype=torch.float64, device=self._device)
        self._step = 0.0, 0.0
        rows = collectives.gather_columns(mine, [mine.shape[1]] * world_size).view(world_size, -1).tolist()
        size = int(rows[0][0])
        for steps, row in zip(self._steps, rows, strict=True):
            if row[1]:
                steps.append((row[1], row[2]))
        if size and world_size > 1:
            payload = self._share(payload, size)
            messages = json.loads(payload)
        return rows, messages

    def _share(self, payload: bytes, size: int) -> bytes:
        """Rank 0's bytes, on every rank: rows of one width, of which the others have no column."""
        collectives, count = self._collectives, -(-size // _PAYLOAD_COLUMNS)
        sizes = [_PAYLOAD_COLUMNS] + [0] * (collectives.world_size - 1)
        local = torch.empty((count, sizes[collectives.rank]), dtype=torch.uint8, device=self._device)
        if collectives.rank == 0:
            padded = bytearray(payload.ljust(count * _PAYLOAD_COLUMNS))
            local = torch.frombuffer(padded, dtype=torch.uint8).view(count, -1).to(self._device)
        whole = collectives.gather_columns(local, sizes)
        return whole.numpy(force=True).tobytes()[:size]

    def _report(self, rows: list[list[float]]) -> None:
        self._reported = time.monotonic()
        engine = self._engine
        ranks = [
            {
                "step_seconds": median(step for step, _ in steps) if steps else None,
                "gather_seconds": median(gather for _, gather in steps) if steps else None,
                "rss_bytes": int(row[3]),
            }
            for steps, row in zip(self._steps, rows, strict=True)
        ]
        self._emit(
            {
                "event": "report",
                "ranks": ranks,
                "slowest_seconds": max((step for step, _ in self._steps[0]), default=0.0),
                "blocks_used": engine.num_used_blocks,
                "prefill_tokens": engine.times.prefill_tokens,
            }
        )
