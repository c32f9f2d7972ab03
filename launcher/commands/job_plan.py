"""The job of a run: every setting resolved, from options, the YAML and defaults. Raises all errors of settings; starts nothing."""

import sys
from dataclasses import replace
from functools import partial
from typing import get_args

from launcher.commands.device_memory import fit_blocks
from launcher.commands.devices import check_collectives, choose_device
from launcher.commands.opened_run import DEFAULT_TIMEOUT_SECONDS, Run, decide_join_seconds
from launcher.environment.detection import read_cpu_kernels
from launcher.host.shared_memory import shared_memory_works
from launcher.job.device_memory import DEFAULT_MEMORY_FRACTION
from launcher.job.job import Adapter, Job
from launcher.job.tasks import Quantize, Task
from launcher.settings.options import MAX_SECONDS, CollectivesName, CpuKernels, Device
from launcher.settings.precedence import first_not_none
from model.checkpoint.fingerprint import read_fingerprint
from model.engine.speculation import DEFAULT_DRAFT_TOKENS
from model.kernels.library import choose_kernels
from model.spec.config import DEFAULT_BLOCK_SIZE, DTYPES, check_blocks
from model.spec.run_scheme import PRECISIONS
from model.text.end_of_text import decide_end_of_text
from model.text.tokenizer import Tokenizer
from parallel.errors import ConfigError


def build_job(run: Run, task: Task, *, dtype: str | None = None, tokenizer: Tokenizer | None = None) -> Job:
    """Resolve every setting. Options override the YAML, which overrides defaults. Raises InputError.

    `dtype` is the compute dtype if neither specifies one; None uses the YAML's compute_dtype, otherwise the checkpoint's. `tokenizer` is
    that of `Run.read_tokenizer`, for tasks whose answers end at its stop tokens.
    """
    options, settings, config = run.options, run.settings, run.opened.config
    own, yaml_ids = settings.tandem, settings.model_values
    tokenizer_path = run.tokenizer_path if tokenizer is not None else None
    end = decide_end_of_text(
        run.opened.source, config.vocab_size, named=yaml_ids.get("eos_token_id"), tokenizer=tokenizer, tokenizer_path=tokenizer_path
    )
    if tokenizer is not None and not run.environment.rank:
        for warning in end.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    ranks_per_device = first_not_none(options.ranks_per_device, own.ranks_per_device, 1)
    device = choose_device(
        _one_of("device", first_not_none(options.device, own.device, "auto"), get_args(Device)),
        run.environment,
        run.num_local_ranks,
        ranks_per_device,
        run.read_devices,
    )
    fraction = first_not_none(options.memory_fraction, own.memory_fraction, DEFAULT_MEMORY_FRACTION)
    if not 0 < fraction <= 1:
        raise ConfigError(f"memory_fraction is {fraction}, but has to be above 0 and at most 1")
    job = Job(
        checkpoint=str(run.opened.source.path.absolute()),
        opening=run.opened.opening,
        fingerprint=read_fingerprint(run.opened.source, config, run.opened.scheme),
        kv_cache=settings.decide_cache(options.kv_cache_dtype, run.opened.scheme),
        activations=_decide_precision("activations", options.activations, own.activations, task),
        lm_head=_decide_precision("lm-head", options.lm_head, own.lm_head, task),
        world_size=run.world_size,
        context_tokens=run.context_tokens,
        eos_token_ids=end.ids,
        pad_token_id=yaml_ids.get("pad_token_id", config.pad_token_id),
        dtype=_one_of("dtype", first_not_none(options.dtype, dtype, own.dtype, settings.compute_dtype, config.dtype), tuple(DTYPES)),
        device=device.kind,
        ranks_per_device=ranks_per_device,
        collectives=_one_of("collectives", first_not_none(options.collectives, own.collectives, "auto"), get_args(CollectivesName)),
        threads_per_rank=first_not_none(options.threads_per_rank, own.threads_per_rank),
        cpu_kernels=_one_of(
            "cpu-kernels (TANDEM_CPU)", first_not_none(options.cpu_kernels, read_cpu_kernels(), "auto"), get_args(CpuKernels)
        ),
        bind_cores=_parse_flag("--bind-cores", options.bind_cores),
        timeout_seconds=first_not_none(options.timeout_seconds, own.timeout_seconds, DEFAULT_TIMEOUT_SECONDS),
        join_seconds=decide_join_seconds(options, run.environment),
        max_batch_size=first_not_none(options.max_batch_size, own.max_batch_size),
        block_size=first_not_none(options.block_size, settings.block_size, DEFAULT_BLOCK_SIZE),
        num_blocks=first_not_none(options.num_blocks, settings.num_blocks),
        prefix_cache=first_not_none(options.prefix_cache, own.prefix_cache, True),
        speculate=first_not_none(options.speculate, own.speculate, False) and run.draft is None,
        draft=run.draft.describe(options.kv_cache_dtype) if run.draft is not None else None,
        draft_tokens=first_not_none(options.draft_tokens, DEFAULT_DRAFT_TOKENS),
        task=task,
        adapters=tuple(Adapter(name, str(folder.path.absolute()), folder.fingerprint) for name, folder in run.adapters.items()),
    )
    job.plan_scheme(config, run.opened.scheme)
    for name in ("threads_per_rank", "max_batch_size", "timeout_seconds"):
        value = getattr(job, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}, but has to be above 0")
    if not job.timeout_seconds <= MAX_SECONDS:  # also rejects nan
        raise ConfigError(f"timeout_seconds is {job.timeout_seconds}, but has to be above 0 and at most {MAX_SECONDS}")
    check_blocks(job.block_size, job.num_blocks)
    choose_kernels(job.cpu_kernels)
    check_collectives(job.collectives, job.device, device.sharing)
    if job.collectives == "shm" and not shared_memory_works():
        raise ConfigError("collectives shm need the native kernels on processors other than x86-64; use --collectives gloo")
    if job.collectives == "shm" and run.nodes.num_nodes > 1:
        raise ConfigError(f"collectives shm work inside one node, but --nnodes is {run.nodes.num_nodes}; use --collectives auto")
    if device.rank_bytes is not None and not isinstance(task, Quantize):
        job = replace(job, fitting_blocks=fit_blocks(job, partial(run.plan_ranks, job), device.rank_bytes, fraction))
    return job


def _decide_precision(name: str, option: str | None, yaml: str | None, task: Task) -> str:
    """Return one of PRECISIONS: the command line's, otherwise the YAML's. A quantization computes in floats."""
    return "auto" if isinstance(task, Quantize) else _one_of(name, first_not_none(option, yaml, "auto"), PRECISIONS)


def _parse_flag(name: str, word: str | None) -> bool | None:
    flags = {"true": True, "false": False, "1": True, "0": False}
    if word is not None and word.lower() not in flags:
        raise ConfigError(f"{name} is {word!r}, but True or False is needed")
    return None if word is None else flags[word.lower()]


def _one_of(name: str, value: str, words: tuple[str, ...]) -> str:
    if value not in words:
        raise ConfigError(f"{name} is {value!r}, but has to be one of {', '.join(words)}")
    return value
