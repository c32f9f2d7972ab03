"""Who failed first, or holds up the others, and that the rest is ended: the ranks are small real processes, the board is real too."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.host.control_groups import MemoryGroup
from launcher.supervision.rank_failure import RankFailure, read_failure
from launcher.supervision.rank_starter import RankEnd, RankHandle
from launcher.supervision.rank_watch import STACK_SIGNAL, FirstFailure, RankWatch, error_file, stack_file
from launcher.supervision.verdict import Verdict, judge_failure, shorten_stack
from parallel.errors import PeerError, RequestError
from parallel.progress import OPERATIONS, Progress, ProgressBoard

SLEEP = "import time; time.sleep(60)"


@dataclass
class Watched:
    """Processes that are watched as ranks."""

    watch: RankWatch
    board: ProgressBoard
    processes: list["subprocess.Popen[bytes]"]

    def look(self) -> FirstFailure | None:
        """Tell the watch which processes have ended since the last look, and look."""
        ends = []
        for handle in self.watch.living.values():
            process = next(process for process in self.processes if process.pid == handle.pid)
            if (code := process.poll()) is not None:
                ends.append(RankEnd(pid=handle.pid, exit_code=code if code >= 0 else None, signal=-code if code < 0 else None))
        return self.watch.look(ends)

    def wait_for_failure(self, seconds: float = 20) -> FirstFailure:
        """Look until something has failed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (failure := self.look()) is not None:
                return failure
            time.sleep(0.01)
        raise AssertionError("nothing was seen")


