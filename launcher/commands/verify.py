"""`tandem verify`: says whether a checkpoint is whole, in lines or as JSON.

Knows options and what to say; files and tensors are checked by the model package.
"""

import json
from dataclasses import asdict
from typing import Any

from launcher.commands.run_ranks import find_checkpoint, plan_opening
from launcher.host.cores import count_cores
from launcher.reporting.console import ByteProgress
from launcher.settings.options import CheckpointOptions
from launcher.settings.yaml_settings import open_settings
from model.checkpoint.formats import FORMATS, find_format, open_checkpoint
from model.checkpoint.source import CheckpointSource
from model.checkpoint.verification import check_files, check_tensors, describe_damage, list_not_numbers
from model.spec.config import build_config
from model.spec.scheme import read_scheme
from model.spec.weights import compare_tensors, plan_weights
from parallel.errors import CheckpointError, InputError

_MAX_THREADS = 4


def verify(options: CheckpointOptions, *, deep: bool, as_json: bool) -> None:
    """Print what was found. Raises CheckpointError when anything is wrong."""
    settings = open_settings(options.config)
    path = find_checkpoint(options.checkpoint, settings)
    result: dict[str, Any] = {"checkpoint": str(path), "ok": False, "problems": []}
    try:
        source = open_checkpoint(path, plan_opening(options, settings))
        result["format"] = options.format or find_format(source.path)
        settings.compare_model_config(build_config(source.config, str(path)), str(path))
        result |= _check(source, deep=deep)
    except InputError as error:
        result["problems"].append(str(error))
    problems = result["problems"]
    result["ok"] = not problems
    if as_json:
        print(json.dumps(result))
    else:
        _print(result)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(f"{path} has {count}" if not as_json else f"{path} has {count}, the first: {problems[0]}")


def _check(source: CheckpointSource, *, deep: bool) -> dict[str, Any]:
    config, scheme = build_config(source.config), read_scheme(source.config)
    report = compare_tensors(plan_weights(config, scheme), source.tensors, tied=config.tie_word_embeddings)
    words = report.describe()
    problems = [f"{source.path} does not fit its config: {words}"] if words else []
    files = check_files(source, ByteProgress("hashing files"))
    problems += [describe_damage(file) for file in files if not file.is_intact]
    threads = min(_MAX_THREADS, count_cores())
    tensors = check_tensors(source, threads, deep=deep, on_progress=ByteProgress("hashing tensors"))
    problems += list_not_numbers(tensors)
    return {
        "quantization": scheme.name,
        "num_tensors": len(source.tensors),
        "tensor_bytes": sum(info.num_bytes for info in source.tensors.values()),
        "files": [{**asdict(file), "ok": file.is_intact} for file in files],
        "tensors": [asdict(tensor) for tensor in tensors],
        "deep": deep,
        "missing": report.missing,
        "unexpected": report.unexpected,
        "mismatched": report.mismatched,
        "problems": problems,
    }


def _print(result: dict[str, Any]) -> None:
    if "format" in result:
        print(f"{result['checkpoint']}: {FORMATS[result['format']].name}")
    if "files" in result:
        print(f"{result['num_tensors']} tensors, {result['tensor_bytes'] / 1e6:.1f} MB, quantization {result['quantization']}")
        for file in result["files"]:
            against = f"as {file['recorded_in']} says" if file["recorded_in"] else "nothing is recorded of it"
            print(f"{file['sha256']}  {file['name']}  {file['size_bytes']} bytes, {against if file['ok'] else 'DAMAGED'}")
    for problem in result["problems"]:
        print(f"problem: {problem}")
    print("ok" if result["ok"] else "not ok")
