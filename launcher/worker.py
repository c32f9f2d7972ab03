"""One rank: joins the others, does its part of the task, reports. The same code under our own parent and under torchrun.

Knows a Job and who it is; what is reported goes to `emit`, on rank 0 only.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from launcher.bandwidth import measure_bandwidth
from launcher.cores import bind_cores, count_cores, share_cores
from launcher.job import Job
from launcher.meeting import Seat
from launcher.rank_bench import RankBench, open_source
from launcher.rank_memory import give_back_memory, read_peak_rss_bytes
from launcher.rank_profile import record_spans
from launcher.tasks import Bench, Decode, Evaluate, Quantize
from model.checkpoint.formats import open_checkpoint
from model.checkpoint.source import CheckpointSource
from model.config import build_config
from model.evaluation import boolq, perplexity
from model.generation import Engine
from model.int8 import choose_int8_kernel
from model.linear import keeps_bits
from model.llama import LlamaForCausalLM
from model.loading import load_model
from model.native import explain_absence, find_kernels
from model.quantization.calibration import quantize_layers
from model.quantization.work_folder import WorkFolder
from model.request import plan_blocks
from model.scheme import read_scheme
from parallel.collectives import Collectives, DistributedCollectives, IdentityCollectives
from parallel.errors import RunError
from parallel.node_collectives import NodeCollectives
from parallel.progress import Progress, WatchedCollectives
from parallel.recording import RecordedCollectives
from parallel.shared_memory import SharedMemoryCollectives

Emit = Callable[[dict[str, Any]], None]

NO_GUESSES = "--speculate guesses nothing: here the last bits of a row depend on how many go together"


class StopAsked(Exception):
    """This rank was asked to stop, and has finished what it was at."""


@dataclass(frozen=True, slots=True)
class _Rank:
    """What a task is run with."""

    job: Job
    collectives: Collectives
    device: torch.device
    threads: int
    started: float
    """time.perf_counter() when the rank began."""
    emit: Emit
    progress: Progress
    seat: Seat

    def report(self, event: str) -> Callable[[int, int], None]:
        """Sends (done, total) under this name, and tells the watcher and the peers that this rank gets on."""

        def send(done: int, total: int) -> None:
            self.collectives.beat()
            self.heed_stop()
            self.emit({"event": event, "done": done, "total": total})

        return send

    def heed_stop(self) -> None:
        """Raise StopAsked when this rank was asked to stop."""
        if self.progress.asked_to_stop:
            self.emit({"event": "stopped"})
            raise StopAsked

    def gather(self, values: list[int]) -> list[list[int]]:
        """The whole numbers of every rank, a row each."""
        mine = torch.tensor([values], dtype=torch.float64, device=self.device)
        sizes = [len(values)] * self.job.world_size
        return self.collectives.gather_columns(mine, sizes).view(-1, len(values)).long().tolist()


def run_rank(job: Job, seat: Seat, store: Store | None, progress: Progress, emit: Emit, *, wait_seconds: float) -> None:
    """Run `job` as the rank that sits there. `emit` gets events: progress, tokens, and what came of it at the end.

    `wait_seconds`: how long to wait for a peer that does not get on. Raises StopAsked after the current token when asked to.
    """
    started = time.perf_counter()
    if job.bind_cores:
        bind_cores(seat.local_rank, len(seat.local_ranks))
        threads = job.threads_per_rank or count_cores()
    else:
        threads = job.threads_per_rank or (share_cores(len(seat.local_ranks)) if seat.shares_cores else count_cores())
    torch.set_num_threads(threads)
    device = torch.device(job.device) if job.device == "cpu" else torch.device(job.device, seat.local_rank)
    collectives = WatchedCollectives(connect(job, seat, store, wait_seconds), progress)
    me = _Rank(job, collectives, device, threads, started, emit, progress, seat)
    if isinstance(job.task, Decode):
        _decode(me, job.task)
    elif isinstance(job.task, Evaluate):
        _evaluate(me, job.task)
    elif isinstance(job.task, Bench):
        _bench(me, job.task)
    else:
        _quantize(me, job.task)
    collectives.barrier()
    collectives.close()
    progress.set_operation("done")


def _load(me: _Rank, source: CheckpointSource | None = None) -> tuple[LlamaForCausalLM, int]:
    """The model with this rank's part of the checkpoint, or of `source`, and the bytes that were read."""
    give_back_memory()
    me.progress.set_operation("loading")
    job = me.job
    source = source or open_checkpoint(job.path, job.opening)
    config = replace(
        build_config(source.config),
        max_position_embeddings=job.context_tokens,
        eos_token_ids=job.eos_token_ids,
        pad_token_id=job.pad_token_id,
    )
    scheme = replace(read_scheme(source.config), kv_cache=job.kv_cache)
    model = LlamaForCausalLM(config, scheme, me.collectives, dtype=job.dtype, device=me.device, num_threads=me.threads)
    read_bytes = load_model(model, source, me.report("loading"))
    if me.device.type == "cpu" and (absence := explain_absence()):
        me.emit({"event": "warning", "message": absence})
    if not _is_reproducible(me.device, model.dtype, me.threads):
        me.emit({"event": "warning", "message": "on this device the last bits of results may differ between numbers of ranks"})
    me.collectives.barrier()
    return model, read_bytes


