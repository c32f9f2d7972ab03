"""The rates of a machine from measured points, and how far the simulation is off on the others.

Two rates are fitted to steps of one sequence at several model sizes: bytes a second of all ranks together, and seconds a layer beside.
A third, multiplications a second, follows from a prefill. Knows measured points and the simulation; runs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from growth_points import SHAPES, Point
from model.planning import Workload, plan_ranks
from model.spec.config import LlamaConfig, build_config, read_config
from model.spec.scheme import Scheme
from simulate import Machine, build_scheme, count_multiplied_weights, simulate_decode

_MOST_CROWDED = 2.0
"""Threads a core up to which a gather is one, and not the scheduler's time slice."""
_PROBE = Machine(bandwidth_bytes_per_second=1.0)
"""With it, memory seconds are bytes."""


@dataclass(frozen=True, slots=True)
class Check:
    """One measured speed beside its simulation."""

    words: str
    measured: float
    simulated: float
    fitted: bool
    """The rates come from it, so it proves little."""

    @property
    def ratio(self) -> float:
        """Measured over simulated: below 1, the simulation promises too much."""
        return self.measured / self.simulated


def read_model(point: Point, answer: Mapping[str, Any]) -> tuple[LlamaConfig, Scheme]:
    """What was measured."""
    path = SHAPES / f"{point.shape}.json"
    raw = read_config(path)
    raw["num_hidden_layers"] = point.num_layers or raw["num_hidden_layers"]
    config = build_config(raw, str(path))
    return config, build_scheme(config, answer["quantization"])


def fit_machine(measured: Sequence[tuple[Point, Mapping[str, Any]]], cores: int) -> Machine:
    """Rates of the whole machine, as one rank that has it for itself; `layer_seconds` are a core's.

    Least squares of the relative error over steps of one sequence. Where that gives a negative rate, all is laid to memory.
    """
    rows = []
    for point, answer in measured:
        config, scheme = read_model(point, answer)
        step = simulate_decode(config, scheme, _PROBE, world_size=point.workers, context_tokens=point.decode_context_tokens)
        gathers = replace(_PROBE, gather_seconds=answer["gather_seconds"])
        waiting = simulate_decode(config, scheme, gathers, world_size=point.workers).gather_seconds
        seconds = 1 / next(row["tokens_per_second"] for row in answer["decode"] if row["batch_size"] == 1)
        layers = config.num_hidden_layers * crowding(point, cores)
        rows.append((step.memory_seconds * point.workers, layers, seconds - waiting, seconds))
    bytes_read, layers_run, left, whole = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    seconds_per_byte, layer_seconds = np.linalg.lstsq(np.stack((bytes_read / whole, layers_run / whole), 1), left / whole, rcond=None)[0]
    if len(rows) < 2 or seconds_per_byte <= 0 or layer_seconds < 0:
        seconds_per_byte, layer_seconds = float(np.mean(left / bytes_read)), 0.0
    rates = []
    for point, answer in measured:
        config, scheme = read_model(point, answer)
        plans = plan_ranks(config, scheme, point.workers, Workload(dtype=answer["dtype"], tokens=1))
        rates.append(2 * sum(count_multiplied_weights(config, plan) for plan in plans) * answer["prefill_tokens_per_second"])
    return Machine(
        bandwidth_bytes_per_second=float(1 / seconds_per_byte), operations_per_second=max(rates), layer_seconds=float(layer_seconds)
    )


def crowding(point: Point, cores: int) -> float:
    """How many threads want each core, at least 1."""
    return max(1.0, point.workers * point.threads_per_rank / cores)


def simulate_point(point: Point, answer: Mapping[str, Any], machine: Machine, cores: int, batch_size: int) -> float:
    """Tokens a second of a point whose ranks share `machine`. On a shared machine memory is not the same from minute to minute: no step
    reads faster than it gave in the point's own run."""
    config, scheme = read_model(point, answer)
    memory = min(machine.bandwidth_bytes_per_second, answer["memory_bandwidth_bytes_per_second"])
    shared = Machine(
        bandwidth_bytes_per_second=memory / point.workers,
        operations_per_second=machine.operations_per_second / point.workers,
        gather_seconds=answer["gather_seconds"],
        layer_seconds=machine.layer_seconds * crowding(point, cores),
    )
    words = {"batch_size": batch_size, "context_tokens": point.decode_context_tokens, "dtype": answer["dtype"]}
    return simulate_decode(config, scheme, shared, world_size=point.workers, **words).tokens_per_second


def check_points(measured: Sequence[tuple[Point, Mapping[str, Any]]], fitted: Sequence[Point], machine: Machine, cores: int) -> list[Check]:
    """Every measured speed, whatever its batch; not where ranks wait for a core in each gather, which is not what is simulated."""
    return [
        Check(
            f"{point.key}: batch {row['batch_size']}",
            row["tokens_per_second"],
            simulate_point(point, answer, machine, cores, row["batch_size"]),
            point in fitted,
        )
        for point, answer in measured
        if crowding(point, cores) <= _MOST_CROWDED
        for row in answer["decode"]
    ]
