"""`tandem bench`: decode and prefill speed on this machine, compared with its memory bandwidth.

Depends on options and output formatting; the measurement itself is in `launcher/worker/bench.py`.
"""

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from launcher.commands.env import read_processor
from launcher.commands.job_plan import build_job
from launcher.commands.opened_model import OpenedModel, open_model
from launcher.commands.opened_run import Run, open_run
from launcher.commands.preparation import writes_results
from launcher.commands.profile_report import build_trace, print_profile
from launcher.commands.run_ranks import run_to_result
from launcher.host.atomic_write import atomic_write
from launcher.host.cores import count_cores
from launcher.host.file_errors import as_run_failure
from launcher.host.output_paths import check_output_file
from launcher.host.program_version import read_version
from launcher.job.speculation_prompts import describe_row, encode_prompts
from launcher.job.tasks import Bench
from launcher.settings.approaches import APPROACHES, check_words, plan_recipe
from launcher.settings.checkpoint_options import QuantizeOptions
from launcher.settings.measure_options import BenchOptions
from launcher.settings.precedence import first_not_none
from launcher.settings.yaml_settings import Settings
from model.checkpoint.first_layers import FirstLayers, check_num_layers
from model.checkpoint.formats import OpenOptions
from model.checkpoint.random_source import RandomSource
from model.spec.config import LlamaConfig, build_config, read_config
from model.spec.scheme import Scheme, declare_scheme, read_scheme
from parallel.errors import ConfigError

RANDOM_QUANTIZATIONS = ("none", "rtn-a16w8", "a8w8", "rtn-a16w4")
"""Choices of --quantization: the schemes that need no calibration data."""
DEFAULT_QUANTIZATION = "rtn-a16w8"
DEFAULT_BATCH_SIZES = (1, 8)
DEFAULT_PROMPT_TOKENS, DEFAULT_NEW_TOKENS = 512, 32
_GROUP_SIZES = (128, 64, 32)


def bench(options: BenchOptions) -> None:
    """Measure and print. Raises InputError before anything starts, RanksFailedError if ranks fail."""
    _check_words(options)
    if writes_results(options):
        check_output_file("--profile", options.profile)
    batch_sizes = read_batch_sizes(options.batch_sizes)
    run = open_run(replace(options, max_batch_size=max(batch_sizes)), opener=lambda settings: _open(options, settings))
    task = plan_bench(options, run, batch_sizes)
    job = build_job(run, task)
    measured = run_to_result(run, job, "measuring, rounds", "the measurement starts over")
    if measured is None:
        return
    profile = measured.pop("profile", None)
    result = describe_result(task, run, measured)
    if profile is not None and options.profile is not None:
        with as_run_failure():
            atomic_write(options.profile, json.dumps(build_trace(profile)) + "\n")
        print_profile(profile, sys.stderr if options.as_json else sys.stdout)
        print(f"wrote {options.profile}; open it in https://ui.perfetto.dev or chrome://tracing", file=sys.stderr)
    print(json.dumps(result) if options.as_json else "\n".join(write_lines(result)))


def read_batch_sizes(words: tuple[str, ...]) -> tuple[int, ...]:
    """Parse `1,8` and `16` as 1, 8, 16. Raises ConfigError unless all are positive integers without duplicates."""
    sizes = []
    for word in ",".join(words).split(",") if words else map(str, DEFAULT_BATCH_SIZES):
        if not word.strip().isascii() or not word.strip().isdigit() or int(word) < 1:
            raise ConfigError(f"--batch-size is {word!r}, but whole numbers above 0 are needed, such as 1,8")
        if int(word) in sizes:
            raise ConfigError(f"--batch-size names {int(word)} twice; remove one")
        sizes.append(int(word))
    return tuple(sizes)