def _decode(me: _Rank, task: Decode) -> None:
    job, emit = me.job, me.emit
    model, read_bytes = _load(me)
    load_seconds = time.perf_counter() - me.started
    needed = plan_blocks(task.requests, job.max_batch_size, job.block_size)
    engine = Engine(
        model,
        job.max_batch_size,
        block_size=job.block_size,
        num_blocks=min(needed, job.num_blocks or needed),
        share_prefixes=job.prefix_cache,
        speculate=job.speculate,
    )
    if job.speculate and not engine.speculates:
        emit({"event": "warning", "message": NO_GUESSES})
    for request in task.requests:
        engine.add(request)
    while engine.has_unfinished:
        for event in engine.step():
            emit({"event": "token", **asdict(event)})
        me.heed_stop()
    everyone = me.gather([model.weight_bytes, read_bytes, read_peak_rss_bytes(), model.build_cache(1).store.bytes_per_token])
    times = engine.times
    emit(
        {
            "event": "stats",
            **_describe(me, model),
            "load_seconds": load_seconds,
            "prefill_tokens_per_second": _speed(times.prefill_tokens, times.prefill_seconds),
            "decode_tokens_per_second": _speed(times.decode_tokens, times.decode_seconds),
            "time_to_first_token_seconds": times.first_token_seconds,
            "speculated_tokens": times.speculated_tokens,
            "accepted_tokens": times.accepted_tokens,
            "weight_bytes": [row[0] for row in everyone],
            "read_bytes": [row[1] for row in everyone],
            "peak_rss_bytes": [row[2] for row in everyone],
            "kv_cache_dtype": "int8" if model.scheme.kv_cache else job.dtype,
            "kv_cache_bytes_per_token": [row[3] for row in everyone],
        }
    )


def _describe(me: _Rank, model: LlamaForCausalLM) -> dict[str, Any]:
    """What ran, as it stands in stats."""
    job, kernels = me.job, "native" if find_kernels(me.device.type) is not None else "torch"
    return {
        "world_size": job.world_size,
        "threads_per_rank": me.threads,
        "device": job.device,
        "dtype": job.dtype,
        "quantization": model.scheme.name,
        "kernel": choose_int8_kernel(me.device.type).name if model.scheme.linear is not None else f"{kernels}-{job.dtype}",
        "collectives": me.collectives.name,
    }


