"""`tandem quantize`: from words to a recipe, ranks that round layer by layer, one folder, and a report.

Knows Golden Stick's words and presets; the arithmetic is the model package's.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.console import WorkConsole, WorkProgress
from launcher.quantization_settings import QuantizationSettings
from launcher.rewriting import tell_written
from launcher.running import Run, RunOptions, build_job, open_run, run_job
from launcher.tasks import Quantize
from model.checkpoint.folder_writing import check_target
from model.checkpoint.quantized_writing import write_quantized
from model.quantization.datasets import read_samples
from model.quantization.recipe import Recipe
from model.quantization.work_folder import WorkFolder, describe_samples
from model.scheme import LinearScheme
from parallel.errors import CheckpointError, ConfigError

DEFAULT_SAMPLES = 200
"""Golden Stick's."""
DEFAULT_SAMPLE_TOKENS = 2048
DEFAULT_GROUP_SIZE = 128
KV_GRANULARITIES = {"per_channel": "channel", "per_token": "token"}

_WEIGHTS = LinearScheme()
_STATIC = LinearScheme(packed=False, activation="tensor", activation_symmetric=False)
_DYNAMIC = LinearScheme(packed=False, activation="token")
_HEAD, _HEAD_AND_DOWN = ("lm_head",), ("lm_head", "w2")


@dataclass(frozen=True, slots=True)
class _Preset:
    """What an approach is without further words."""

    linear: LinearScheme | None
    not_converted: tuple[str, ...]
    method: str = "rtn"
    smooth: bool = False
    kv_cache: bool = False
    quant_method: str | None = None
    """The method of a YAML's quantization_config that is the same thing."""
    options: tuple[str, ...] = ()
    """Which options shape it."""


_PRESETS = {
    "rtn-a16w8": _Preset(_WEIGHTS, _HEAD, quant_method="rtn", options=("kvcache_dtype",)),
    "rtn-c8": _Preset(None, (), kv_cache=True, quant_method="rtn"),
    "smooth_quant": _Preset(_STATIC, _HEAD_AND_DOWN, smooth=True, quant_method="smooth_quant", options=("alpha", "fold")),
    "ptq": _Preset(
        None,
        (),
        quant_method="ptq",
        options=("weight_dtype", "kvcache_dtype", "act_quant_dtype", "outliers", "alpha", "fold"),
    ),
    "gptq": _Preset(LinearScheme(bits=4), _HEAD, method="gptq", options=("group_size", "symmetric", "kvcache_dtype")),
    "awq": _Preset(LinearScheme(bits=4), _HEAD, method="awq", options=("group_size", "symmetric", "kvcache_dtype")),
    "rtn-a16w4": _Preset(LinearScheme(bits=4), _HEAD, options=("group_size", "symmetric", "kvcache_dtype")),
    "a8w8": _Preset(_DYNAMIC, _HEAD, options=("kvcache_dtype",)),
}
_NOT_GIVEN = (None, "none", "None")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions(RunOptions):
    """What the command line says; None is not said."""

    approach: str = ""
    dataset: str | None = None
    dataset_path: Path | None = None
    num_samples: int = DEFAULT_SAMPLES
    sample_tokens: int | None = None
    weight_dtype: str | None = None
    kvcache_dtype: str | None = None
    act_quant_dtype: str | None = None
    outliers: str | None = None
    not_converted: tuple[str, ...] = ()
    alpha: float | None = None
    fold: bool | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    kv_granularity: str | None = None
    output: Path | None = None
    overwrite: bool = False


