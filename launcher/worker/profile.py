"""Records what the time of one rank goes to, and brings the spans of all ranks together. From outside: hooks on modules, and collectives.

What is not a call of a module or a collective is seen only as the time between them. Knows modules by name; not what they compute.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from launcher.worker.bench import RankBench
from model.decoder.llama import LlamaForCausalLM
from parallel.recording import RecordedCollectives, Recorder

PREFILL, DECODE = "prefill", "decode"
"""Names of the spans that hold all others: one pass over a prompt; one step of decoding."""
_STEPS = 8


def record_spans(bench: RankBench, model: LlamaForCausalLM, collectives: RecordedCollectives, *, one_host: bool) -> dict[str, Any]:
    """One prefill and some steps of decoding one sequence: the names of the spans, and for each rank its spans, [name, start, duration].

    Nanoseconds of rank 0's CLOCK_MONOTONIC; where ranks are on several hosts, those of the others are moved by what the clocks
    differ right after a barrier.
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
                    while engine.has_unfinished and not engine.step():
                        pass
            collectives.recorder = None
    return {"names": recorder.names, "ranks": _gather_spans(recorder.spans, clock, collectives, one_host=one_host)}


@contextmanager
def _watch_modules(model: LlamaForCausalLM, recorder: Recorder) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)}
    for name in ("lm_head",):  # a tied one is a part of the embedding
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
    # Layers that run in one call have no parts to be seen.
    before, model.fuses_layers = model.fuses_layers, False
    try:
        yield
    finally:
        model.fuses_layers = before
        for handle in handles:
            handle.remove()


def _gather_spans(spans: list[tuple[int, int, int]], clock: int, collectives: RecordedCollectives, *, one_host: bool) -> list[Any]:
    """The spans of every rank. Whole numbers below 2^53 pass through float64 as they are."""

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