def _bench(me: _Rank, task: Bench) -> None:
    recorded, seat = RecordedCollectives(me.collectives), me.seat
    if task.profile:
        me = replace(me, collectives=recorded)
    model, read_bytes = _load(me, open_source(me.job, task))
    load_seconds = time.perf_counter() - me.started
    measure = partial(measure_bandwidth, me.collectives, me.gather, me.device, len(seat.local_ranks), me.threads)
    bench = RankBench(task, model, me.collectives, measure, me.report("progress"))
    measured = bench.measure()
    if task.speculated and measured["speculation"] is None:
        me.emit({"event": "warning", "message": NO_GUESSES})
    everyone = me.gather([model.weight_bytes, read_bytes, bench.peak_rss_bytes, bench.count_step_bytes()])
    result = {
        **_describe(me, model),
        "weight_bytes": [row[0] for row in everyone],
        "decode_bytes_per_step": sum(row[3] for row in everyone),
        "load_seconds": load_seconds,
        "read_bytes": [row[1] for row in everyone],
        **measured,
        "peak_rss_bytes": [row[2] for row in everyone],
    }
    if task.profile:
        result["profile"] = record_spans(bench, model, recorded, one_host=seat.num_nodes == 1)
    me.emit({"event": "result", **result})


def _evaluate(me: _Rank, task: Evaluate) -> None:
    model, _ = _load(me)
    started = time.perf_counter()
    batch, report = me.job.max_batch_size, me.report("progress")
    result = (
        asdict(perplexity(model, task.rows, batch_size=batch, on_progress=report))
        if task.name == "perplexity"
        else asdict(boolq(model, task.rows, task.answers, choices=task.choices, batch_size=batch, on_progress=report))
    )
    tokens, seconds = sum(map(len, task.rows)), time.perf_counter() - started
    me.emit(
        {
            "event": "result",
            **result,
            "quantization": model.scheme.name,
            "dtype": me.job.dtype,
            "world_size": me.job.world_size,
            "seconds": seconds,
            "tokens_per_second": _speed(tokens, seconds),
        }
    )


def _quantize(me: _Rank, task: Quantize) -> None:
    give_back_memory()
    source = open_checkpoint(me.job.path, me.job.opening)
    work = WorkFolder(Path(task.work_folder), me.job.world_size)
    resumed, before = work.count_done(), read_peak_rss_bytes()
    quantize_layers(
        source,
        build_config(source.config),
        task.recipe,
        task.samples,
        me.collectives,
        work,
        dtype=me.job.dtype,
        device=me.device,
        num_threads=me.threads,
        on_progress=me.report("progress"),
    )
    everyone = me.gather([before, read_peak_rss_bytes()])
    me.emit(
        {
            "event": "result",
            "seconds": time.perf_counter() - me.started,
            "resumed_layers": resumed,
            "rss_bytes_before": [row[0] for row in everyone],
            "peak_rss_bytes": [row[1] for row in everyone],
        }
    )


def connect(job: Job, seat: Seat, store: Store | None, wait_seconds: float) -> Collectives:
    """The collectives of this rank: those that the job names, or the best ones for where the ranks are."""
    if seat.world_size == 1:
        return IdentityCollectives()
    assert store is not None
    name = job.collectives
    if name == "auto":
        name = choose_collectives(job.device, seat)
    if name == "shm+gloo":
        return NodeCollectives(store, seat.rank, seat.nodes, wait_seconds, seat.address)
    if name == "shm":
        if seat.num_nodes > 1:
            raise RunError(f"collectives shm work inside one host, but the ranks are on {seat.num_nodes}; use --collectives auto")
        return SharedMemoryCollectives(store, seat.rank, seat.world_size, wait_seconds)
    return DistributedCollectives(store, seat.rank, seat.world_size, name, wait_seconds, seat.address)


def choose_collectives(device: str, seat: Seat) -> str:
    """Shared memory for CPU ranks on one x86-64 host, gloo between such hosts; else torch.distributed's default of the device."""
    if device == "cpu" and shared_memory_works():
        if seat.num_nodes == 1:
            return "shm"
        if seat.num_nodes < seat.world_size:
            return "shm+gloo"
    return torch.distributed.get_default_backend_for_device(torch.device(device))


def shared_memory_works() -> bool:
    """Whether this processor keeps plain stores in order and this system has what the back needs."""
    return os.uname().machine == "x86_64" and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")


def _is_reproducible(device: torch.device, dtype: torch.dtype, threads: int) -> bool:
    """The kernels are by their making; else CPUs are tried. An accelerator's products are not known to keep their bits."""
    return find_kernels(device.type) is not None or (device.type == "cpu" and keeps_bits(dtype, threads))


def _speed(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else 0.0
