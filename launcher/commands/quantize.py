"""`tandem quantize`: builds a recipe from options, runs ranks that quantize layer by layer, and writes a checkpoint and a report.

Depends on Golden Stick's option names and presets; the arithmetic is in the model package.
"""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.commands.checkpoint_target import claim_target, tell_written
from launcher.commands.job_plan import build_job
from launcher.commands.opened_run import Run, open_run
from launcher.commands.run_ranks import run_to_result
from launcher.host.file_errors import as_run_failure
from launcher.job.tasks import Quantize
from launcher.reporting.console import ByteProgress
from launcher.settings.approaches import check_words, plan_recipe
from launcher.settings.checkpoint_options import QuantizeOptions
from model.checkpoint.mindspore_file import MindSporeFile
from model.export.mindspore import SUFFIX, check_form
from model.export.quantized_folder import write_quantized
from model.quantization.datasets import read_samples
from model.quantization.recipe import Recipe
from model.quantization.work_folder import WorkFolder, describe_samples
from model.spec.scheme import Scheme
from parallel.errors import CheckpointError, ConfigError

DEFAULT_SAMPLE_TOKENS = 2048


def quantize(options: QuantizeOptions, *, float_dtype: str | None = None) -> None:
    """Write a quantized checkpoint. `float_dtype`: a key of DTYPES for the weights that stay float; None keeps each dtype.

    Raises InputError before anything is written, RanksFailedError if ranks fail.
    """
    recipe_words = check_words(options)
    run = open_run(options, quantized=False)
    source, config = run.opened.source, run.opened.config
    if run.opened.scheme.name != "none":
        raise CheckpointError(
            f"{source.path} is quantized already ({run.opened.scheme.name}); quantize the float checkpoint that it was made from"
        )
    if config.attention_bias or config.mlp_bias:
        raise CheckpointError(f"{source.path} has biases, and quantizing such a model is not supported: run it as it is")
    recipe = plan_recipe(options, recipe_words, run.settings.quantization)
    scheme = recipe.build_scheme(config)
    writes_ckpt = _decide_ckpt(options, run, scheme)
    target = options.output or Path("output") / f"{options.approach}_ckpt"
    if source.path.is_dir() and target.absolute().is_relative_to(source.path.absolute()):
        raise CheckpointError(f"{target} lies inside the checkpoint {source.path}; choose another path with --output")
    with ExitStack() as stack:
        if not run.environment.rank:
            stack.enter_context(claim_target("--output", target, overwrite=options.overwrite))
        _quantize(options, run, recipe, target, float_dtype, f"rank_0/{options.approach}{SUFFIX}" if writes_ckpt else None)


def _decide_ckpt(options: QuantizeOptions, run: Run, scheme: Scheme) -> bool:
    """Return whether to write a `.ckpt` too: on request, or for a `.ckpt` if there is a form. Raises CheckpointError if there is none."""
    if options.output_format == "hf":
        return False
    if options.output_format is None and not isinstance(run.opened.source, MindSporeFile):
        return False
    try:
        check_form(run.opened.config, scheme)
    except CheckpointError as error:
        if options.output_format is not None:
            raise
        if not run.environment.rank:
            print(f"note: {error}; writing only the Hugging Face folder", file=sys.stderr)
        return False
    return True


def _quantize(options: QuantizeOptions, run: Run, recipe: Recipe, target: Path, float_dtype: str | None, ckpt: str | None) -> None:
    """Run the ranks and write the result. For `float_dtype` and `ckpt` see `write_quantized`."""
    source, config = run.opened.source, run.opened.config
    scheme = recipe.build_scheme(config)
    samples = _read_samples(options, run) if recipe.needs_samples else []
    work = WorkFolder(target.absolute().with_name(f".{target.name}.quantizing"), run.world_size)
    job = build_job(
        run, Quantize(recipe=recipe, samples=tuple(samples), work_folder=str(work.path)), dtype="float32" if not options.dtype else None
    )
    started = time.perf_counter()
    if not run.environment.rank:
        with as_run_failure(work.path):
            done = work.open(_describe(run, recipe, samples, job.dtype))
        if done:
            print(f"{done} of {config.num_hidden_layers + 1} layers are already done; resuming", file=sys.stderr)
    found = run_to_result(run, job, f"quantizing ({options.approach}), layers", "layers that are done are kept")
    if found is None:
        return
    report = _build_report(options, run, recipe, scheme.name, samples, work, found)
    progress = ByteProgress("writing")
    with as_run_failure(target):
        try:
            write_quantized(source, config, scheme, work, target, report, progress, float_dtype, ckpt)
        finally:
            progress.close()
        work.remove()
    print("\n".join(describe_report(report)))
    tell_written(target, started)
    if ckpt is not None:
        print(f"wrote {target / ckpt}: the same tensors, in Golden Stick's names", file=sys.stderr)


def describe_report(report: dict[str, Any]) -> list[str]:
    """Format the report for the terminal."""
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
    """Return one entry per input, largest outlier first; linears with a common input share an entry."""
    inputs: dict[tuple[str, float, int], dict[str, Any]] = {}
    for entry in linears:
        if "outlier" in entry:
            inputs.setdefault((entry["linear"].rpartition(".")[0], entry["outlier"], entry["outlier_channel"]), entry)
    return sorted(inputs.values(), key=lambda entry: float(entry["outlier"]), reverse=True)


def _read_samples(options: QuantizeOptions, run: Run) -> list[tuple[int, ...]]:
    if options.dataset is None or options.dataset_path is None:
        raise ConfigError(f"-a {options.approach} needs calibration data: give it with -t boolq|squad1.1|wikitext2|ids -s FILE")
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
    """Describe the job of a work folder: the same options on the same files resume it."""
    path = run.opened.source.path
    beside = path.rglob("*") if path.is_dir() else run.opened.source.files
    files = sorted(file for file in beside if file.is_file())
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
        "written_bytes": 0,  # filled in after writing
        **result,
        "linears": work.read_reports(),
    }
