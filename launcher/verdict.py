"""One verdict on a run that failed: which rank first, why, what the others waited in, where its log is.

Knows what the elastic agent and the ranks left behind; starts and ends nothing.
"""

import json
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launcher.rank_process import waiting_file
from launcher.whole_file import write_whole

VERDICT_FILE = "verdict.json"
_TAIL_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why a run failed."""

    first_failed_rank: int
    host: str
    pid: int
    exit_code: int | None
    """None when a signal ended it."""
    signal: str | None
    """SIGKILL and so on, when a signal ended it."""
    exception: str | None
    """Type and message, when it raised one."""
    traceback_tail: str | None
    """The last lines of its traceback."""
    others_waiting_in: dict[int, str]
    """The operation that each other rank was in when it noticed or was ended."""
    log_file: str
    restarts_used: int

    def describe(self) -> str:
        """Three lines for people."""
        cause = self.exception or (f"ended by {self.signal}" if self.signal else f"ended with exit code {self.exit_code}")
        others = (
            "; ".join(f"rank {rank} was in {name}" for rank, name in self.others_waiting_in.items()) or "nothing known of the other ranks"
        )
        return "\n".join(
            (
                f"rank {self.first_failed_rank} failed first (pid {self.pid} on {self.host}): {cause}",
                f"others: {others}",
                f"restarts used: {self.restarts_used}; log of the rank: {self.log_file}",
            )
        )

    def write(self, log_dir: Path) -> None:
        """Leave verdict.json in the log folder."""
        write_whole(log_dir / VERDICT_FILE, json.dumps(asdict(self), indent=2) + "\n")


def build_verdict(failures: Mapping[int, ProcessFailure], world_size: int, folder: Path, log_dir: Path, restarts: int) -> Verdict:
    """The verdict on `failures` by rank. A rank that only noticed another's end is not the first."""
    waiting = {}
    for rank in range(world_size):
        with suppress(FileNotFoundError):
            waiting[rank] = (folder / waiting_file(restarts, rank)).read_text(encoding="utf-8")
    culprits = {rank: failure for rank, failure in failures.items() if rank not in waiting} or dict(failures)
    rank, failure = min(culprits.items(), key=lambda item: item[1].timestamp)
    exception, trace = _read_exception(failure)
    return Verdict(
        first_failed_rank=rank,
        host=socket.gethostname(),
        pid=failure.pid,
        exit_code=failure.exitcode if failure.exitcode >= 0 else None,
        signal=signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else None,
        exception=exception,
        traceback_tail=trace,
        others_waiting_in={other: words for other, words in waiting.items() if other != rank},
        log_file=str(log_dir / f"worker_{rank}.log"),
        restarts_used=restarts,
    )


def _read_exception(failure: ProcessFailure) -> tuple[str | None, str | None]:
    message = (failure.error_file_data or {}).get("message")
    if not isinstance(message, dict):
        return None, None
    trace = str(message.get("extraInfo", {}).get("py_callstack", ""))
    return str(message.get("message")), "\n".join(trace.rstrip().splitlines()[-_TAIL_LINES:]) or None
