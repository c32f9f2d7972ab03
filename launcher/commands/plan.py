"""`tandem plan`: a dry run from config and headers alone, as a table, JSON or an SVG. Starts no process and loads no weights.

Without --checkpoint it does not import PyTorch, which would take longer than everything else here.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.table import Table

from launcher.environment.detection import decide_world_size, read_environment
from launcher.host.atomic_write import atomic_write
from launcher.host.cores import share_cores
from launcher.host.file_errors import as_run_failure
from launcher.host.numa import plan_nodes
from launcher.host.output_paths import check_output_file
from launcher.job.device_memory import DEFAULT_MEMORY_FRACTION, fit_ranks, parse_bytes
from launcher.reporting.plan_drawing import draw_plan
from launcher.settings.approaches import check_words, plan_recipe
from launcher.settings.checkpoint_options import PlanOptions, QuantizeOptions
from launcher.settings.lora_options import list_adapters
from launcher.settings.precedence import first_not_none
from launcher.settings.yaml_settings import Settings, open_settings
from model.draft_planning import add_draft_model
from model.planning import RankPlan, Workload, measure_balance, plan_ranks
from model.spec.config import DEFAULT_BLOCK_SIZE, DTYPES, LlamaConfig, build_config, check_blocks, read_config
from model.spec.lora_updates import LoraUpdate, count_adapter_bytes
from model.spec.run_scheme import plan_run_scheme
from model.spec.scheme import Scheme, read_scheme
from model.spec.stored_form import StoredForm
from parallel.errors import ConfigError

_DRAFT_SIZES = {"file_bytes": "reads", "weight_bytes": "weights", "kv_cache_bytes": "KV cache"}
EVEN = 0.95
"""Minimum ratio of the mean to the largest share for a rank count to be called even."""


def plan(options: PlanOptions) -> None:
    """Print the plan. Raises ConfigError, LayoutError for too many ranks, and CheckpointError for files that do not match the config."""
    check_output_file("--svg", options.svg)
    settings = open_settings(options.config, None if options.model_config else options.checkpoint)
    world_size = decide_world_size(options.workers, read_environment(), settings.model_parallel)
    config, scheme, stored = _read_model(options, settings)
    dtype = options.dtype or settings.tandem.dtype or settings.compute_dtype or config.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}, but has to be one of {', '.join(DTYPES)}")
    tokens = options.tokens or min(config.max_position_embeddings, settings.seq_length or config.max_position_embeddings)
    for flag, value in (("--batch-size", options.batch_size), ("--tokens", tokens), ("--bandwidth", options.bandwidth)):
        if value is not None and value <= 0:
            raise ConfigError(f"{flag} is {value}, but has to be above 0")
    scheme = plan_run_scheme(
        scheme,
        tied=config.tie_word_embeddings,
        kv_cache=settings.decide_cache(options.kv_cache_dtype, scheme),
        activations=options.activations or settings.tandem.activations or "auto",
        lm_head=options.lm_head or settings.tandem.lm_head or "auto",
    )
    workload = Workload(
        dtype=dtype,
        kv_cache=scheme.kv_cache,
        batch_size=options.batch_size,
        tokens=tokens,
        num_threads=options.threads_per_rank or settings.tandem.threads_per_rank or share_cores(world_size),
        block_size=settings.block_size or DEFAULT_BLOCK_SIZE,
        num_blocks=settings.num_blocks,
    )
    check_blocks(workload.block_size, workload.num_blocks)
    fraction = first_not_none(options.memory_fraction, settings.tandem.memory_fraction, DEFAULT_MEMORY_FRACTION)
    budget = int(fraction * parse_bytes("--device-memory", options.device_memory)) if options.device_memory else None
    adapters = _open_adapters(options, config)
    plans = plan_ranks(config, scheme, world_size, workload, stored, list(adapters.values()))
    drafts = _plan_draft_model(options, world_size, workload)
    both = add_draft_model(plans, drafts) if drafts else plans
    result = _describe(options, config, scheme, both, workload, stored, budget)
    result["adapters"] = {
        name: [count_adapter_bytes(config, updates, rank, world_size) for rank in range(world_size)] for name, updates in adapters.items()
    }
    if drafts:
        result["draft_model"] = {
            name: [getattr(rank, name) for rank in drafts] for name in ("file_bytes", "weight_bytes", "kv_cache_bytes")
        }
    if options.svg:
        title = f"{world_size} ranks, {config.num_hidden_layers} layers, quantization {scheme.name}, {dtype}"
        with as_run_failure():
            atomic_write(options.svg, draw_plan(plans, title))
        print(f"wrote {options.svg}", file=sys.stderr)
    if options.as_json:
        print(json.dumps(result))
    else:
        _print(result)


def _read_model(options: PlanOptions, settings: Settings) -> tuple[LlamaConfig, Scheme, dict[str, StoredForm]]:
    """Return the model's config, its quantization scheme, and the stored forms of the checkpoint's tensors."""
    stored: dict[str, StoredForm] = {}
    if options.checkpoint or (settings.load_checkpoint and not options.model_config):
        from launcher.commands.opened_model import open_model

        opened = open_model(options, settings, quantized=not options.quantization)
        config, scheme = opened.config, opened.scheme
        stored = {name: info.form for name, info in opened.source.tensors.items()}
    elif options.model_config:
        raw = read_config(options.model_config)
        config, scheme = build_config(raw, str(options.model_config)), read_scheme(raw)
        settings.compare_model_config(config, str(options.model_config))
    elif options.config:
        config, scheme = settings.build_model_config(), Scheme()
    else:
        raise ConfigError("no model: give --config, --model-config or --checkpoint")
    word = options.quantization
    if word is None and scheme.name == "none" and settings.quantization is not None and not stored:
        word = settings.quantization.approach
    if word in (None, "none"):
        return config, scheme, stored
    if scheme.name != "none":
        raise ConfigError(f"--quantization is {word}, but the model is quantized already ({scheme.name}); leave it out")
    if word == "ptq" and (settings.quantization is None or settings.quantization.approach != word):
        raise ConfigError(
            "--quantization ptq does not determine the result; give a YAML with its quantization_config (-c), or another approach"
        )
    quantize = QuantizeOptions(approach=str(word))
    return config, plan_recipe(quantize, check_words(quantize), settings.quantization).build_scheme(config), stored


def _open_adapters(options: PlanOptions, config: LlamaConfig) -> dict[str, Mapping[str, LoraUpdate]]:
    """Return the updates of each adapter of --lora."""
    if not options.lora:
        return {}
    from model.checkpoint.lora_folder import LoraFolder

    folders = list_adapters(options.lora)
    return {name: LoraFolder(path, config, follow_links=options.follow_links).updates for name, path in folders.items()}


def _plan_draft_model(options: PlanOptions, world_size: int, workload: Workload) -> list[RankPlan]:
    """Plan the ranks' parts of the draft model; empty without one. Its vocabulary is compared when a run starts."""
    if options.draft_model is None:
        return []
    from launcher.commands.draft_model import open_draft_model

    return open_draft_model(options, Path(options.draft_model), world_size).plan(world_size, workload, options.kv_cache_dtype)


