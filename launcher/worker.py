"""One rank: joins the others, loads its part, decodes, reports. The same code under our own parent and under torchrun.

Knows a Job and who it is; what is reported goes to `emit`, on rank 0 only.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from launcher.job import Job
from model.checkpoint.formats import open_checkpoint
from model.config import build_config
from model.generation import Engine, generate
from model.int8 import choose_int8_kernel
from model.linear import keeps_bits
from model.llama import LlamaForCausalLM
from model.loading import load_model
from model.scheme import read_scheme
from parallel.collectives import Collectives, DistributedCollectives, IdentityCollectives
from parallel.shared_memory import SharedMemoryCollectives

Emit = Callable[[dict[str, Any]], None]


def run_rank(job: Job, rank: int, local_rank: int, local_world_size: int, store: Store | None, emit: Emit) -> None:
    """Run `job` as `rank`. `emit` gets events: progress, tokens, and stats at the end."""
    started = time.perf_counter()
    threads = job.threads_per_rank or max(1, count_cores() // local_world_size)
    torch.set_num_threads(threads)
    device = torch.device(job.device) if job.device == "cpu" else torch.device(job.device, local_rank)
    collectives = connect(job, rank, local_world_size, store)
    source = open_checkpoint(job.path)
    config = replace(
        build_config(source.config),
        max_position_embeddings=job.context_tokens,
        eos_token_ids=job.eos_token_ids,
        pad_token_id=job.pad_token_id,
    )
    model = LlamaForCausalLM(config, read_scheme(source.config), collectives, dtype=job.dtype, device=device, num_threads=threads)

    def report(done: int, total: int) -> None:
        emit({"event": "loading", "done": done, "total": total})

    read_bytes = load_model(model, source, report)
    if not _is_reproducible(device, model.dtype, threads):
        emit({"event": "warning", "message": "on this device the last bits of results may differ between numbers of ranks"})
    collectives.barrier()
    load_seconds = time.perf_counter() - started
    engine = Engine(model, job.max_batch_size)
    for event in generate(engine, job.requests):
        emit(
            {
                "event": "token",
                "index": event.index,
                "token_id": event.token_id,
                "logprob": event.logprob,
                "finish_reason": event.finish_reason,
            }
        )
    mine = torch.tensor([[model.weight_bytes, read_bytes, read_peak_rss_bytes()]], dtype=torch.float64)
    everyone = collectives.gather_columns(mine.to(device), [3] * job.world_size).view(-1, 3).long().tolist()
    times = engine.times
    emit(
        {
            "event": "stats",
            "world_size": job.world_size,
            "threads_per_rank": threads,
            "device": job.device,
            "dtype": job.dtype,
            "quantization": model.scheme.name,
            "kernel": f"torch-{job.dtype}" if model.scheme.name == "none" else choose_int8_kernel(device.type).name,
            "collectives": collectives.name,
            "load_seconds": load_seconds,
            "prefill_tokens_per_second": _speed(times.prefill_tokens, times.prefill_seconds),
            "decode_tokens_per_second": _speed(times.decode_tokens, times.decode_seconds),
            "time_to_first_token_seconds": times.first_token_seconds,
            "weight_bytes": [row[0] for row in everyone],
            "read_bytes": [row[1] for row in everyone],
            "peak_rss_bytes": [row[2] for row in everyone],
        }
    )
    collectives.barrier()
    collectives.close()


def connect(job: Job, rank: int, local_world_size: int, store: Store | None) -> Collectives:
    """The collectives of this rank: those that the job names, or the best ones for where the ranks are."""
    if job.world_size == 1:
        return IdentityCollectives()
    assert store is not None
    name = job.collectives
    if name == "auto":
        name = choose_collectives(job.device, job.world_size == local_world_size)
    if name == "shm":
        return SharedMemoryCollectives(store, rank, job.world_size, job.timeout_seconds)
    return DistributedCollectives(store, rank, job.world_size, name, job.timeout_seconds)


def choose_collectives(device: str, one_host: bool) -> str:
    """shm for CPU ranks on one x86-64 host, torch.distributed's default backend of the device elsewhere."""
    if device == "cpu" and one_host and shared_memory_works():
        return "shm"
    return torch.distributed.get_default_backend_for_device(torch.device(device))


def shared_memory_works() -> bool:
    """Whether this processor keeps plain stores in order and this system has what the back needs."""
    return os.uname().machine == "x86_64" and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")


def count_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group where there is one."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def read_peak_rss_bytes() -> int:
    """The largest resident size of this process so far, its own program only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _is_reproducible(device: torch.device, dtype: torch.dtype, threads: int) -> bool:
    """CPUs are tried; an accelerator's own products are not known to keep their bits when their rows are split."""
    return device.type == "cpu" and keeps_bits(dtype, threads)


def _speed(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else 0.0
