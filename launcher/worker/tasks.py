"""The tasks of a rank: load the model, run it, and report. All ranks do the same; rank 0's results count."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.host.process_memory import give_back_memory, read_peak_rss_bytes
from launcher.job.messages import Failed, Failures, RankWarning, Result, Serving, Stats, Tokens, Working
from launcher.job.tasks import Bench, Decode, Evaluate, Program, Quantize, Serve
from launcher.worker.bandwidth import measure_bandwidth
from launcher.worker.bench import RankBench, open_source
from launcher.worker.profile import record_spans
from launcher.worker.program import run_program
from launcher.worker.rank import NO_DRAFTS, Rank, load_draft_model, load_rank, open_own_checkpoint
from launcher.worker.service import RankService
from model.checkpoint.fingerprint import check_unchanged, read_state
from model.decoder.llama import LlamaForCausalLM
from model.engine.generation import Engine
from model.engine.grammar import Grammars
from model.engine.request import plan_blocks
from model.evaluation.scoring import boolq, perplexity
from model.quantization.calibration import quantize_layers
from model.quantization.work_folder import WorkFolder
from model.spec.config import build_config
from model.text.tokenizer import read_tokenizer
from parallel.errors import NonFiniteError
from parallel.recording import RecordedCollectives

_SERVE_BANDWIDTH_BYTES = 128 << 20
"""Bytes per rank for the server's bandwidth figure; a server must not need more memory at startup than later."""


def run_task(me: Rank) -> None:
    """Run the job's task. If logits are not finite, all ranks exit normally and rank 0 reports why: a restart would fail the same way."""
    task = me.job.task
    try:
        _RUNNERS[type(task)](me, task)
    except NonFiniteError as error:
        me.emit(Failed(str(error)))


def decode(me: Rank, task: Decode) -> None:
    job, emit = me.job, me.emit
    model, read_bytes = load_rank(me)
    draft_model = load_draft_model(me, model)
    load_seconds = time.perf_counter() - me.started
    needed = plan_blocks(task.requests, job.max_batch_size, job.block_size)
    engine = Engine(
        model,
        job.max_batch_size,
        block_size=job.block_size,
        num_blocks=_limit_blocks(me, needed),
        share_prefixes=job.prefix_cache,
        speculate=job.speculate,
        draft_model=draft_model,
        draft_tokens=job.draft_tokens,
        prefill_resumed=model.batch_invariant,
    )
    if job.speculate and not engine.speculates:
        emit(RankWarning(NO_DRAFTS.format("--speculate")))
    for request in task.requests:
        engine.add(request)
    while engine.has_unfinished:
        if events := engine.step():
            emit(Tokens(tuple(events)))
        if engine.failures:
            emit(Failures(tuple(engine.failures)))
        me.raise_if_stopping()
    peak_device_bytes = model.backend.count_peak_bytes(me.device)
    models = [model] if draft_model is None else [model, draft_model]
    token_bytes = sum(one.build_cache(1).store.bytes_per_token for one in models)
    draft_bytes = sum(one.weight_bytes for one in models[1:])
    bytes_used = [model.weight_bytes, read_bytes, read_peak_rss_bytes(), token_bytes, draft_bytes, model.adapter_bytes, peak_device_bytes]
    everyone = me.gather(bytes_used)
    times = engine.times
    emit(
        Stats(
            **_describe(me, model),
            load_seconds=load_seconds,
            prefill_tokens_per_second=_speed(times.prefill_tokens, times.prefill_seconds),
            decode_tokens_per_second=_speed(times.decode_tokens, times.decode_seconds),
            time_to_first_token_seconds=times.first_token_seconds,
            speculated_tokens=times.speculated_tokens,
            accepted_tokens=times.accepted_tokens,
            acceptance_rate=times.accepted_tokens / times.speculated_tokens if times.speculated_tokens else None,
            weight_bytes=[row[0] for row in everyone],
            adapter_bytes=[row[5] for row in everyone],
            draft_weight_bytes=[row[4] for row in everyone],
            read_bytes=[row[1] for row in everyone],
            peak_rss_bytes=[row[2] for row in everyone],
            peak_device_bytes=[row[6] for row in everyone],
            kv_cache_dtype="int8" if model.scheme.kv_cache else job.dtype,
            kv_cache_bytes_per_token=[row[3] for row in everyone],
        )
    )


def _limit_blocks(me: Rank, needed: int) -> int:
    """Return how many KV cache blocks every rank can have, at most `needed`. The hosts of a run may have different devices."""
    limit = me.job.block_limit
    if me.job.fitting_blocks is not None:
        limit = min(row[0] for row in me.gather([limit or needed]))
    return needed if limit is None else min(needed, limit)