def plan_bench(options: BenchOptions, run: Run, batch_sizes: tuple[int, ...]) -> Bench:
    """Plan the task. Raises InputError if the measurement exceeds the context or the prompts cannot be encoded."""
    context = run.context_tokens
    if context < 3:
        raise ConfigError(f"the model's context is {context} tokens, but a measurement needs at least 3")
    prompt_tokens = first_not_none(options.prompt_tokens, min(DEFAULT_PROMPT_TOKENS, context - 1))
    new_tokens = first_not_none(options.new_tokens, min(DEFAULT_NEW_TOKENS, context - 2))
    for flag, value, most in (("--prompt-tokens", prompt_tokens, context - 1), ("--new-tokens", new_tokens, context - 2)):
        if not 1 <= value <= most:
            raise ConfigError(f"{flag} is {value}, but has to be from 1 to {most}: the model's context is {context}")
    speculates = options.speculate or options.draft_model is not None
    source = run.opened.source
    whole = source.whole if isinstance(source, FirstLayers) else source
    return Bench(
        batch_sizes=batch_sizes,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=options.rounds,
        num_layers=options.num_layers,
        random_values=json.dumps(whole.config) if isinstance(whole, RandomSource) else None,
        speculated=encode_prompts(run.read_tokenizer(), context, run.opened.config.vocab_size) if speculates else (),
        profile=options.profile is not None,
        command_started=read_start_seconds(),
    )


def describe_result(task: Bench, run: Run, measured: dict[str, Any]) -> dict[str, Any]:
    """Build the object that --json prints from rank 0's measurements."""
    path, step_bytes = run.opened.source.path, measured["decode_bytes_per_step"]
    for one in measured["decode"]:
        one["bytes_per_second"] = step_bytes * one["tokens_per_second"] / one["batch_size"]
        one["bandwidth_share"] = one["bytes_per_second"] / one["memory_bytes_per_second"]
    known = {
        "bench": "tandem",
        "version": read_version(),
        "model": path.parent.name if path.name == "config.json" else path.stem if path.is_file() else path.name,
        "num_layers": run.opened.config.num_hidden_layers,
        "machine": read_processor(),
        "cores": count_cores(),
        "date": date.today().isoformat(),
        "prompt_tokens": task.prompt_tokens,
        "new_tokens": task.new_tokens,
        "rounds": task.rounds,
    }
    result = {**known, **measured}
    return {name: result[name] for name in RESULT_NAMES}


RESULT_NAMES = (
    *("bench", "version", "model", "num_layers", "quantization", "dtype", "kernel", "collectives", "world_size", "threads_per_rank"),
    "cores_bound",
    *("device", "machine", "cores", "date", "prompt_tokens", "new_tokens", "rounds", "memory_bandwidth_bytes_per_second"),
    *("weight_bytes", "decode_bytes_per_step", "load_seconds", "read_bytes", "time_to_first_token_seconds"),
    *("start_to_first_token_seconds", "prefill_tokens_per_second", "decode", "speculation", "gather_seconds"),
    *("peak_rss_bytes", "peak_device_bytes"),
)
"""Keys of the object that --json prints, in order."""


def write_lines(result: dict[str, Any]) -> list[str]:
    """Format a result for the terminal."""
    r = result
    lines = [
        f"{r['model']}, {r['num_layers']} layers, {r['quantization']}, {r['dtype']}: {r['world_size']} rank(s) x {r['threads_per_rank']} "
        f"thread(s), {r['kernel']}, {r['collectives']}",
        f"{r['machine']}, {r['cores']} cores, ranks {'bound' if r['cores_bound'] else 'not bound'} to them, {r['date']}",
        f"memory    {r['memory_bandwidth_bytes_per_second'] / 1e9:8.1f} GB/s read bandwidth of all ranks together",
        f"load      {r['load_seconds']:8.2f} s; first token {r['start_to_first_token_seconds']:.2f} s after the start of the command",
        f"prefill   {r['prefill_tokens_per_second']:8.1f} tokens/s; first token {r['time_to_first_token_seconds'] * 1e3:.1f} ms after a "
        f"prompt of {r['prompt_tokens']} tokens",
    ]
    for one in r["decode"]:
        lines.append(
            f"decode    {one['tokens_per_second']:8.1f} tokens/s, batch {one['batch_size']} ({one['tokens_per_second_min']:.1f} to "
            f"{one['tokens_per_second_max']:.1f}); weights at {one['bytes_per_second'] / 1e9:.1f} GB/s, "
            f"{one['bandwidth_share']:.0%} of memory bandwidth"
        )
    lines += map(describe_row, r["speculation"] or ())
    sizes = [", ".join(f"{size / 1e6:.0f}" for size in r[name]) for name in ("weight_bytes", "peak_rss_bytes")]
    return [
        *lines,
        f"gather    {r['gather_seconds'] * 1e6:8.1f} us, one layer's output for one token",
        f"weights   {sizes[0]} MB on each rank; {r['decode_bytes_per_step'] / 1e6:.0f} MB read per token",
        f"peak      {sizes[1]} MB of memory on each rank",
    ]


