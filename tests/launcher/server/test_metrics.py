"""The counters of a server, as Prometheus reads them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher.server.metrics import RATE_SECONDS, Rate, ServeMetrics

MODEL = (("model_name", "m"),)


def read(metrics: ServeMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Value of every sample: by name and labels."""
    families = text_string_to_metric_families(metrics.write().decode())
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its `now` is the time."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("launcher.server.metrics.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_rate_is_over_the_last_seconds(clock: SimpleNamespace) -> None:
    rate = Rate()
    assert rate.read() == 0
    rate.add(3)
    assert rate.read() == 3, "a server that has just begun is taken to be one second old"
    clock.now += 2
    rate.add(5)
    assert rate.read() == 4
    clock.now += RATE_SECONDS - 1
    assert rate.read() == 5 / RATE_SECONDS, "the first ones are too long ago"
    clock.now += RATE_SECONDS
    assert rate.read() == 0


def test_calls_are_counted_by_route_and_status() -> None:
    metrics = ServeMetrics("m")
    for status in (200, 200, 429):
        metrics.count_request("/v1/completions", status)
    found = read(metrics)
    assert found["tandem_requests_total", (("route", "/v1/completions"), ("status", "200"))] == 2
    assert found["tandem_requests_total", (("route", "/v1/completions"), ("status", "429"))] == 1
    assert metrics.num_requests == 3


def test_tokens_and_their_times_are_counted(clock: SimpleNamespace) -> None:
    metrics = ServeMetrics("m")
    metrics.count_prompt(12)
    metrics.note_first_token(0.03)
    metrics.count_token(None)
    metrics.count_token(0.2)
    metrics.count_token(0.3)
    metrics.prefill.add(12)
    metrics.count_restart()
    metrics.note_queue_time(0.15)
    metrics.note_end("length", 3.0)
    metrics.note_end("abort", 9.0)
    metrics.count_engine("prefix_hits", 32)
    found = read(metrics)
    assert found["vllm:generation_tokens_total", MODEL] == 3
    assert found["vllm:prompt_tokens_total", MODEL] == 12
    assert found["tandem_tokens_per_second", ()] == 3
    assert found["tandem_prompt_tokens_per_second", ()] == 12
    assert found["tandem_restarts_total", ()] == 1
    assert found["vllm:time_to_first_token_seconds_count", MODEL] == 1
    assert found["vllm:inter_token_latency_seconds_count", MODEL] == 2
    assert found["vllm:inter_token_latency_seconds_bucket", (("le", "0.2"), *MODEL)] == 1
    assert found["vllm:request_queue_time_seconds_sum", MODEL] == 0.15
    assert found["vllm:e2e_request_latency_seconds_sum", MODEL] == 3
    assert found["vllm:request_success_total", (("finished_reason", "abort"), *MODEL)] == 1
    assert found["vllm:prefix_cache_hits_total", MODEL] == 32 and found["vllm:num_preemptions_total", MODEL] == 0
    assert (metrics.num_tokens, metrics.first_token_seconds) == (3, 0.03)


def test_the_share_of_accepted_draft_tokens_is_that_since_the_start() -> None:
    metrics = ServeMetrics("m")
    assert read(metrics)["vllm:spec_decode_draft_acceptance_rate", MODEL] == 0
    for drafted, accepted in ((8, 6), (0, 0), (2, 1)):
        metrics.count_engine("speculated_tokens", drafted)
        metrics.count_engine("accepted_tokens", accepted)
    found = read(metrics)
    assert found["vllm:spec_decode_num_draft_tokens_total", MODEL] == 10
    assert found["vllm:spec_decode_num_accepted_tokens_total", MODEL] == 7
    assert found["vllm:spec_decode_draft_acceptance_rate", MODEL] == 0.7


def test_gauges_show_the_last_value_and_unknown_ones_of_ranks_nothing() -> None:
    metrics = ServeMetrics("m")
    metrics.set("running", 3)
    metrics.set("running", 2)
    metrics.set("healthy", True)
    metrics.set_rank(1, "step_seconds", 0.25)
    metrics.set_rank(0, "step_seconds", None)
    found = read(metrics)
    assert (found["vllm:num_requests_running", MODEL], found["tandem_healthy", ()]) == (2, 1)
    assert found["tandem_rank_step_seconds", (("rank", "1"),)] == 0.25
    assert ("tandem_rank_step_seconds", (("rank", "0"),)) not in found


def test_two_servers_in_one_process_do_not_share_counters() -> None:
    one, two = ServeMetrics("m"), ServeMetrics("m")
    one.count_prompt(5)
    assert read(two)["vllm:prompt_tokens_total", MODEL] == 0


def test_the_process_is_told_of() -> None:
    assert read(ServeMetrics("m"))["process_resident_memory_bytes", ()] > 0


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    dashboard = json.loads((Path(__file__).resolve().parents[3] / "scripts/cluster/grafana-dashboard.json").read_text())
    metrics = ServeMetrics("m")
    metrics.count_request("/v1/completions", 200)
    for name in ("step_seconds", "gather_seconds", "rss_bytes", "device_bytes"):
        metrics.set_rank(0, name, 1.0)
    known = {name for name, _ in read(metrics)}
    used = {
        name for panel in dashboard["panels"] for target in panel["targets"] for name in re.findall(r"(?:vllm:|tandem_)\w+", target["expr"])
    }
    assert len(used) > 12 and used <= known
    assert all(panel["targets"] and panel["title"] for panel in dashboard["panels"])