def _describe(
    options: PlanOptions,
    config: LlamaConfig,
    scheme: Scheme,
    plans: list[RankPlan],
    workload: Workload,
    stored: Mapping[str, StoredForm],
    budget_bytes: int | None,
) -> dict[str, Any]:
    layout = config.layout()
    valid = range(1, layout.max_world_size + 1)
    balance = {size: measure_balance(config, scheme, size) for size in valid}
    speed = None
    if options.bandwidth:
        # A batch reads the weights once, and the KV cache of every sequence.
        slowest = max(rank.streamed_bytes + rank.kv_cache_bytes for rank in plans)
        speed = options.batch_size * options.bandwidth * 1e9 / slowest
    return {
        "workers": len(plans),
        "quantization": scheme.name,
        "encodings": sorted({form.encoding for form in stored.values() if form.encoding}),
        "dtype": workload.dtype,
        "kv_cache": workload.kv_cache or workload.dtype,
        "batch_size": workload.batch_size,
        "tokens": workload.tokens,
        "threads_per_rank": workload.num_threads,
        "numa_nodes": plan_nodes(len(plans), workload.num_threads),
        "valid_workers": list(valid),
        "why_not_more": f"{layout.max_world_size + 1} ranks are too many: the model has {layout.reason}",
        "balance": balance,
        "bandwidth_gb_per_second": options.bandwidth,
        "tokens_per_second": speed,
        "device": _fit(plans, workload, budget_bytes),
        "file_bytes": sum(rank.file_bytes for rank in plans),
        "peak_bytes": sum(rank.peak_bytes for rank in plans),
        "ranks": [asdict(rank) for rank in plans],
    }


