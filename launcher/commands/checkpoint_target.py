"""The place of a checkpoint that a command writes: checked before the work begins, and of one command at a time."""

import os
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
    """Check and hold the place of a folder, or a file (`is_file`), while it is written.

    Raises CheckpointError for what may not be replaced, ConfigError where nothing can be written, or another command writes.
    """
    with ExitStack() as stack:
        try:
            check_target(target, overwrite=overwrite, is_file=is_file)
            place = Path(os.path.realpath(target))
            try_folder(place.parent)
            try_name(place.with_name(f".{place.name}.partial-{os.getpid()}"))  # the longest that is derived from it
            stack.enter_context(hold(target))
        except PathInUseError as holder:
            raise ConfigError(f"{option} {target} is being written by {holder}; name another place") from None
        except OSError as error:
            raise ConfigError(f"{option} cannot be written: {describe_os_error(error, target)}") from None
        yield