def serve(me: Rank, task: Serve) -> None:
    job, collectives = me.job, me.collectives
    bandwidth = task.memory_bytes_per_second or measure_bandwidth(
        collectives, me.gather, me.device, len(me.seat.local_ranks), me.threads, block_bytes=_SERVE_BANDWIDTH_BYTES
    )
    model, _ = load_rank(me)
    draft_model = load_draft_model(me, model)
    engine = Engine(
        model,
        job.max_batch_size,
        block_size=job.block_size,
        num_blocks=task.num_blocks,
        share_prefixes=job.prefix_cache,
        speculate=job.speculate,
        draft_model=draft_model,
        draft_tokens=job.draft_tokens,
        prefill_tokens=task.prefill_tokens,
        prefill_resumed=True,
        grammars=_open_grammars(task.tokenizer, model) if task.tokenizer else None,
    )
    if not model.batch_invariant:
        me.emit(RankWarning("without native kernels, the low-order bits of an answer may depend on the batch"))
    if job.speculate and not engine.speculates:
        me.emit(RankWarning(NO_DRAFTS.format("--speculate")))
    me.emit(Serving(**_describe(me, model), memory_bytes_per_second=bandwidth, hosts=me.seat.host_names, pids=me.seat.pids))
    count_bytes = partial(model.backend.count_bytes, me.device)
    service = RankService(engine, collectives, lambda: me.progress.gather_nanoseconds, me.inbox, me.emit, count_bytes)
    for request in task.requests:
        service.add(request)
    service.run()


def _open_grammars(tokenizer: str, model: LlamaForCausalLM) -> Grammars:
    return Grammars(lambda: read_tokenizer(Path(tokenizer)), model.config.vocab_size, model.config.eos_token_ids)


def _describe(me: Rank, model: LlamaForCausalLM) -> dict[str, Any]:
    """Return the run's properties in the form they have in stats."""
    job, backend = me.job, model.backend
    kernel = backend.int8_kernel.name if model.scheme.has_integers else f"{backend.name}-{job.dtype}"
    return {
        "world_size": job.world_size,
        "threads_per_rank": me.threads,
        "device": job.device,
        "dtype": job.dtype,
        "quantization": model.scheme.name,
        "kernel": f"{kernel} (plain: {', '.join(model.plain_features)})" if model.plain_features else kernel,
        "collectives": me.collectives.name,
        "cores_bound": job.binds_cores,
    }


def bench(me: Rank, task: Bench) -> None:
    recorded, seat = RecordedCollectives(me.collectives), me.seat
    if task.profile:
        me = replace(me, collectives=recorded)
    model, read_bytes = load_rank(me, open_source(me.job, task))
    draft_model = load_draft_model(me, model)
    load_seconds = time.perf_counter() - me.started
    measure = partial(measure_bandwidth, me.collectives, me.gather, me.device, len(seat.local_ranks), me.threads)
    bench = RankBench(task, model, me.collectives, measure, me.report(Working), draft_model, me.job.draft_tokens)
    measured = bench.measure()
    if task.speculated and measured["speculation"] is None and me.job.draft is None:
        me.emit(RankWarning(NO_DRAFTS.format("--speculate")))
    peak_device_bytes = model.backend.count_peak_bytes(me.device)
    everyone = me.gather([model.weight_bytes, read_bytes, bench.peak_rss_bytes, bench.count_step_bytes(), peak_device_bytes])
    result = {
        **_describe(me, model),
        "weight_bytes": [row[0] for row in everyone],
        "decode_bytes_per_step": sum(row[3] for row in everyone),
        "load_seconds": load_seconds,
        "read_bytes": [row[1] for row in everyone],
        **measured,
        "peak_rss_bytes": [row[2] for row in everyone],
        "peak_device_bytes": [row[4] for row in everyone],
    }
    if task.profile:
        result["profile"] = record_spans(bench, model, recorded, one_host=seat.num_nodes == 1)
    me.emit(Result(result))


def evaluate(me: Rank, task: Evaluate) -> None:
    model, _ = load_rank(me)
    started = time.perf_counter()
    batch, report = me.job.max_batch_size, me.report(Working)
    result = (
        asdict(perplexity(model, task.rows, batch_size=batch, on_progress=report))
        if task.name == "perplexity"
        else asdict(boolq(model, task.rows, task.answers, choices=task.choices, batch_size=batch, on_progress=report))
    )
    tokens, seconds = sum(map(len, task.rows)), time.perf_counter() - started
    me.emit(
        Result(
            {
                **result,
                "quantization": model.scheme.name,
                "dtype": me.job.dtype,
                "world_size": me.job.world_size,
                "seconds": seconds,
                "tokens_per_second": _speed(tokens, seconds),
            }
        )
    )


def quantize(me: Rank, task: Quantize) -> None:
    give_back_memory()
    source = open_own_checkpoint(me.job)
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
        on_progress=me.report(Working),
    )
    check_unchanged(me.job.fingerprint, partial(read_state, source))
    everyone = me.gather([before, read_peak_rss_bytes()])
    me.emit(
        Result(
            {
                "seconds": time.perf_counter() - me.started,
                "resumed_layers": resumed,
                "rss_bytes_before": [row[0] for row in everyone],
                "peak_rss_bytes": [row[1] for row in everyone],
            }
        )
    )


def _speed(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else 0.0


_RUNNERS: Mapping[type, Callable[[Rank, Any], None]] = {
    Decode: decode,
    Serve: serve,
    Evaluate: evaluate,
    Quantize: quantize,
    Bench: bench,
    Program: run_program,
}
