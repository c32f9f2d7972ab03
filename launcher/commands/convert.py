"""`tandem convert` and `reshard`: check, show progress, say what was written.

Knows options and settings; the rewriting itself is the model package's.
"""

import sys
import time
from pathlib import Path

from launcher.commands.run_ranks import OpenedModel, open_model
from launcher.reporting.console import ByteProgress
from launcher.settings.options import CheckpointOptions
from launcher.settings.yaml_settings import open_settings
from model.checkpoint.folder_writing import check_target
from model.checkpoint.rank_files import write_rank_files
from model.export.conversion import convert_checkpoint
from model.export.mindspore import write_mindspore
from model.spec.config import DTYPES
from parallel.errors import ConfigError

TARGETS = ("hf", "mindspore")


def convert(options: CheckpointOptions, target: Path, to: str, dtype: str | None, *, overwrite: bool) -> None:
    """Write a Hugging Face folder, or a MindSpore file or folder. Raises InputError before anything is written."""
    if to not in TARGETS:
        raise ConfigError(f"--to is {to!r}, but has to be one of {', '.join(TARGETS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}, but has to be one of {', '.join(DTYPES)}")
    opened = _open(options, target, overwrite=overwrite)
    started, progress = time.perf_counter(), ByteProgress("converting")
    if to == "hf":
        convert_checkpoint(opened.source, target, dtype, progress)
    else:
        write_mindspore(opened.source, opened.config, opened.scheme, target, dtype, progress)
    tell_written(target, started)


def reshard(options: CheckpointOptions, target: Path, workers: int, *, overwrite: bool) -> None:
    """Write rank files. Raises InputError before anything is written."""
    opened = _open(options, target, overwrite=overwrite)
    opened.config.layout().check(workers)
    started = time.perf_counter()
    write_rank_files(opened.source, opened.config, opened.scheme, workers, target, ByteProgress("writing rank files"))
    tell_written(target, started)


def _open(options: CheckpointOptions, target: Path, *, overwrite: bool) -> OpenedModel:
    # What is damaged would be written again as if it were whole, with new checksums.
    opened = open_model(options, open_settings(options.config), quantized=False)
    check_target(target, overwrite=overwrite)
    return opened


def tell_written(target: Path, started: float) -> None:
    """Say what a folder or file takes and how long it took."""
    files = target.iterdir() if target.is_dir() else [target]
    size, seconds = sum(file.stat().st_size for file in files), time.perf_counter() - started
    print(f"wrote {target}: {size / 1e6:.1f} MB in {seconds:.1f} s ({size / 1e9 / max(seconds, 1e-9):.2f} GB/s)", file=sys.stderr)
