"""Parent side of a server: tracks the state of the ranks, delivers tokens to requests, and reports health and metrics.

Events arrive on a thread of the run; everything that concerns requests happens on the HTTP server's event loop.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from launcher.job.job import Job
from launcher.job.messages import (
    Event,
    Failures,
    Loading,
    RankWarning,
    Refused,
    Report,
    Scores,
    Serving,
    Tokens,
)
from launcher.job.observer import RunObserver, Send
from launcher.job.tasks import Serve, Task
from launcher.reporting.console import loading_progress
from launcher.server.errors import ServiceError
from launcher.server.inflight_requests import MAX_FAILURES, InflightRequests
from launcher.server.metrics import COUNTERS, ServeMetrics
from launcher.server.queue import Dispatcher
from model.planning import RankPlan
from model.spec.config import LlamaConfig

MAX_FAILED_STARTS = 3
"""The server exits after this many consecutive attempts that failed before becoming ready."""
_SILENT_SECONDS = 10.0
"""Ranks are considered stuck after this long without a sign of life, provided it also exceeds a few of their slowest steps."""
_END_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The model being served and its plan."""

    name: str
    """The model name in the API."""
    version: str
    config: LlamaConfig
    job: Job
    plans: Sequence[RankPlan]
    """The share of each rank."""
    num_blocks: int
    max_waiting: int
    drain_seconds: float
    """Maximum time in-flight requests may take to complete on shutdown."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters, which are models of their own in the API."""
        return tuple(adapter.name for adapter in self.job.adapters)


