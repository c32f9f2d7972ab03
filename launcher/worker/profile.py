"""Profiles a rank from outside, with hooks on modules and collectives, and gathers the spans of all ranks.

Anything other than a module call or a collective is visible only as the time in between.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from launcher.job.tasks import DECODE, PREFILL
from launcher.worker.bench import RankBench
from model.decoder.llama import LlamaForCausalLM
from model.engine.generation import step_all
from parallel.recorder import Recorder
from parallel.recording import RecordedCollectives

_STEPS = 8


def record_spans(bench: RankBench, model: LlamaForCausalLM, collectives: RecordedCollectives, *, one_host: bool) -> dict[str, Any]:
    """Run one prefill and some decode steps of one sequence; returns span names and each rank's spans, [name, start, duration].

    Times are in nanoseconds of rank 0's CLOCK_MONOTONIC; spans of ranks on other hosts are shifted by the clock difference measured right
    after a barrier.
    """
    recorder = Recorder()
    collectives.barrier()
    clock = time.monotonic_ns()
    for name, engine, steps in ((PREFILL, bench.start_prefill(), 1), (DECODE, bench.start_decode(1, _STEPS), _STEPS)):
        collectives.barrier()
        with _watch_modules(model, recorder):
            collectives.recorder = recorder
            for _ in range(steps):
                with recorder.span(name):
                    while engine.has_unfinished and not step_all(engine):
                        pass
            collectives.recorder = None
    return {"names": recorder.names, "ranks": _gather_spans(recorder.spans, clock, collectives, one_host=one_host)}


@contextmanager
def _watch_modules(model: LlamaForCausalLM, recorder: Recorder) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)}
    for name in ("lm_head",):  # a tied head is part of the embedding
        if isinstance(module := getattr(model, name, None), nn.Module):
            names[module] = name
    handles = []
    for module, name in names.items():
        started: list[int] = []
        number = recorder.number(name)

        def enter(*_: Any, started: list[int] = started) -> None:
            started.append(time.monotonic_ns())

        def leave(*_: Any, started: list[int] = started, number: int = number) -> None:
            recorder.add(number, started.pop())

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    # Layers that run in a single call have no visible parts.
    before, model.fuses_layers = model.fuses_layers, False
    try:
        yield
    finally:
        model.fuses_layers = before
        for handle in handles:
            handle.remove()


def _gather_spans(spans: list[tuple[int, int, int]], clock: int, collectives: RecordedCollectives, *, one_host: bool) -> list[Any]:
    """Gather the spans of every rank. Integers below 2^53 survive the conversion to float64."""

    def gather(rows: torch.Tensor) -> torch.Tensor:
        sizes = [rows.shape[1]] * collectives.world_size
        return collectives.gather_columns(rows, sizes).view(rows.shape[0], collectives.world_size, rows.shape[1])

    heads = gather(torch.tensor([[len(spans), clock]], dtype=torch.float64))[0].long().tolist()
    rows = torch.zeros((max(count for count, _ in heads), 3), dtype=torch.float64)
    rows[: len(spans)] = torch.tensor(spans, dtype=torch.float64).view(-1, 3)
    everyone = gather(rows).long()
    for rank, (_, other) in enumerate(heads):
        if not one_host:
            everyone[:, rank, 1] += heads[0][1] - other
    return [everyone[:count, rank].tolist() for rank, (count, _) in enumerate(heads)]