def quantize(options: QuantizeOptions) -> None:
    """Write a quantized checkpoint. Raises InputError before anything is written, RanksFailedError when ranks failed."""
    recipe_words = _check_words(options)
    run = open_run(options, quantized=False)
    source, config = run.opened.source, run.opened.config
    if run.opened.scheme.name != "none":
        raise CheckpointError(
            f"{source.path} is quantized already ({run.opened.scheme.name}); quantize the float checkpoint that it was made from"
        )
    recipe = plan_recipe(options, recipe_words, run.settings.quantization)
    scheme = recipe.build_scheme(config)
    target = options.output or Path("output") / f"{options.approach}_ckpt"
    check_target(target, overwrite=options.overwrite)
    if source.path.is_dir() and target.absolute().is_relative_to(source.path.absolute()):
        raise CheckpointError(f"{target} lies inside the checkpoint {source.path}; name another place with --output")
    samples = _read_samples(options, run) if recipe.needs_samples else []
    work = WorkFolder(target.absolute().with_name(f".{target.name}.quantizing"), run.world_size)
    job = build_job(
        run, Quantize(recipe=recipe, samples=tuple(samples), work_folder=str(work.path)), dtype="float32" if not options.dtype else None
    )
    console = WorkConsole(run.world_size, f"quantizing ({options.approach}), layers")
    started = time.perf_counter()
    if not run.environment.rank:
        done = work.open(_describe(run, recipe, samples, job.dtype))
        if done:
            print(f"{done} of {config.num_hidden_layers + 1} layers are done already; going on", file=sys.stderr)
    try:
        run_job(run, job, console.on_event, "layers that are done are kept")
    finally:
        console.close()
    if run.environment.rank:
        return
    assert console.result is not None
    report = _build_report(options, run, recipe, scheme.name, samples, work, console.result)
    progress = WorkProgress("writing, tensors")
    try:
        write_quantized(source, config, scheme, work, target, report, progress)
    finally:
        progress.close()
    work.remove()
    print("\n".join(describe_report(report)))
    tell_written(target, started)


def plan_recipe(options: QuantizeOptions, preset: _Preset, yaml: QuantizationSettings | None) -> Recipe:
    """The recipe of these words. A YAML's quantization_config of the same method says which layers stay float, and alpha."""
    same = yaml if yaml is not None and yaml.quant_method == preset.quant_method else None
    if yaml is not None and same is None:
        print(f"warning: quantization_config ({yaml.quant_method}) is not what -a {options.approach} makes; it is ignored", file=sys.stderr)
    linear, kv_cache, smooth = preset.linear, preset.kv_cache, preset.smooth
    if options.approach == "ptq":
        asked = QuantizationSettings(
            quant_method="ptq",
            weight_dtype=_dtype(options.weight_dtype, same.weight_dtype if same else None),
            activation_dtype=_dtype(options.act_quant_dtype, same.activation_dtype if same else None),
            kvcache_dtype=_dtype(options.kvcache_dtype, same.kvcache_dtype if same else None),
            outliers_suppression=_dtype(options.outliers, same.outliers_suppression if same else None),
        )
        linear = None if asked.weight_dtype is None else _STATIC if asked.activation_dtype else _WEIGHTS
        kv_cache, smooth = asked.kvcache_dtype == "int8", asked.outliers_suppression == "smooth"
    elif _dtype(options.kvcache_dtype, None) == "int8":
        kv_cache = True
    if options.kv_granularity and not kv_cache:
        raise ConfigError(f"--kvcache-granularity is {options.kv_granularity}, but no int8 cache is asked for; add -k int8")
    if options.not_converted and linear is None:
        raise ConfigError(f"-b names layers that stay float, but -a {options.approach} makes no integer weights; leave it out")
    if linear is not None and "group_size" in preset.options:
        symmetric = linear.symmetric if options.symmetric is None else options.symmetric
        linear = LinearScheme(bits=4, group_size=options.group_size or DEFAULT_GROUP_SIZE, symmetric=symmetric)
    algorithm_args = same.algorithm_args if same else {}
    alpha = options.alpha if options.alpha is not None else float(algorithm_args.get("alpha", algorithm_args.get("smooth_alpha", 0.5)))
    return Recipe(
        approach=options.approach,
        linear=linear,
        kv_cache=KV_GRANULARITIES[options.kv_granularity or "per_channel"] if kv_cache else None,
        method=preset.method,
        smooth=smooth and linear is not None,
        alpha=alpha,
        fold=bool(options.fold),
        half_scales=options.approach == "ptq" and linear is not None and linear.activation is None,
        not_converted=options.not_converted or (same.modules_to_not_convert if same else ()) or preset.not_converted,
    )


def describe_report(report: dict[str, Any]) -> list[str]:
    """The report in lines for people."""
    linears = report["linears"]
    lines = [f"{report['approach']}: {report['quantization']}, {report['samples']} samples, {report['sample_tokens']} tokens"]
    if linears:
        worst = sorted(linears, key=lambda entry: entry["relative_error"], reverse=True)[:5]
        mean = sum(entry["relative_error"] for entry in linears) / len(linears)
        lines.append(f"relative error of the {linears[0]['error_of']}s: mean {mean:.4f} over {len(linears)} linears; the largest:")
        lines += [f"  {entry['relative_error']:.4f}  {entry['linear']}" for entry in worst]
    outliers = _find_outliers(linears)
    if outliers:
        lines.append("largest inputs, against the median channel of the same input:")
        lines += [
            f"  {entry['outlier']:.1f} / {entry['median_absmax']:.2f}  channel {entry['outlier_channel']} of {entry['linear']}"
            for entry in outliers[:5]
        ]
    before, after = report["source_bytes"], report["written_bytes"]
    lines.append(f"tensors: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after ({after / before:.0%})")
    return lines


