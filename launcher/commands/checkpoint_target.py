"""The checkpoint path that a command writes: validated, locked, and reported when done."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launcher.host.file_errors import describe_os_error
from launcher.host.output_paths import try_folder, try_name
from launcher.host.path_lock import PathInUseError, hold
from model.checkpoint.folder_writing import check_target
from parallel.errors import ConfigError


@contextmanager
def claim_target(option: str, target: Path, *, overwrite: bool, is_file: bool = False) -> Iterator[None]:
    """Validate and lock the target folder, or file (`is_file`), while it is written.

    Raises CheckpointError if the target may not be replaced, ConfigError if it is not writable or another command is writing it.
    """
    with ExitStack() as stack:
        try:
            check_target(target, overwrite=overwrite, is_file=is_file)
            place = Path(os.path.realpath(target))
            try_folder(place.parent)
            try_name(place.with_name(f".{place.name}.partial-{os.getpid()}"))  # the longest name derived from the target
            stack.enter_context(hold(target))
        except PathInUseError as holder:
            raise ConfigError(f"{option} {target} is being written by {holder}; choose another path") from None
        except OSError as error:
            raise ConfigError(f"{option} cannot be written: {describe_os_error(error, target)}") from None
        yield


def tell_written(target: Path, started: float) -> None:
    """Print the size of the written folder or file, and the time taken."""
    files = [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
    size, seconds = sum(file.stat().st_size for file in files), time.perf_counter() - started
    print(f"wrote {target}: {size / 1e6:.1f} MB in {seconds:.1f} s ({size / 1e9 / max(seconds, 1e-9):.2f} GB/s)", file=sys.stderr)