def read_start_seconds() -> float:
    """Return when this process started, on the clock of time.monotonic(), to a hundredth of a second."""
    with suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return time.monotonic()


def _check_words(options: BenchOptions) -> None:
    """Raise ConfigError for options that contradict each other."""
    if options.random_weights:
        for flag, value in (
            ("--checkpoint", options.checkpoint),
            ("--from", options.format),
            ("--key-file", options.key_file),
            ("--fused-order", options.fused_order),
        ):
            if value is not None:
                raise ConfigError(f"{flag} cannot be combined with --random-weights, which reads no checkpoint; drop one of them")
        for flag, given in (("--speculate", options.speculate), ("--draft-model", options.draft_model)):
            if given:
                raise ConfigError(
                    f"{flag} cannot be combined with --random-weights, because its gain depends on the text: give --checkpoint instead"
                )
    else:
        for flag, given in (("--model-config", options.model_config), ("--quantization", options.quantization)):
            if given is not None:
                raise ConfigError(f"{flag} requires --random-weights, because a checkpoint declares its own; add that, or drop {flag}")
    if options.quantization is not None and options.quantization not in RANDOM_QUANTIZATIONS:
        raise ConfigError(f"--quantization is {options.quantization!r}, but has to be one of {', '.join(RANDOM_QUANTIZATIONS)}")
    if options.rounds < 1:
        raise ConfigError(f"--rounds is {options.rounds}, but has to be at least 1")


def _open(options: BenchOptions, settings: Settings) -> OpenedModel:
    opened = _open_random(options, settings) if options.random_weights else open_model(options, settings)
    if options.num_layers is None:
        return opened
    check_num_layers(opened.config, options.num_layers)
    config = replace(opened.config, num_hidden_layers=options.num_layers)
    return replace(opened, source=FirstLayers(opened.source, options.num_layers), config=config)


def _open_random(options: BenchOptions, settings: Settings) -> OpenedModel:
    values = read_config(options.model_config) if options.model_config else settings.build_model_values()
    if values is None:
        raise ConfigError("--random-weights needs the shape of a model: give --model-config, or a --config with a model_config")
    path = options.model_config or Path(settings.source)
    config, declared = build_config(values, str(path)), read_scheme(values)
    settings.compare_model_config(config, str(path))
    # Weights are generated in the compute dtype, as a checkpoint for it would store them.
    dtype = first_not_none(options.dtype, settings.tandem.dtype, settings.compute_dtype, config.dtype)
    values = {**{key: value for key, value in values.items() if key != "torch_dtype"}, "dtype": dtype}
    if declared.name == "none":
        values = declare_scheme(values, _plan_scheme(options, settings, config))
    elif options.quantization is not None:
        raise ConfigError(f"--quantization is {options.quantization}, but {path} declares {declared.name} already; leave it out")
    source = RandomSource(values, path)
    return OpenedModel(source, build_config(values, str(path)), read_scheme(values), OpenOptions())


def _plan_scheme(options: BenchOptions, settings: Settings, config: LlamaConfig) -> Scheme:
    """Return the scheme a checkpoint of this shape would declare. int4 uses the largest common group size that divides its columns."""
    word = first_not_none(options.quantization, settings.quantization.approach if settings.quantization else None, DEFAULT_QUANTIZATION)
    if word not in RANDOM_QUANTIZATIONS:
        raise ConfigError(f"{settings.source} requests {word}, which needs data; give --quantization: {', '.join(RANDOM_QUANTIZATIONS)}")
    if word == "none":
        return Scheme()
    grouped = "group_size" in APPROACHES[word].options
    for size in _GROUP_SIZES if grouped else (None,):
        quantize = QuantizeOptions(approach=word, group_size=size)
        try:
            return plan_recipe(quantize, check_words(quantize), None).build_scheme(config)
        except ConfigError:
            if not grouped or size == _GROUP_SIZES[-1]:
                raise
    raise AssertionError("the last size returns or raises")
