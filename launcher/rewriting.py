"""`tandem quantize`, `convert` and `reshard`: check, show progress, say what was written.

Knows options and settings; the rewriting itself is the model package's.
"""

import sys
import time
from pathlib import Path

from launcher.console import WorkProgress
from launcher.predict import find_checkpoint, open_model
from launcher.settings import default_settings, read_settings
from model.checkpoint.folder_writing import check_target
from model.checkpoint.rank_files import write_rank_files
from model.checkpoint.rewriting import convert_checkpoint, quantize_rtn
from model.config import DTYPES
from parallel.errors import ConfigError

APPROACHES = ("rtn-a16w8",)
DEFAULT_NOT_CONVERTED = ("lm_head",)
"""Golden Stick's blacklist for rtn-a16w8."""


def quantize(config: Path | None, checkpoint: Path | None, approach: str, output: Path | None, *, overwrite: bool) -> None:
    """Write an int8 checkpoint. Raises InputError before anything is written."""
    if approach not in APPROACHES:
        raise ConfigError(f"the approach {approach!r} is unknown; there is {', '.join(APPROACHES)} (option -a)")
    settings = read_settings(config) if config else default_settings()
    target = output or Path("output") / f"{approach}_ckpt"
    # The YAML says what the result shall be; the source is float still.
    opened = open_model(find_checkpoint(checkpoint, settings), settings, quantized=False)
    check_target(target, overwrite=overwrite)
    words = settings.quantization.modules_to_not_convert if settings.quantization else DEFAULT_NOT_CONVERTED
    started = time.perf_counter()
    quantize_rtn(opened.source, opened.config, target, words, WorkProgress(f"quantizing ({approach}), tensors"))
    _tell(target, started)


def convert(source: Path, target: Path, to: str, dtype: str | None, *, overwrite: bool) -> None:
    """Write a Hugging Face folder. Raises InputError before anything is written."""
    if to != "hf":
        raise ConfigError(f"--to is {to!r}, but only 'hf' can be written")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}, but has to be one of {', '.join(DTYPES)}")
    opened = open_model(source, default_settings())
    check_target(target, overwrite=overwrite)
    started = time.perf_counter()
    convert_checkpoint(opened.source, target, dtype, WorkProgress("converting, tensors"))
    _tell(target, started)


def reshard(source: Path, target: Path, workers: int, *, overwrite: bool) -> None:
    """Write rank files. Raises InputError before anything is written."""
    opened = open_model(source, default_settings())
    opened.config.layout().check(workers)
    check_target(target, overwrite=overwrite)
    started = time.perf_counter()
    write_rank_files(opened.source, opened.config, opened.scheme, workers, target, WorkProgress("writing rank files, bytes"))
    _tell(target, started)


def _tell(target: Path, started: float) -> None:
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"wrote {target}: {size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s", file=sys.stderr)
