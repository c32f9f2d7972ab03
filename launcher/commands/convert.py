"""`tandem convert` and `tandem reshard`.

Depends on options and settings; the conversion itself is in the model package.
"""

import sys
import time
from pathlib import Path

from launcher.commands.checkpoint_target import claim_target
from launcher.commands.run_ranks import open_model
from launcher.host.file_errors import as_run_failure
from launcher.reporting.console import ByteProgress
from launcher.settings.checkpoint_options import ConvertOptions, ReshardOptions
from launcher.settings.yaml_settings import open_settings
from model.export.conversion import convert_checkpoint
from model.export.mindspore import SUFFIX, write_mindspore
from model.export.rank_files import write_rank_files


def convert(options: ConvertOptions) -> None:
    """Write a Hugging Face folder, or a MindSpore file or folder. Raises InputError before anything is written."""
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


def tell_written(target: Path, started: float) -> None:
    """Print the size of the written folder or file, and the time taken."""
    files = [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
    size, seconds = sum(file.stat().st_size for file in files), time.perf_counter() - started
    print(f"wrote {target}: {size / 1e6:.1f} MB in {seconds:.1f} s ({size / 1e9 / max(seconds, 1e-9):.2f} GB/s)", file=sys.stderr)