def _fit(plans: list[RankPlan], workload: Workload, budget_bytes: int | None) -> dict[str, int] | None:
    """Return how the fullest rank fits into what it may use of a device; None without a device."""
    if budget_bytes is None:
        return None
    fit = fit_ranks(plans, workload.cached_tokens, workload.block_size, budget_bytes)
    return {**asdict(fit), "num_blocks": max(0, fit.num_blocks), "kv_cache_tokens": max(0, fit.num_blocks) * workload.block_size}


def _print(result: dict[str, Any]) -> None:
    table = Table("rank", "heads", "KV heads", "intermediate", "vocabulary", "reads", "weights", "KV cache", "activations", "peak")
    for rank in result["ranks"]:
        ranges = [f"{rank[name][0]}-{rank[name][1] - 1}" for name in ("heads", "kv_heads", "intermediate_rows", "vocab_rows")]
        sizes = [_size(rank[f"{name}_bytes"]) for name in ("file", "weight", "kv_cache", "activation", "peak")]
        table.add_row(str(rank["rank"]), *ranges, *sizes)
    print(
        f"{result['workers']} ranks, quantization {result['quantization']}, compute {result['dtype']}, cache {result['kv_cache']}, "
        f"{result['batch_size']} x {result['tokens']} tokens"
    )
    for name, sizes in result["adapters"].items():
        print(f"adapter {name}: {_size(max(sizes))} per rank, in float32, included in the peak")
    if result["encodings"]:
        print(f"stored as {', '.join(result['encodings'])}, dequantized to {result['dtype']} while loading")
    Terminal(width=130).print(table)
    if draft := result.get("draft_model"):
        words = (f"{word} {', '.join(map(_size, draft[name]))}" for name, word in _DRAFT_SIZES.items())
        print(f"of these, the draft model, by rank: {'; '.join(words)}")
    print(f"all ranks: {_size(result['file_bytes'])} read, {_size(result['peak_bytes'])} of memory at the peak if they share a host")
    if fit := result["device"]:
        left = f"{fit['kv_cache_tokens']} tokens of KV cache fit next to them" if fit["num_blocks"] else "no KV cache fits: use more ranks"
        print(
            f"device: rank {fit['rank']} may use {_size(fit['budget_bytes'])}, and needs {_size(fit['needed_bytes'])} for weights and "
            f"activations; {left}"
        )
    if len(set(result["numa_nodes"])) > 1:
        homes = ", ".join("-" if node is None else str(node) for node in result["numa_nodes"])
        print(f"NUMA nodes of the ranks on this host, from rank 0: {homes}")
    even = _ranges([size for size, share in result["balance"].items() if share >= EVEN])
    print(f"valid: 1 to {len(result['valid_workers'])} ranks ({result['why_not_more']}); even within 5 %: {even}")
    if result["tokens_per_second"]:
        print(
            f"at most {result['tokens_per_second']:.1f} tokens/s at {result['bandwidth_gb_per_second']:g} GB/s a rank, "
            f"at {result['tokens']} tokens of context"
        )


def _ranges(numbers: list[int]) -> str:
    """Format 1, 2, 3, 5 as 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
