"""The verdict on a failed run: which rank failed first, why, what the others were waiting in, and where its log is."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.host.atomic_write import atomic_write
from launcher.host.control_groups import MemoryGroup
from parallel.errors import TandemError

if TYPE_CHECKING:  # a program that catches RanksFailedError need not load PyTorch
    from launcher.supervision.rank_watch import FirstFailure

VERDICT_FILE = "verdict.json"
_TAIL_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why a run failed."""

    first_failed_rank: int | None
    """None if no rank failed: the ranks never met, or the process that starts them ended."""
    host: str
    pid: int | None = None
    exit_code: int | None = None
    """None if it was terminated by a signal, or has not exited."""
    signal: str | None = None
    """Name of the signal that terminated or stopped it, such as SIGKILL."""
    exception: str | None = None
    """Type and message of its exception, otherwise what was observed from outside."""
    traceback_tail: str | None = None
    """Last lines of its traceback, or of its stack if it was stuck or crashed."""
    others_waiting_in: dict[int, str] = field(default_factory=dict)
    """The operation each other rank was in when the first failed."""
    log_file: str | None = None
    restarts_used: int = 0

    def describe(self) -> str:
        """Format the verdict in three lines for the terminal."""
        ended = f"ended by {self.signal}" if self.signal else f"ended with exit code {self.exit_code}"
        cause = self.exception or ended
        if self.exception and self.signal and self.signal not in self.exception:
            cause = f"{ended}: {self.exception}"
        who = "the run failed" if self.first_failed_rank is None else f"rank {self.first_failed_rank} failed first"
        where = f"pid {self.pid} on {self.host}" if self.pid is not None else f"on {self.host}"
        others = "; ".join(f"rank {rank} was in {name}" for rank, name in self.others_waiting_in.items())
        return "\n".join(
            (
                f"{who} ({where}): {cause}",
                f"others: {others or 'no other ranks known'}",
                f"restarts used: {self.restarts_used}; log: {self.log_file or 'none here'}",
            )
        )

    def to_json(self) -> str:
        """Serialize for `from_json` and for the file."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Verdict":
        """Inverse of `to_json`."""
        raw = json.loads(text)
        return cls(**{**raw, "others_waiting_in": {int(rank): words for rank, words in raw["others_waiting_in"].items()}})

    def write(self, log_dir: Path) -> None:
        """Write verdict.json to the log folder."""
        atomic_write(log_dir / VERDICT_FILE, self.to_json() + "\n")

    def claim(self, log_dir: Path) -> bool:
        """Write verdict.json unless another process of this run already has; returns whether this one was first."""
        temporary = log_dir / f".{VERDICT_FILE}.{self.host}.{os.getpid()}"
        atomic_write(temporary, self.to_json() + "\n")
        try:
            os.link(temporary, log_dir / VERDICT_FILE)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True


class RanksFailedError(TandemError):
    """The ranks failed and no restarts are left."""

    def __init__(self, verdict: Verdict, *, is_input: bool = False) -> None:
        super().__init__(verdict.describe())
        self.verdict = verdict
        self.exit_code = 2 if is_input else 1
        """2 if a rank found the checkpoint or a setting to be unusable."""


def shorten_stack(stack: str | None) -> str | None:
    """Return the innermost lines of the current thread's stack from faulthandler's output, which may list other threads around it."""
    lines = (stack or "").splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("Current thread")), 0)
    return "\n".join(lines[first : first + _TAIL_LINES]) or None


def judge_failure(
    failure: "FirstFailure", *, first_rank: int, host: str, log_dir: Path, restarts: int, before: MemoryGroup, now: MemoryGroup
) -> Verdict:
    """Build the verdict on the first failure of a host whose ranks start at `first_rank`.

    `before` and `now` are the control group at the start of the run and after the failure.
    """
    account, rank = failure.account, None if failure.local_rank is None else first_rank + failure.local_rank
    exception = failure.stuck or (account.exception if account else None)
    if rank is None:
        exception = "the process that starts the ranks ended, and all ranks with it"
    if failure.signal == "SIGKILL" and now.num_kills > before.num_kills:
        limit = f"its limit is {now.limit_bytes / 1e9:.1f} GB" if now.limit_bytes else "the machine's memory was used up"
        exception = f"out of memory: the kernel killed it ({limit}); tandem plan shows the memory of each rank"
    trace = account.traceback_tail if account else shorten_stack(failure.stack)
    return Verdict(
        first_failed_rank=rank,
        host=host,
        pid=failure.pid,
        exit_code=failure.exit_code,
        signal=failure.signal,
        exception=exception,
        traceback_tail=trace,
        others_waiting_in={first_rank + other: words for other, words in sorted(failure.waiting.items())},
        log_file=None if rank is None else str(log_dir / f"worker_{rank}.log"),
        restarts_used=restarts,
    )
