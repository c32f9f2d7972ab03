"""Entry of a rank started by tandem's own parent, whether in a new interpreter or forked from the preloaded process.

Ties the process to its parent before the import of PyTorch, which takes seconds; the rank is in `launcher/supervision/spawned_rank.py`.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.environment.detection import set_variables
from launcher.host.loopback import LOOPBACK

BOARD_FILE, SOCKET_FILE = "board", "events.sock"
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_OOM_SCORE = 500
"""Added to the OOM score, in thousandths of memory, so that the OOM killer kills a rank and the parent survives to report it."""
_MAX_OOM_SCORE = 1000
_HOME = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOrder:
    """The data that a rank needs to start."""

    folder: str
    """The folder of the run."""
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    attempt: int
    master_addr: str | None = None
    """Address of the first node's store; None if all ranks are on this host and meet through the folder."""
    master_port: int | None = None
    """Port of that store."""
    program_port: int | None = None
    """Free port of this host, for the process group that a user's program may open; tandem does not listen on it."""
    cores: Sequence[int] | None = None
    """The cores that the rank is bound to; None: as the job says."""

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment variables of the rank, by torchrun's names."""
        found = {
            "RANK": self.rank,
            "LOCAL_RANK": self.local_rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "TORCHELASTIC_RESTART_COUNT": self.attempt,
            "MASTER_ADDR": self.master_addr if self.program_port is None else LOOPBACK,
            "MASTER_PORT": self.master_port if self.program_port is None else self.program_port,
        }
        return {name: str(value) for name, value in found.items() if value is not None}

    def to_json(self) -> str:
        """Serialize for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankOrder":
        """Inverse of `to_json`."""
        return cls(**json.loads(text))


def start_code(module: str) -> str:
    """Return the program of a new interpreter that runs `main` of a module of this package.

    Unlike `python -m`, excludes the current directory, where a model.py would shadow our package.
    """
    paths = f"[{_HOME!r}] * ({_HOME!r} not in sys.path) + [one for one in sys.path if one]"
    return f"import sys; sys.path = {paths}; from launcher.supervision.{module} import main; main()"


def job_file(folder: Path, attempt: int) -> Path:
    """Path of an attempt's job."""
    return folder / f"job_{attempt}.json"


def store_file(folder: Path, attempt: int) -> Path:
    """Path of the store through which the ranks of one host meet."""
    return folder / f"store_{attempt}"


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent exits; exit now if it already has."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def prefer_for_oom_killer(path: Path = Path("/proc/self/oom_score_adj")) -> None:
    """Make the OOM killer prefer this process over its parent. Raising the score needs no privilege."""
    with suppress(OSError, ValueError):  # sandboxes may lack /proc or forbid the write
        path.write_text(str(min(int(path.read_text()) + _OOM_SCORE, _MAX_OOM_SCORE)))


def name_process(name: str) -> None:
    """Set the name that ps, top and the OOM killer show, of up to 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def run_order(order: RankOrder) -> None:
    """Run the rank of `order` in this process, which ends with its parent. Returns when the rank has ended well."""
    prefer_for_oom_killer()
    name_process(f"tandem rank {order.rank}")
    set_variables(order.variables)
    from launcher.supervision.spawned_rank import run_spawned_rank

    run_spawned_rank(order)


def main() -> None:
    """Run a rank in a new interpreter, with two arguments: ORDER PARENT_PID."""
    end_with_parent(int(sys.argv[2]))
    run_order(RankOrder.from_json(sys.argv[1]))
