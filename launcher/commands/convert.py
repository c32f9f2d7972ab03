"""`tandem convert` and `tandem reshard`.

Depends on options and settings; the conversion itself is in the model package.
"""

import sys
import time
from dataclasses import fields

from launcher.commands.checkpoint_target import claim_target, tell_written
from launcher.commands.opened_model import open_model
from launcher.commands.quantize import quantize
from launcher.host.file_errors import as_run_failure
from launcher.reporting.console import ByteProgress
from launcher.settings.checkpoint_options import ConvertOptions, QuantizeOptions, ReshardOptions
from launcher.settings.options import CheckpointOptions
from launcher.settings.yaml_settings import open_settings
from model.export.conversion import convert_checkpoint
from model.export.mindspore import SUFFIX, write_mindspore
from model.export.rank_files import write_rank_files
from parallel.errors import ConfigError


def convert(options: ConvertOptions) -> None:
    """Write a Hugging Face folder, quantized on request, or a MindSpore file or folder. Raises InputError before anything is written."""
    if options.quantize is not None:
        _convert_quantized(options, options.quantize)
        return
    target, is_file = options.target, options.to == "mindspore" and options.target.suffix == SUFFIX
    with claim_target("DST", target, overwrite=options.overwrite, is_file=is_file):
        opened = open_model(options, open_settings(options.config, options.checkpoint), quantized=False)
        started, progress = time.perf_counter(), ByteProgress("converting")
        with as_run_failure(target):
            if options.to == "hf":
                convert_checkpoint(opened.source, target, options.dtype, progress)
            else:
                write_mindspore(opened.source, opened.config, opened.scheme, target, options.dtype, progress)
                print("note: linears are written separately (qkv_concat: False), so no fused row order applies", file=sys.stderr)
            tell_written(target, started)


def _convert_quantized(options: ConvertOptions, approach: str) -> None:
    if options.to != "hf":
        raise ConfigError("--quantize writes a Hugging Face folder: drop --to mindspore, or convert the quantized folder afterwards")
    shared = {field.name: getattr(options, field.name) for field in fields(CheckpointOptions)}
    asked = QuantizeOptions(**shared, approach=approach, workers=1, output=options.target, overwrite=options.overwrite)
    quantize(asked, float_dtype=options.dtype)


def reshard(options: ReshardOptions) -> None:
    """Write rank files. Raises InputError before anything is written."""
    target, workers = options.target, options.workers
    with claim_target("DST", target, overwrite=options.overwrite):
        opened = open_model(options, open_settings(options.config, options.checkpoint), quantized=False)
        opened.config.layout().check(workers)
        started = time.perf_counter()
        with as_run_failure(target):
            write_rank_files(opened.source, opened.config, opened.scheme, workers, target, ByteProgress("writing rank files"))
            tell_written(target, started)
