"""`tandem verify`: checks the integrity of a checkpoint and reports as text or JSON.

Depends on options and output formatting; files and tensors are checked by the model package.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.commands.opened_model import find_checkpoint, plan_opening, read_tokenizer_of
from launcher.host.cores import count_cores
from launcher.reporting.console import ByteProgress
from launcher.settings.checkpoint_options import VerifyOptions
from launcher.settings.tokenizer_location import locate_tokenizer
from launcher.settings.yaml_settings import Settings, open_settings
from model.checkpoint.formats import FORMATS, OpenOptions, find_format, lacks_config, open_checkpoint, settle_options
from model.checkpoint.mindspore_container import MindSporeContainer
from model.checkpoint.notes import list_dropped, list_notes
from model.checkpoint.source import CheckpointSource
from model.checkpoint.stored_facts import find_contradictions
from model.checkpoint.verification import check_files, check_tensors, describe_damage, list_not_numbers
from model.spec.config import LlamaConfig, build_config
from model.spec.quoting import quote_name
from model.spec.scheme import read_scheme
from model.spec.weights import compare_tensors, plan_weights
from model.text.chat_templates import read_chat_templates
from model.text.tokenizer_files import TOKENIZER_FILES
from parallel.errors import CheckpointError, InputError

_MAX_THREADS = 4
_SHOWN = 10


def verify(options: VerifyOptions) -> None:
    """Print the findings. Raises CheckpointError if there are problems."""
    settings = open_settings(options.config, options.checkpoint)
    path = find_checkpoint(options.checkpoint, settings)
    result: dict[str, Any] = {"checkpoint": str(path), "ok": False, "problems": [], "warnings": []}
    try:
        opening = plan_opening(options, settings)
        if opening.values is None and lacks_config(path, opening):
            container = MindSporeContainer(path, opening.key_path)
            result |= {"format": "mindspore", "config": None, **_check_container(container, deep=options.deep)}
        else:
            source = open_checkpoint(path, opening)
            result["format"] = options.format or find_format(source.path)
            config = build_config(source.config, str(path))
            settings.compare_model_config(config, str(path))
            result |= _check(source, deep=options.deep)
            result["warnings"] += _check_tokenizer(
                locate_tokenizer(settings, source.tokenizer_path()), config, settings, result["problems"]
            )
    except InputError as error:
        result["problems"].append(str(error))
    problems = result["problems"]
    result["ok"] = not problems
    if options.as_json:
        print(json.dumps(result))
    else:
        _print(result)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(f"{path} has {count}" if not options.as_json else f"{path} has {count}, the first: {problems[0]}")


def _check(source: CheckpointSource, *, deep: bool) -> dict[str, Any]:
    config, scheme = build_config(source.config), read_scheme(source.config)
    report = compare_tensors(plan_weights(config, scheme), source.tensors, tied=config.tie_word_embeddings)
    words = report.describe(config)
    problems = [f"{source.path} does not fit its config: {words}"] if words else []
    found = _check_content(source, problems, deep=deep)
    problems += find_contradictions(source, config, scheme, deep=deep) if not words else []
    return {
        "quantization": scheme.name,
        **found,
        "dropped": sorted(set(list_dropped(source, config, scheme)) - set(report.unexpected)),
        "fused_order": settle_options(source, OpenOptions()).fused_order,
        "notes": list_notes(source, config),
        "missing": report.missing,
        "unexpected": report.unexpected,
        "mismatched": report.mismatched,
    }


def _check_container(container: MindSporeContainer, *, deep: bool) -> dict[str, Any]:
    """Check as much of a MindSpore checkpoint as is possible without its config."""
    problems = container.list_problems()
    notes = ["shapes were not compared with a model's, because there is no config: give the MindFormers YAML with -c to do so"]
    evidence = container.examine_order()
    if evidence is not None:
        found = f"in MindFormers {evidence.order}'s row order" if evidence.order else "in an unknown row order: see --fused-order"
        notes.append(f"the fused weights are {found} ({evidence.describe()})")
    return {**_check_content(container, problems, deep=deep), "fused_order": evidence.order if evidence else None, "notes": notes}


def _check_content(source: CheckpointSource, problems: list[str], *, deep: bool) -> dict[str, Any]:
    files = check_files(source, ByteProgress("hashing files"))
    problems += [describe_damage(file) for file in files if not file.is_intact]
    threads = min(_MAX_THREADS, count_cores())
    tensors = check_tensors(source, threads, deep=deep, on_progress=ByteProgress("hashing tensors"))
    problems += list_not_numbers(tensors)
    return {
        "num_tensors": len(source.tensors),
        "tensor_bytes": sum(info.num_bytes for info in source.tensors.values()),
        "files": [{**asdict(file), "ok": file.is_intact} for file in files],
        "tensors": [{name: getattr(tensor, name) for name in tensor.__slots__} for tensor in tensors],
        "deep": deep,
        "problems": problems,
    }


def _check_tokenizer(path: Path | None, config: LlamaConfig, settings: Settings, problems: list[str]) -> list[str]:
    """Return warnings; appends to `problems` if the tokenizer is unusable, or has settings but no vocabulary."""
    signs = (name for name in TOKENIZER_FILES if name != "generation_config.json")
    if path is None or (path.is_dir() and not any(os.path.lexists(path / name) for name in signs)):
        return ["no tokenizer found: text needs one, so copy tokenizer.json or tokenizer.model into the folder"]
    try:
        read_tokenizer_of(path, config, settings)
        read_chat_templates(path)
    except InputError as error:
        problems.append(str(error))
    return []


def _print(result: dict[str, Any]) -> None:
    if "format" in result:
        print(f"{result['checkpoint']}: {FORMATS[result['format']].name}")
    if "files" in result:
        quantization = f", quantization {result['quantization']}" if "quantization" in result else ""
        print(f"{result['num_tensors']} tensors, {result['tensor_bytes'] / 1e6:.1f} MB{quantization}")
        for file in result["files"]:
            against = f"as {file['recorded_in']} says" if file["recorded_in"] else "no checksum recorded"
            print(f"{file['sha256']}  {file['name']}  {file['size_bytes']} bytes, {against if file['ok'] else 'DAMAGED'}")
    if result.get("fused_order"):
        print(f"fused weights are read in the row order of MindFormers {result['fused_order']}")
    for note in result.get("notes", ()):
        print(f"note: {note}")
    if result.get("dropped"):
        names = result["dropped"]
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        print(f"note: {len(names)} stored tensors are not used: {', '.join(map(quote_name, names[:_SHOWN]))}{more}")
    for problem in result["problems"]:
        print(f"problem: {problem}")
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    print("not ok" if not result["ok"] else "ok" if not result["warnings"] else "weights ok, with warnings")
