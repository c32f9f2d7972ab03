"""Who failed first, or holds up the others, and that the rest is ended: the ranks are small real processes, the board is real too."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.host.control_groups import MemoryGroup
from launcher.supervision.rank_failure import RankFailure, read_failure
from launcher.supervision.rank_watch import STACK_SIGNAL, FirstFailure, RankWatch, error_file, stack_file
from launcher.supervision.verdict import Verdict, judge_failure, shorten_stack
from parallel.errors import PeerError, RequestError
from parallel.progress import OPERATIONS, Progress, ProgressBoard

SLEEP = "import time; time.sleep(60)"
Start = Callable[..., tuple[RankWatch, ProgressBoard, list["subprocess.Popen[bytes]"]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts one process for each program and watches them."""
    watches: list[RankWatch] = []
    processes: list[subprocess.Popen[bytes]] = []

    def run(*programs: str, timeout_seconds: float = 60) -> tuple[RankWatch, ProgressBoard, list["subprocess.Popen[bytes]"]]:
        board = ProgressBoard(tmp_path / "board", len(programs), create=True)
        for index in range(len(programs)):
            Progress(board.line(index)).set_operation("computing")
        watch = RankWatch(board, tmp_path, timeout_seconds)
        processes.extend(subprocess.Popen([sys.executable, "-c", program]) for program in programs)
        watch.start()
        watch.follow(0, {index: process.pid for index, process in enumerate(processes)})
        watches.append(watch)
        return watch, board, processes

    yield run
    for watch in watches:
        watch.close()
    for process in processes:
        process.kill()
        process.wait()


def wait_for_failure(watch: RankWatch, seconds: float = 20) -> FirstFailure:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if watch.failure is not None:
            return watch.failure
        time.sleep(0.01)
    raise AssertionError("nothing was seen")


def test_a_killed_rank_is_the_first_and_the_others_are_ended(start: Start) -> None:
    watch, board, processes = start(SLEEP, SLEEP, SLEEP)
    Progress(board.line(2)).enter("gather_columns")
    processes[1].kill()
    failure = wait_for_failure(watch)
    assert (failure.local_rank, failure.pid, failure.signal, failure.exit_code) == (1, processes[1].pid, "SIGKILL", None)
    assert failure.waiting == {0: "computing", 2: "gather_columns"} and not failure.is_echo and failure.stuck is None
    assert [process.wait(5) for process in processes] == [-signal.SIGKILL] * 3


def test_an_exit_code_is_told(start: Start) -> None:
    watch, _, processes = start(SLEEP, "import os; os._exit(3)")
    failure = wait_for_failure(watch)
    assert (failure.local_rank, failure.exit_code, failure.signal) == (1, 3, None)
    assert processes[0].wait(5) == -signal.SIGKILL


def test_ranks_that_end_well_are_no_failure(start: Start) -> None:
    watch, _, processes = start("pass", "pass")
    for process in processes:
        assert process.wait(10) == 0
    assert watch.look_again() is None


def test_a_rank_whose_end_the_agent_has_read_is_the_first_though_the_others_were_ended_since(tmp_path: Path) -> None:
    watch = RankWatch(ProgressBoard(tmp_path / "board", 2, create=True), tmp_path, 60)
    processes = [subprocess.Popen([sys.executable, "-c", program]) for program in (SLEEP, "import os; os._exit(7)")]
    watch.follow(0, {rank: process.pid for rank, process in enumerate(processes)})
    assert processes[1].wait(10) == 7
    processes[0].terminate()
    os.waitid(os.P_PID, processes[0].pid, os.WEXITED | os.WNOWAIT)
    failure = watch.look_again()
    assert failure is not None and (failure.local_rank, failure.exit_code, failure.signal) == (1, None, None)
    assert failure.with_exit_code(7).exit_code == 7 and failure.with_exit_code(-9).signal == "SIGKILL"
    watch.close()
    assert processes[0].wait() == -signal.SIGTERM


def test_ranks_that_were_told_to_end_are_no_failure(start: Start) -> None:
    watch, _, processes = start(SLEEP, SLEEP)
    watch.end_all()
    assert [process.wait(5) for process in processes] == [-signal.SIGKILL] * 2
    assert watch.look_again() is None


def test_a_rank_that_only_lost_its_peer_is_not_the_first(start: Start, tmp_path: Path) -> None:
    RankFailure.of(PeerError("rank 1 died while rank 0 waited for it in barrier", "barrier")).write(error_file(tmp_path, 0, 0))
    # Both have ended before the watch looks.
    watch = RankWatch(ProgressBoard(tmp_path / "other", 2, create=True), tmp_path, 60)
    processes = [subprocess.Popen([sys.executable, "-c", f"import os; os._exit({code})"]) for code in (1, 7)]
    for process in processes:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    watch.follow(0, {0: processes[0].pid, 1: processes[1].pid})
    failure = watch.look_again()
    assert failure is not None and (failure.local_rank, failure.exit_code) == (1, 7)
    watch.close()
    assert [process.wait() for process in processes] == [1, 7]


def test_a_rank_that_computes_for_ever_is_named_with_its_stack(start: Start, tmp_path: Path) -> None:
    program = (
        f"import faulthandler\nfaulthandler.register({int(STACK_SIGNAL)}, open({str(stack_file(tmp_path, 0, 1))!r}, 'w'))\n"
        "def spin_for_ever():\n    while True: pass\nspin_for_ever()"
    )
    watch, board, _ = start(SLEEP, program, timeout_seconds=1.5)
    Progress(board.line(0)).enter("gather_columns")
    failure = wait_for_failure(watch)
    assert failure.local_rank == 1 and failure.signal is None and failure.waiting == {0: "gather_columns"}
    assert failure.stuck is not None and "in computing" in failure.stuck and "--timeout than 1.5 s" in failure.stuck
    assert failure.stack is not None and "in spin_for_ever" in (shorten_stack(failure.stack) or "")


def test_a_stopped_rank_is_named_though_it_waits(start: Start) -> None:
    watch, board, processes = start(SLEEP, SLEEP, timeout_seconds=0.5)
    for index in range(2):
        Progress(board.line(index)).enter("gather_columns")
    processes[0].send_signal(signal.SIGSTOP)
    failure = wait_for_failure(watch)
    assert (failure.local_rank, failure.signal) == (0, "SIGSTOP") and failure.stuck is not None and "stopped" in failure.stuck


def test_of_ranks_that_wait_the_one_behind_holds_up_the_rest(start: Start) -> None:
    watch, board, _ = start(SLEEP, SLEEP, timeout_seconds=0.5)
    ahead, behind = Progress(board.line(0)), Progress(board.line(1))
    for _ in range(3):
        ahead.enter("gather_columns")
    behind.enter("gather_columns")
    assert wait_for_failure(watch).local_rank == 1


def test_a_rank_that_gets_on_slowly_is_left_alone(start: Start) -> None:
    watch, board, _ = start(SLEEP, SLEEP, timeout_seconds=0.6)
    waiting, slow = Progress(board.line(0)), Progress(board.line(1))
    waiting.enter("barrier")
    slow.set_operation("loading")
    for _ in range(8):
        time.sleep(0.25)
        slow.beat()
    assert watch.failure is None


def test_a_rank_that_still_starts_is_left_alone(start: Start) -> None:
    watch, board, _ = start(SLEEP, SLEEP, timeout_seconds=0.3)
    board.reset()
    assert board.read(0).operation == OPERATIONS[0] == "starting"
    time.sleep(1)
    assert watch.failure is None


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
