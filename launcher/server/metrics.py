"""What a server counts, for Prometheus and for its page. Knows numbers; not where they come from."""

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

RATE_SECONDS = 5.0
"""Over which speeds are told."""
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


class Rate:
    """Events a second, over the last RATE_SECONDS."""

    def __init__(self) -> None:
        self._counted: deque[tuple[float, int]] = deque()
        self._since = time.monotonic()

    def add(self, count: int) -> None:
        """So many now."""
        now = time.monotonic()
        self._counted.append((now, count))
        self._forget(now)

    def read(self) -> float:
        """The rate now."""
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
        self._requests = Counter("tandem_requests", "Calls, by route and status of the answer", ["route", "status"], registry=registry)
        self._tokens = Counter("tandem_generation_tokens", "New tokens", registry=registry)
        self._prompt_tokens = Counter("tandem_prompt_tokens", "Tokens of prompts that were taken", registry=registry)
        self._first = Histogram("tandem_time_to_first_token_seconds", "From a call to its first token", buckets=_SECONDS, registry=registry)
        self._between = Histogram("tandem_inter_token_seconds", "From one token of a call to the next", buckets=_SECONDS, registry=registry)
        self._restarts = Counter("tandem_restarts", "Starts of all ranks after one had failed", registry=registry)
        gauge = {
            "running": "Sequences that the ranks run",
            "waiting": "Sequences that wait for the ranks",
            "kv_blocks_used": "Blocks of keys and values in use",
            "kv_blocks": "Blocks of keys and values",
            "healthy": "1 while every rank answered lately",
            "tokens_per_second": f"New tokens a second, over {RATE_SECONDS:g} s",
            "prompt_tokens_per_second": f"Tokens of prompts that went through the model a second, over {RATE_SECONDS:g} s",
        }
        self._gauges = {name: Gauge(f"tandem_{name}", words, registry=registry) for name, words in gauge.items()}
        ranked = {
            "step_seconds": "Median of a rank's last steps",
            "gather_seconds": "Of these, in collectives",
            "rss_bytes": "Resident memory of a rank",
        }
        self._ranked = {name: Gauge(f"tandem_rank_{name}", words, ["rank"], registry=registry) for name, words in ranked.items()}
        self.tokens, self.prefill = Rate(), Rate()
        self.num_tokens = self.num_requests = 0
        self.first_token_seconds: float | None = None
        """Of the last call."""

    def count_request(self, route: str, status: int) -> None:
        """A call has been answered; what a page asks for to show how things stand does not count as work."""
        self.num_requests += route.startswith("/v1/c")
        self._requests.labels(route, str(status)).inc()

    def count_prompt(self, tokens: int) -> None:
        """A prompt has been taken."""
        self._prompt_tokens.inc(tokens)

    def count_token(self, seconds: float | None) -> None:
        """A token has come, so long after the one before it."""
        self.num_tokens += 1
        self._tokens.inc()
        self.tokens.add(1)
        if seconds is not None:
            self._between.observe(seconds)

    def note_first_token(self, seconds: float) -> None:
        """A call has its first token."""
        self.first_token_seconds = seconds
        self._first.observe(seconds)

    def count_restart(self) -> None:
        """All ranks start again."""
        self._restarts.inc()

    def set(self, name: str, value: float) -> None:
        """One of the numbers that go up and down."""
        self._gauges[name].set(value)

    def set_rank(self, rank: int, name: str, value: float | None) -> None:
        """One of a rank's numbers."""
        if value is not None:
            self._ranked[name].labels(str(rank)).set(value)

    def write(self) -> bytes:
        """Prometheus' text."""
        self.set("tokens_per_second", self.tokens.read())
        self.set("prompt_tokens_per_second", self.prefill.read())
        return generate_latest(self.registry)
