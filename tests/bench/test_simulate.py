"""The simulated step at its limits: what it must be whatever the rates are, and how it moves with each of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from model.planning import Workload, plan_ranks
from model.spec.config import LlamaConfig, build_config, read_config
from model.spec.scheme import Scheme
from parallel.errors import LayoutError
from simulate import Machine, build_scheme, count_multiplied_weights, count_received_elements, main, simulate_decode

SHAPES = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "shapes"
MACHINE = Machine(
    bandwidth_bytes_per_second=25e9,
    gather_seconds=30e-6,
    link_bytes_per_second=3e9,
    operations_per_second=300e9,
    layer_seconds=2e-4,
)


def _config(name: str = "tinyllama_1.1b") -> LlamaConfig:
    return build_config(read_config(SHAPES / f"{name}.json"))


@pytest.mark.parametrize("name", ["smollm2_0.1b", "tinyllama_1.1b", "llama2_7b", "llama2_70b"])
@pytest.mark.parametrize("quantization", ["none", "rtn-a16w8"])
def test_one_rank_is_its_bytes_over_bandwidth(name: str, quantization: str) -> None:
    config = _config(name)
    scheme = build_scheme(config, quantization)
    (plan,) = plan_ranks(config, scheme, 1, Workload(dtype="bfloat16", tokens=100))
    step = simulate_decode(config, scheme, Machine(bandwidth_bytes_per_second=25e9), world_size=1, context_tokens=100)
    assert step.seconds == pytest.approx((plan.streamed_bytes + plan.kv_cache_bytes) / 25e9)
    assert step.tokens_per_second == pytest.approx(1 / step.seconds)


@pytest.mark.parametrize(
    "better",
    [
        {"bandwidth_bytes_per_second": 50e9},
        {"gather_seconds": 0.0},
        {"link_bytes_per_second": 6e9},
        {"layer_seconds": 0.0},
    ],
    ids=lambda better: next(iter(better)),
)
def test_every_better_rate_is_faster(better: dict[str, float]) -> None:
    config = _config()
    scheme = build_scheme(config, "rtn-a16w8")
    slow = simulate_decode(config, scheme, MACHINE, world_size=4)
    assert simulate_decode(config, scheme, replace(MACHINE, **better), world_size=4).tokens_per_second > slow.tokens_per_second


def test_compute_counts_only_where_it_takes_longer_than_memory() -> None:
    config = _config()
    scheme = build_scheme(config, "rtn-a16w8")
    fast = replace(MACHINE, operations_per_second=600e9)
    one, many = ({"world_size": 2, "batch_size": size, "context_tokens": 16} for size in (1, 64))
    assert simulate_decode(config, scheme, fast, **one).seconds == simulate_decode(config, scheme, MACHINE, **one).seconds
    assert simulate_decode(config, scheme, fast, **many).seconds < simulate_decode(config, scheme, MACHINE, **many).seconds


def test_ranks_share_the_bytes_and_pay_for_gathers() -> None:
    config = _config()
    steps = [simulate_decode(config, Scheme(), MACHINE, world_size=size) for size in (1, 2, 4)]
    assert [step.memory_seconds for step in steps] == sorted((step.memory_seconds for step in steps), reverse=True)
    assert (steps[0].gather_seconds, steps[0].link_seconds) == (0.0, 0.0)
    assert steps[1].gather_seconds == pytest.approx((4 * 22 + 2) * 30e-6)
    assert steps[2].link_seconds > steps[1].link_seconds


def test_the_widest_rank_of_an_uneven_layout_bounds_the_step() -> None:
    config = _config("smollm2_0.1b")  # 9 heads with 3 key-value heads
    plans = plan_ranks(config, Scheme(), 2, Workload(dtype="bfloat16", tokens=512))
    sizes = [plan.streamed_bytes + plan.kv_cache_bytes for plan in plans]
    assert sizes[0] != sizes[1]
    step = simulate_decode(config, Scheme(), Machine(bandwidth_bytes_per_second=1e9), world_size=2)
    assert step.seconds == pytest.approx(max(sizes) / 1e9)
    assert step.seconds > sum(sizes) / 2 / 1e9


def test_a_longer_context_and_a_larger_batch_read_more_keys_and_values() -> None:
    config = _config()
    machine = Machine(bandwidth_bytes_per_second=25e9)
    token = 22 * 2 * 4 * 64 * 2  # layers, keys and values, heads, width, bytes

    def seconds(batch_size: int, context: int) -> float:
        return simulate_decode(config, Scheme(), machine, world_size=1, batch_size=batch_size, context_tokens=context).seconds

    assert seconds(1, 1024) - seconds(1, 32) == pytest.approx(992 * token / 25e9)
    assert seconds(4, 512) - seconds(1, 512) == pytest.approx(3 * 512 * token / 25e9)


def test_products_and_gathers_are_counted_whole_over_all_ranks() -> None:
    config = _config()
    weights = 22 * (2048 * (2048 + 2 * 256) + 2048 * 2048 + 3 * 2048 * 5632) + 32000 * 2048
    plans = plan_ranks(config, Scheme(), 4, Workload(dtype="bfloat16", tokens=1))
    assert sum(count_multiplied_weights(config, plan) for plan in plans) == weights
    received = [count_received_elements(config, plan, 4) for plan in plans]
    assert sum(received) == 3 * (22 * (3 * 2048 + 5632) + 4 * 2048)


def test_more_ranks_than_units_are_refused() -> None:
    with pytest.raises(LayoutError):
        simulate_decode(_config("smollm2_0.1b"), Scheme(), MACHINE, world_size=10)


def test_last_line_has_a_row_for_each_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(SHAPES / "llama2_70b.json"), "--ranks", "8,16", "--bandwidth", "100"])
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["world_size"] for row in answer["rows"]] == [8, 16]
    assert answer["rows"][1]["tokens_per_second"] > answer["rows"][0]["tokens_per_second"]
    assert answer["link_bytes_per_second"] is None