def _find_outliers(linears: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry an input, the largest first: linears of one input saw the same."""
    inputs: dict[tuple[str, float, int], dict[str, Any]] = {}
    for entry in linears:
        if "outlier" in entry:
            inputs.setdefault((entry["linear"].rpartition(".")[0], entry["outlier"], entry["outlier_channel"]), entry)
    return sorted(inputs.values(), key=lambda entry: float(entry["outlier"]), reverse=True)


def _check_words(options: QuantizeOptions) -> _Preset:
    if options.approach not in _PRESETS:
        raise ConfigError(f"the approach {options.approach!r} is unknown; there are {', '.join(_PRESETS)} (option -a)")
    preset = _PRESETS[options.approach]
    given = {
        "weight_dtype": ("-w", options.weight_dtype),
        "kvcache_dtype": ("-k", options.kvcache_dtype),
        "act_quant_dtype": ("--act-quant-dtype", options.act_quant_dtype),
        "outliers": ("--outliers", options.outliers),
        "alpha": ("--alpha", options.alpha),
        "fold": ("--fold", options.fold or None),
        "group_size": ("--group-size", options.group_size),
        "symmetric": ("--symmetric/--asymmetric", options.symmetric),
    }
    for name, (flag, value) in given.items():
        if value not in _NOT_GIVEN and name not in preset.options:
            takes = [word for word, other in _PRESETS.items() if name in other.options]
            raise ConfigError(f"{flag} does not go with -a {options.approach}; it does with {', '.join(takes)}")
    for flag, value, words in (
        ("-w", options.weight_dtype, ("int8", "none")),
        ("-k", options.kvcache_dtype, ("int8", "none")),
        ("--act-quant-dtype", options.act_quant_dtype, ("int8", "none")),
        ("--outliers", options.outliers, ("smooth", "none")),
        ("--kvcache-granularity", options.kv_granularity, tuple(KV_GRANULARITIES)),
    ):
        if value is not None and value not in (*words, *_NOT_GIVEN):
            raise ConfigError(f"{flag} is {value!r}, but has to be {' or '.join(words)}")
    if options.group_size is not None and options.group_size < 1:
        raise ConfigError(f"--group-size is {options.group_size}, but has to be at least 1; usual are 64 and 128")
    return preset


def _dtype(word: str | None, default: str | None) -> str | None:
    return default if word is None else None if word in _NOT_GIVEN else word


def _read_samples(options: QuantizeOptions, run: Run) -> list[tuple[int, ...]]:
    if options.dataset is None or options.dataset_path is None:
        raise ConfigError(f"-a {options.approach} has to see activations: give data with -t boolq|squad1.1|wikitext2|ids -s FILE")
    longest = run.context_tokens if options.dataset.lower() == "ids" else min(run.context_tokens, DEFAULT_SAMPLE_TOKENS)
    return read_samples(
        options.dataset,
        options.dataset_path,
        None if options.dataset.lower() == "ids" else run.read_tokenizer(),
        num_samples=options.num_samples,
        max_tokens=min(options.sample_tokens or longest, run.context_tokens),
        vocab_size=run.opened.config.vocab_size,
    )


def _describe(run: Run, recipe: Recipe, samples: list[tuple[int, ...]], dtype: str) -> dict[str, Any]:
    """What a work folder is for: the same words on the same files go on with it."""
    path = run.opened.source.path
    files = sorted(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    return {
        "checkpoint": str(path.absolute()),
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "recipe": asdict(recipe),
        "samples": describe_samples(samples),
        "dtype": dtype,
        "world_size": run.world_size,
    }


def _build_report(
    options: QuantizeOptions,
    run: Run,
    recipe: Recipe,
    quantization: str,
    samples: list[tuple[int, ...]],
    work: WorkFolder,
    result: dict[str, Any],
) -> dict[str, Any]:
    return {
        "approach": options.approach,
        "quantization": quantization,
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "checkpoint": run.opened.source.path.name,
        "dataset": options.dataset if samples else None,
        "samples": len(samples),
        "sample_tokens": sum(map(len, samples)),
        "source_bytes": sum(info.num_bytes for info in run.opened.source.tensors.values()),
        "written_bytes": 0,  # known when it is written
        **result,
        "linears": work.read_reports(),
    }
