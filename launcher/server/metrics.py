"""Server metrics for Prometheus and the status page."""

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

RATE_SECONDS = 5.0
"""Window over which rates are measured."""
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


class Rate:
    """Events per second over the last RATE_SECONDS."""

    def __init__(self) -> None:
        self._counted: deque[tuple[float, int]] = deque()
        self._since = time.monotonic()

    def add(self, count: int) -> None:
        """Record `count` events now."""
        now = time.monotonic()
        self._counted.append((now, count))
        self._forget(now)

    def read(self) -> float:
        """Return the current rate."""
        now = time.monotonic()
        self._forget(now)
        return sum(count for _, count in self._counted) / max(1.0, min(RATE_SECONDS, now - self._since))

    def _forget(self, now: float) -> None:
        while self._counted and self._counted[0][0] < now - RATE_SECONDS:
            self._counted.popleft()


class ServeMetrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("tandem_requests", "Requests by route and response status", ["route", "status"], registry=registry)
        self._tokens = Counter("tandem_generation_tokens", "New tokens", registry=registry)
        self._prompt_tokens = Counter("tandem_prompt_tokens", "Tokens of accepted prompts", registry=registry)
        self._first = Histogram(
            "tandem_time_to_first_token_seconds", "Time from a request to its first token", buckets=_SECONDS, registry=registry
        )
        self._between = Histogram(
            "tandem_inter_token_seconds", "Time between consecutive tokens of a request", buckets=_SECONDS, registry=registry
        )
        self._restarts = Counter("tandem_restarts", "Restarts of all ranks after a rank failure", registry=registry)
        gauge = {
            "running": "Running sequences",
            "waiting": "Queued sequences",
            "kv_blocks_used": "KV cache blocks in use",
            "kv_blocks": "Total KV cache blocks",
            "healthy": "1 while every rank has reported recently",
            "tokens_per_second": f"New tokens per second, over {RATE_SECONDS:g} s",
            "prompt_tokens_per_second": f"Prompt tokens processed per second, over {RATE_SECONDS:g} s",
        }
        self._gauges = {name: Gauge(f"tandem_{name}", words, registry=registry) for name, words in gauge.items()}
        ranked = {
            "step_seconds": "Median duration of a rank's recent steps",
            "gather_seconds": "Part of the step spent in collectives",
            "rss_bytes": "Resident memory of a rank",
        }
        self._ranked = {name: Gauge(f"tandem_rank_{name}", words, ["rank"], registry=registry) for name, words in ranked.items()}
        self.tokens, self.prefill = Rate(), Rate()
        self.num_tokens = self.num_requests = 0
        self.first_token_seconds: float | None = None
        """Time to first token of the last request."""

    def count_request(self, route: str, status: int) -> None:
        """Count a completed request. Requests that poll the server's state are not counted as work."""
        self.num_requests += route.startswith("/v1/c")
        self._requests.labels(route, str(status)).inc()

    def count_prompt(self, tokens: int) -> None:
        """Count the tokens of an accepted prompt."""
        self._prompt_tokens.inc(tokens)

    def count_token(self, seconds: float | None) -> None:
        """Count a token and its delay after the previous one."""
        self.num_tokens += 1
        self._tokens.inc()
        self.tokens.add(1)
        if seconds is not None:
            self._between.observe(seconds)

    def note_first_token(self, seconds: float) -> None:
        """Record the time to first token of a request."""
        self.first_token_seconds = seconds
        self._first.observe(seconds)

    def count_restart(self) -> None:
        """Count a restart of all ranks."""
        self._restarts.inc()

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._gauges[name].set(value)

    def set_rank(self, rank: int, name: str, value: float | None) -> None:
        """Set a gauge of one rank."""
        if value is not None:
            self._ranked[name].labels(str(rank)).set(value)

    def write(self) -> bytes:
        """Render the Prometheus text format."""
        self.set("tokens_per_second", self.tokens.read())
        self.set("prompt_tokens_per_second", self.prefill.read())
        return generate_latest(self.registry)