class EngineClient(RunObserver):
    """The parent side of one server."""

    redone = "in-flight requests resume"

    def __init__(self, served: Served) -> None:
        self.served, self.metrics = served, ServeMetrics(served.name)
        self._inflight = InflightRequests()
        self.dispatcher = Dispatcher(self._inflight, self.metrics, max_running=served.job.max_batch_size, max_waiting=served.max_waiting)
        self.loop: asyncio.AbstractEventLoop | None = None
        """The HTTP server's event loop, once it runs."""
        self.stop_number: int | None = None
        """The signal that requested the shutdown."""
        self._began = time.monotonic()
        self.created = int(time.time())
        self._progress = loading_progress(served.job.world_size)
        self._phase, self._loaded = "loading", (0, 0)
        self._serving: Serving | None = None
        self._report: Report | None = None
        self._heard = 0.0
        self._slowest_seconds = 0.0
        self._prefilled = 0
        self._counted = dict.fromkeys(COUNTERS, 0)
        self._failed_starts = self._restarts = 0
        self._last_failure: str | None = None
        self._drain_task: asyncio.Task[None] | None = None
        self.answered_once = threading.Event()
        """Set when the ranks are ready for the first time."""

    # Events of the run. -------------------------------------------------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        """Take one event of rank 0."""
        match event:
            case Tokens():
                tokens = self._inflight.take(event.tokens)
                if tokens:
                    self._on_loop(self.dispatcher.deliver, tokens)
            case Failures():
                failures = [one for one in event.failures if self._inflight.drop(one.index)]
                self._on_loop(self.dispatcher.fail_sequences, failures)
            case Refused():
                self._on_loop(self.dispatcher.refuse, event.index, ServiceError(400, event.message))
            case Scores():
                self._on_loop(self.dispatcher.deliver_scores, self._inflight.take_scores(event.scores))
            case Report():
                self._take_report(event)
            case Loading():
                self._loaded = event.done, event.total
                self._progress(event.done, event.total)
            case Serving():
                self._take_serving(event)
            case RankWarning():
                print(f"warning: {event.message}", file=sys.stderr)

    def connect(self, send: Send) -> None:
        """Attach to rank 0 of a new attempt."""
        self._inflight.connect(send)
        if self.dispatcher.is_draining and not self.dispatcher.num_running:
            self._inflight.end()

    def continue_task(self, task: Task) -> Task:
        """Return every unfinished request with its tokens so far."""
        assert isinstance(task, Serve)
        known = self._serving.memory_bytes_per_second if self._serving else None
        return structs.replace(task, requests=self._inflight.list_unfinished(), memory_bytes_per_second=known)

    def note_failure(self, cause: str, at_seconds: float) -> None:
        """Handle a rank failure; all ranks restart."""
        served = self._phase == "ready"
        self._count_failed_start()
        self._phase, self._last_failure, self._report = "recovering", cause, None
        self._restarts += 1
        self.metrics.count_restart()
        self._progress.close()
        hopeless = self._inflight.note_failure(served=served)
        if hopeless:
            self._on_loop(self.dispatcher.give_up, hopeless, MAX_FAILURES)

    def may_restart(self) -> bool:
        """Return False after MAX_FAILED_STARTS consecutive failed starts."""
        return self._failed_starts + (self._phase != "ready") < MAX_FAILED_STARTS

    def _count_failed_start(self) -> None:
        self._failed_starts = 0 if self._phase == "ready" else self._failed_starts + 1

    def ask_to_stop(self, number: int) -> float | None:
        """Finish in-flight requests, then shut down."""
        if self.stop_number is not None or self.loop is None:
            return None
        self.stop_number = number
        if self._phase == "loading" or (self._phase == "recovering" and not self.dispatcher.num_running):
            self._on_loop(self.dispatcher.fail_all)
            return None
        self._on_loop(self._begin_drain)
        return self.served.drain_seconds + _END_SECONDS

    def close(self) -> None:
        """Handle the end of the run: pending requests receive an error."""
        self._progress.close()
        self._phase = "draining"
        self._on_loop(self.dispatcher.fail_all)

    # State and metrics. -------------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """One of loading, ready, recovering and draining."""
        return "draining" if self.dispatcher.is_draining or self.stop_number is not None else self._phase

    @property
    def health(self) -> str:
        """Return "ok" if every rank has reported recently, otherwise a description of the problem."""
        state = self.state
        if state != "ready":
            return state
        return "silent" if time.monotonic() - self._heard > max(_SILENT_SECONDS, 4 * self._slowest_seconds) else "ok"

    def update_metrics(self) -> None:
        """Update the gauges."""
        metrics, report = self.metrics, self._report
        metrics.set("running", self.dispatcher.num_running)
        metrics.set("waiting", self.dispatcher.num_waiting)
        metrics.set("kv_blocks", self.served.num_blocks)
        metrics.set("kv_blocks_used", report.blocks_used if report else 0)
        metrics.set("kv_usage", report.blocks_used / self.served.num_blocks if report else 0)
        metrics.set("healthy", self.health == "ok")
        for rank, row in enumerate(report.ranks if report else ()):
            for name, value in structs.asdict(row).items():
                metrics.set_rank(rank, name, value)

    def describe(self) -> dict[str, Any]:
        """Everything that the page shows."""
        served, job, report, serving, metrics = self.served, self.served.job, self._report, self._serving, self.metrics
        ready = self._phase == "ready"
        return {
            "model": served.name,
            "adapters": list(served.adapters),
            "version": served.version,
            "state": self.state,
            "uptime_seconds": time.monotonic() - self._began,
            "world_size": job.world_size,
            "num_layers": served.config.num_hidden_layers,
            "dtype": job.dtype,
            "quantization": serving.quantization if serving else None,
            "kernel": serving.kernel if serving else None,
            "collectives": serving.collectives if serving else None,
            "threads_per_rank": serving.threads_per_rank if serving else None,
            "context_tokens": job.context_tokens,
            "loading": None if ready else {"done_bytes": self._loaded[0], "total_bytes": self._loaded[1]},
            "running": self.dispatcher.num_running,
            "max_running": self.dispatcher.max_running,
            "waiting": self.dispatcher.num_waiting,
            "max_waiting": self.dispatcher.max_waiting,
            "blocks_used": report.blocks_used if report else 0,
            "blocks_total": served.num_blocks,
            "block_size": job.block_size,
            "tokens_per_second": metrics.tokens.read(),
            "prompt_tokens_per_second": metrics.prefill.read(),
            "time_to_first_token_seconds": metrics.first_token_seconds,
            "requests_total": metrics.num_requests,
            "tokens_total": metrics.num_tokens,
            "restarts": self._restarts,
            "last_failure": self._last_failure,
            "ranks": [self._describe_rank(plan, report, serving if ready else None) for plan in served.plans],
        }

    def _describe_rank(self, plan: RankPlan, report: Report | None, serving: Serving | None) -> dict[str, Any]:
        rank = plan.rank
        row = report.ranks[rank] if report else None
        step = row.step_seconds if row else None
        memory = serving.memory_bytes_per_second if serving else None
        return {
            "rank": rank,
            "host": serving.hosts[rank] if serving else None,
            "pid": serving.pids[rank] if serving else None,
            "heads": plan.heads,
            "kv_heads": plan.kv_heads,
            "hidden_rows": plan.hidden_rows,
            "intermediate_rows": plan.intermediate_rows,
            "vocab_rows": plan.vocab_rows,
            "weight_bytes": plan.weight_bytes,
            "kv_cache_bytes": plan.kv_cache_bytes,
            "rss_bytes": row.rss_bytes if row else None,
            "device_bytes": row.device_bytes if row else None,
            "step_seconds": step,
            "gather_seconds": row.gather_seconds if row else None,
            "bytes_per_second": plan.streamed_bytes / step if step else None,
            "memory_bytes_per_second": memory / self.served.job.world_size if memory else None,
        }

    def _take_serving(self, serving: Serving) -> None:
        self._serving, self._phase, self._heard, self._failed_starts = serving, "ready", time.monotonic(), 0
        self._prefilled = 0
        self._counted = dict.fromkeys(self._counted, 0)
        if self.answered_once.is_set():
            print("the ranks are back; in-flight answers continue", file=sys.stderr, flush=True)
        self.answered_once.set()

    def _take_report(self, report: Report) -> None:
        self._heard, self._report, self._slowest_seconds = time.monotonic(), report, report.slowest_seconds
        self._on_loop(self.metrics.prefill.add, max(0, report.prefill_tokens - self._prefilled))
        self._prefilled = report.prefill_tokens
        for name, before in self._counted.items():
            self._counted[name] = value = getattr(report, name)
            self._on_loop(self.metrics.count_engine, name, max(0, value - before))

    def _begin_drain(self) -> None:
        self._drain_task = asyncio.create_task(self.finish())

    async def finish(self) -> None:
        """Finish in-flight requests, then let the ranks exit."""
        await self.dispatcher.drain(self.served.drain_seconds)
        self._inflight.end()

    def _on_loop(self, function: Any, *arguments: Any) -> None:
        if self.loop is not None:
            with suppress(RuntimeError):  # the HTTP server has exited
                self.loop.call_soon_threadsafe(function, *arguments)
