"""Server metrics for Prometheus and the status page.

Metrics that mean the same as vLLM's have its names and its label `model_name`, so that its dashboards show them; all others begin with
`tandem_`.
"""

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

RATE_SECONDS = 5.0
"""Window over which rates are measured."""
COUNTERS = ("prefix_queries", "prefix_hits", "preemptions", "speculated_tokens", "accepted_tokens")
"""Counters of the ranks, by the fields of a Report."""
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

    def __init__(self, model_name: str = "") -> None:
        self.registry = registry = CollectorRegistry()
        model = {"model_name": model_name}

        def count(name: str, words: str) -> Counter:
            return Counter(name, words, ["model_name"], registry=registry).labels(**model)

        def time_of(name: str, words: str) -> Histogram:
            return Histogram(name, words, ["model_name"], buckets=_SECONDS, registry=registry).labels(**model)

        ProcessCollector(registry=registry)
        self._requests = Counter("tandem_requests", "Requests by route and response status", ["route", "status"], registry=registry)
        self._tokens = count("vllm:generation_tokens", "New tokens")
        self._prompt_tokens = count("vllm:prompt_tokens", "Tokens of accepted prompts")
        self._first = time_of("vllm:time_to_first_token_seconds", "Time from a request to its first token")
        self._between = time_of("vllm:inter_token_latency_seconds", "Time between consecutive tokens of a request")
        self._whole = time_of("vllm:e2e_request_latency_seconds", "Time from a request to its last token, by sequence")
        self._queued = time_of("vllm:request_queue_time_seconds", "Time that a sequence waited for a place in the batch")
        ended = Counter("vllm:request_success", "Ended sequences by reason", ["model_name", "finished_reason"], registry=registry)
        self._ended = {reason: ended.labels(model_name, reason) for reason in ("stop", "length", "abort")}
        self._engine = {
            "prefix_queries": count("vllm:prefix_cache_queries", "Tokens of admitted sequences"),
            "prefix_hits": count("vllm:prefix_cache_hits", "Tokens of admitted sequences that were in the KV cache"),
            "preemptions": count("vllm:num_preemptions", "Sequences that gave their KV cache to others"),
            "speculated_tokens": count("vllm:spec_decode_num_draft_tokens", "Draft tokens that were verified"),
            "accepted_tokens": count("vllm:spec_decode_num_accepted_tokens", "Draft tokens that were accepted"),
        }
        self._totals = dict.fromkeys(COUNTERS, 0)
        self._restarts = Counter("tandem_restarts", "Restarts of all ranks after a rank failure", registry=registry)
        shared = {
            "running": ("vllm:num_requests_running", "Running sequences"),
            "waiting": ("vllm:num_requests_waiting", "Queued sequences"),
            "kv_usage": ("vllm:kv_cache_usage_perc", "Used share of the KV cache, from 0 to 1"),
            "acceptance": ("vllm:spec_decode_draft_acceptance_rate", "Accepted share of the draft tokens since the start, from 0 to 1"),
        }
        gauge = {
            "kv_blocks_used": "KV cache blocks in use",
            "kv_blocks": "Total KV cache blocks",
            "healthy": "1 while every rank has reported recently",
            "tokens_per_second": f"New tokens per second, over {RATE_SECONDS:g} s",
            "prompt_tokens_per_second": f"Prompt tokens processed per second, over {RATE_SECONDS:g} s",
        }
        self._gauges = {name: Gauge(f"tandem_{name}", words, registry=registry) for name, words in gauge.items()}
        self._gauges |= {
            key: Gauge(name, words, ["model_name"], registry=registry).labels(**model) for key, (name, words) in shared.items()
        }
        ranked = {
            "step_seconds": "Median duration of a rank's recent steps",
            "gather_seconds": "Part of the step spent in collectives",
            "rss_bytes": "Resident memory of a rank",
            "device_bytes": "Memory allocated on a rank's device; 0 on CPUs",
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

    def note_queue_time(self, seconds: float) -> None:
        """Record how long a sequence waited for a place in the batch."""
        self._queued.observe(seconds)

    def note_end(self, reason: str, seconds: float) -> None:
        """Record the end of a sequence, by "stop", "length" or "abort", and the time since its request."""
        self._ended[reason].inc()
        if reason != "abort":
            self._whole.observe(seconds)

    def count_engine(self, name: str, number: int) -> None:
        """Add to one of COUNTERS."""
        self._engine[name].inc(number)
        self._totals[name] += number
        if drafted := self._totals["speculated_tokens"]:
            self.set("acceptance", self._totals["accepted_tokens"] / drafted)

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
