"""`tandem convert` and `reshard`: check, show progress, say what was written.

Knows options and settings; the rewriting itself is the model package's.
"""

import sys
import time
from pathlib import Path

from launcher.console import WorkProgress
from launcher.running import open_model
from launcher.settings import default_settings, read_settings
from model.checkpoint.folder_writing import check_target
from model.checkpoint.rank_files import write_rank_files
from model.checkpoint.rewriting import convert_checkpoint
from model.config import DTYPES
from parallel.errors import ConfigError


def convert(source: Path, target: Path, to: str, dtype: str | None, config: Path | None, *, overwrite: bool) -> None:
    """Write a Hugging Face folder. Raises InputError before anything is written."""
    if to != "hf":
        raise ConfigError(f"--to is {to!r}, but only 'hf' can be written")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}, but has to be one of {', '.join(DTYPES)}")
    opened = open_model(source, read_settings(config) if config else default_settings(), quantized=False)
    check_target(target, overwrite=overwrite)
    started = time.perf_counter()
    convert_checkpoint(opened.source, target, dtype, WorkProgress("converting, tensors"))
    tell_written(target, started)


def reshard(source: Path, target: Path, workers: int, config: Path | None, *, overwrite: bool) -> None:
    """Write rank files. Raises InputError before anything is written."""
    opened = open_model(source, read_settings(config) if config else default_settings(), quantized=False)
    opened.config.layout().check(workers)
    check_target(target, overwrite=overwrite)
    started = time.perf_counter()
    write_rank_files(opened.source, opened.config, opened.scheme, workers, target, WorkProgress("writing rank files, bytes"))
    tell_written(target, started)


def tell_written(target: Path, started: float) -> None:
    """Say what a folder takes and how long it took."""
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"wrote {target}: {size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s", file=sys.stderr)