Start = Callable[..., Watched]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts one process for each program and watches them."""
    started: list[Watched] = []

    def run(*programs: str, timeout_seconds: float = 60) -> Watched:
        board = ProgressBoard(tmp_path / "board", len(programs), create=True)
        for index in range(len(programs)):
            Progress(board.line(index)).set_operation("computing")
        watch = RankWatch(board, tmp_path, timeout_seconds)
        processes = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
        watch.follow({index: RankHandle(process.pid, os.pidfd_open(process.pid)) for index, process in enumerate(processes)})
        started.append(Watched(watch, board, processes))
        return started[-1]

    yield run
    for watched in started:
        watched.watch.close()
        for process in watched.processes:
            process.kill()
            process.wait()


def test_a_killed_rank_is_the_first_and_the_others_can_be_ended(start: Start) -> None:
    ranks = start(SLEEP, SLEEP, SLEEP)
    Progress(ranks.board.line(2)).enter("gather_columns")
    ranks.processes[1].kill()
    failure = ranks.wait_for_failure()
    assert (failure.local_rank, failure.pid, failure.signal, failure.exit_code) == (1, ranks.processes[1].pid, "SIGKILL", None)
    assert failure.waiting == {0: "computing", 2: "gather_columns"} and not failure.is_echo and failure.stuck is None
    assert sorted(ranks.watch.living) == [0, 2]
    ranks.watch.end([2])
    assert ranks.processes[2].wait(5) == -signal.SIGKILL and ranks.processes[0].poll() is None
    ranks.watch.end()
    assert [process.wait(5) for process in ranks.processes] == [-signal.SIGKILL] * 3
    assert ranks.look() is failure and not ranks.watch.living, "the first stays the first"


def test_an_exit_code_is_told(start: Start) -> None:
    failure = start(SLEEP, "import os; os._exit(3)").wait_for_failure()
    assert (failure.local_rank, failure.exit_code, failure.signal) == (1, 3, None)


def test_ranks_that_end_well_are_no_failure(start: Start) -> None:
    ranks = start("pass", "pass")
    for process in ranks.processes:
        assert process.wait(10) == 0
    assert ranks.look() is None and not ranks.watch.living


def test_a_rank_that_exits_with_0_while_another_needs_it_is_a_failure(start: Start) -> None:
    ranks = start(SLEEP, "pass")
    Progress(ranks.board.line(1)).enter("gather_columns")
    assert ranks.processes[1].wait(10) == 0
    assert ranks.look() is None, "it may have done all that it had to"
    Progress(ranks.board.line(0)).note_rejoining()
    failure = ranks.wait_for_failure()
    assert (failure.local_rank, failure.exit_code, failure.describe()) == (1, 0, "ended with exit code 0")


def test_ranks_that_were_told_to_end_are_no_failure(start: Start) -> None:
    ranks = start(SLEEP, SLEEP)
    ranks.watch.end()
    assert [process.wait(5) for process in ranks.processes] == [-signal.SIGKILL] * 2
    assert ranks.look() is None and not ranks.watch.living


def test_a_rank_that_only_lost_its_peer_is_not_the_first(start: Start, tmp_path: Path) -> None:
    ranks = start("import os; os._exit(1)", "import os; os._exit(7)")
    lost = PeerError("rank 1 died while rank 0 waited for it in barrier", "barrier")
    RankFailure.of(lost).write(error_file(tmp_path, ranks.processes[0].pid))
    for process in ranks.processes:  # both have ended before the watch looks
        process.wait(10)
    failure = ranks.look()
    assert failure is not None and (failure.local_rank, failure.exit_code) == (1, 7)


def test_an_attempt_is_judged_by_itself_and_a_rank_that_goes_on_is_watched_again(start: Start) -> None:
    ranks = start(SLEEP, SLEEP)
    ranks.processes[1].kill()
    assert ranks.wait_for_failure().local_rank == 1
    ranks.processes.append(subprocess.Popen([sys.executable, "-c", SLEEP]))
    again = RankHandle(ranks.processes[2].pid, os.pidfd_open(ranks.processes[2].pid))
    ranks.watch.follow({0: ranks.watch.living[0], 1: again})
    assert ranks.look() is None and ranks.watch.failure is None
    ranks.processes[0].kill()
    assert ranks.wait_for_failure().local_rank == 0


def test_the_end_of_the_process_that_starts_the_ranks_is_no_ranks_fault(start: Start) -> None:
    ranks = start(SLEEP, SLEEP)
    for process in ranks.processes:  # the kernel does it
        process.kill()
    ranks.watch.take_starter(RankEnd(pid=5, exit_code=None, signal=signal.SIGKILL), "")
    failure = ranks.look()
    assert failure is not None and (failure.local_rank, failure.pid, failure.signal) == (None, 5, "SIGKILL")
    assert not ranks.watch.living
    verdict = judge(failure)
    assert (verdict.first_failed_rank, verdict.log_file) == (None, None)
    words = "the run failed (pid 5 on h): ended by SIGKILL: the process that starts the ranks ended, and all ranks with it"
    assert verdict.describe().splitlines()[0] == words


def test_a_rank_that_computes_for_ever_is_named_with_its_stack(start: Start, tmp_path: Path) -> None:
    program = (
        f"import faulthandler, os\nfaulthandler.register({int(STACK_SIGNAL)}, open(f'{tmp_path}/stack_{{os.getpid()}}.txt', 'w'))\n"
        "def spin_for_ever():\n    while True: pass\nspin_for_ever()"
    )
    ranks = start(SLEEP, program, timeout_seconds=1.5)
    assert stack_file(tmp_path, ranks.processes[1].pid).name == f"stack_{ranks.processes[1].pid}.txt"
    Progress(ranks.board.line(0)).enter("gather_columns")
    failure = ranks.wait_for_failure()
    assert failure.local_rank == 1 and failure.signal is None and failure.waiting == {0: "gather_columns"}
    assert failure.stuck is not None and "in computing" in failure.stuck and "--timeout than 1.5 s" in failure.stuck
    assert failure.stack is not None and "in spin_for_ever" in (shorten_stack(failure.stack) or "")


def test_a_stopped_rank_is_named_though_it_waits(start: Start) -> None:
    ranks = start(SLEEP, SLEEP, timeout_seconds=0.5)
    for index in range(2):
        Progress(ranks.board.line(index)).enter("gather_columns")
    ranks.processes[0].send_signal(signal.SIGSTOP)
    failure = ranks.wait_for_failure()
    assert (failure.local_rank, failure.signal) == (0, "SIGSTOP") and failure.stuck is not None and "stopped" in failure.stuck


def test_of_ranks_that_wait_the_one_behind_holds_up_the_rest(start: Start) -> None:
    ranks = start(SLEEP, SLEEP, timeout_seconds=0.5)
    ahead, behind = Progress(ranks.board.line(0)), Progress(ranks.board.line(1))
    for _ in range(3):
        ahead.enter("gather_columns")
    behind.enter("gather_columns")
    assert ranks.wait_for_failure().local_rank == 1


def test_a_rank_that_gets_on_slowly_is_left_alone(start: Start) -> None:
    ranks = start(SLEEP, SLEEP, timeout_seconds=0.6)
    waiting, slow = Progress(ranks.board.line(0)), Progress(ranks.board.line(1))
    waiting.enter("barrier")
    slow.set_operation("loading")
    for _ in range(8):
        time.sleep(0.25)
        slow.beat()
        assert ranks.look() is None


def test_a_rank_that_still_starts_is_left_alone(start: Start) -> None:
    ranks = start(SLEEP, SLEEP, timeout_seconds=0.3)
    ranks.board.reset()
    assert ranks.board.read(0).operation == OPERATIONS[0] == "starting"
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert ranks.look() is None
        time.sleep(0.05)


def test_an_account_is_a_sentence_for_our_errors_and_names_the_type_of_others(tmp_path: Path) -> None:
    def account(error: Exception) -> RankFailure | None:
        try:
            raise error
        except Exception as raised:
            RankFailure.of(raised).write(tmp_path / "error.json")
        return read_failure(tmp_path / "error.json")

    own, other = account(RequestError("prompt 0 has no tokens")), account(KeyError("x"))
    assert own is not None and own.exception == "prompt 0 has no tokens" and not own.is_echo
    assert other is not None and other.exception == "KeyError: 'x'" and other.traceback_tail.endswith("KeyError: 'x'")
    assert read_failure(tmp_path / "missing") is None


def failure(**said: object) -> FirstFailure:
    nothing: dict[str, object] = {
        "local_rank": 1,
        "pid": 7,
        "exit_code": None,
        "signal": None,
        "account": None,
        "stuck": None,
        "stack": None,
    }
    return FirstFailure(**{**nothing, "waiting": {0: "barrier"}, "at_seconds": 0.0, **said})  # type: ignore[arg-type]


def judge(found: FirstFailure, kills: int = 0, limit: int | None = None) -> Verdict:
    now = MemoryGroup(limit, kills)
    return judge_failure(found, first_rank=4, host="h", log_dir=Path("/logs"), restarts=2, before=MemoryGroup(limit, 0), now=now)


def test_a_verdict_has_three_lines_and_numbers_ranks_of_the_whole_run() -> None:
    verdict = judge(failure(signal="SIGKILL"))
    assert verdict.describe().splitlines() == [
        "rank 5 failed first (pid 7 on h): ended by SIGKILL",
        "others: rank 4 was in barrier",
        "restarts used: 2; log: /logs/worker_5.log",
    ]
    assert Verdict.from_json(verdict.to_json()) == verdict


def test_a_rank_that_the_kernel_ended_for_memory_is_told_from_one_that_was_killed() -> None:
    assert judge(failure(signal="SIGKILL")).exception is None
    said = judge(failure(signal="SIGKILL"), kills=1, limit=2_000_000_000).exception
    assert said is not None and said.startswith("out of memory: the kernel killed it (its limit is 2.0 GB)")
    assert judge(failure(exit_code=1), kills=1).exception is None


def test_only_the_first_process_claims_the_verdict(tmp_path: Path) -> None:
    first, second = judge(failure(exit_code=1)), judge(failure(signal="SIGKILL"))
    assert first.claim(tmp_path) and not second.claim(tmp_path)
    assert Verdict.from_json((tmp_path / "verdict.json").read_text()) == first
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]
    assert json.loads((tmp_path / "verdict.json").read_text())["others_waiting_in"] == {"4": "barrier"}
