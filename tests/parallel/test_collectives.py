"""Ranks in real processes: what they gather is torch.cat of what they gave, and a wait for a lost peer ends.

One process imports torch and forks the ranks of every scenario from itself; the backs of one test run side by side.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed import HashStore

from model.kernels.library import find_kernels
from parallel.collectives import Collectives, IdentityCollectives
from parallel.node_collectives import number_nodes
from parallel.shared_memory import SharedMemoryCollectives

PROJECT_ROOT = Path(__file__).resolve().parents[2]
# Plain stores keep their order on x86-64 only.
HAS_SHARED_MEMORY = platform.machine() in ("x86_64", "AMD64")
NODES = ["nodes in turn", "nodes in a row", "nodes alone"] if HAS_SHARED_MEMORY else []
ATOMIC = ["shm, atomic words"] if find_kernels() is not None else []
BACKS = ["gloo", *(["shm", *NODES] if HAS_SHARED_MEMORY else []), *ATOMIC]

HOST = """
import json, os, signal, sys, time, traceback
from datetime import timedelta
import torch
from torch.distributed import FileStore, TCPStore
from parallel.collectives import GlooCollectives
from model.kernels.library import find_kernels
from parallel.errors import PeerError
from parallel.node_collectives import NodeCollectives
from parallel.shared_memory import SharedMemoryCollectives

def leave(work):  # without the second that Python takes to let go of torch
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def run(scenarios):
    children = []
    for scenario in scenarios:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(os.open(scenario["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 1)
            os.dup2(os.open(scenario["complaints"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
            leave(lambda: exec(scenario["script"], {**globals(), **scenario}))
        children.append(child)
    codes, deadline = [], time.monotonic() + 60
    for child in children:
        while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(child, signal.SIGKILL)  # those of its ranks that it did not wait for
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes

for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
"""

RANKS = """
death_out, death_in = os.pipe()

def say(*words):
    os.write(1, (json.dumps(words) + chr(10)).encode())

def connect(rank):
    store = FileStore(path, world_size)
    if back == "shm":
        return SharedMemoryCollectives(store, rank, world_size, timeout_seconds)
    if back == "shm, atomic words":  # as on ARM
        return SharedMemoryCollectives(store, rank, world_size, timeout_seconds, access=find_kernels().word_access)
    if back.startswith("nodes"):  # ranks of one host in the parts of several
        nodes = {"nodes in turn": [0, 1, 0, 1], "nodes in a row": [0, 0, 1, 1], "nodes alone": [0, 1, 2, 3]}[back][:world_size]
        return NodeCollectives(store, rank, nodes, timeout_seconds, address)
    return GlooCollectives(store, rank, world_size, timeout_seconds, address)

def gather_zeros(collectives):
    return collectives.gather_columns(torch.zeros((1, 2)), [2] * world_size)

def operate(collectives):
    gather_zeros(collectives) if operation == "gather_columns" else collectives.barrier()

def report_wait(rank, wait):
    started = time.monotonic()
    try:
        wait()
    except PeerError as error:
        say(rank, "PeerError", time.monotonic() - started, error.peer, error.died, str(error))
    else:
        say(rank, "no error", time.monotonic() - started, None, False, "")

def start_ranks(ranks=None):
    children = {}
    for rank in range(world_size) if ranks is None else ranks:
        children[rank] = os.fork()
        if children[rank] == 0:
            leave(lambda: run_rank(rank))  # its collectives are let go of first: what they hold must not keep a rank
    return children

def end(*children):
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "see above"
"""

GATHER = """
def make(of_rank, rows, size, dtype, seed):
    generator = torch.Generator().manual_seed(1000 * seed + of_rank)
    return torch.randint(0, 256, (rows * size * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(dtype).view(rows, size)

def run_rank(rank):
    collectives = connect(rank)
    sizes_of = {
        2: ([5, 5], [7, 1], [0, 3], [0, 0]),
        3: ([4, 4, 4], [9, 2, 5], [0, 2, 0], [5, 0, 4096]),
        4: ([4, 4, 4, 4], [9, 2, 5, 70], [0, 0, 3, 4], [3, 0, 4, 0]),
    }[world_size]
    cases = [(dtype, sizes, rows) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8) for sizes in sizes_of
             for rows in (1, 33)]
    cases.append((torch.float32, [4096] * world_size, 300))  # several rounds through a slot of 1 MiB
    cases.append((torch.float32, [100_000 + of_rank for of_rank in range(world_size)], 2))  # a row of all ranks' exceeds a slot
    for seed, (dtype, sizes, rows) in enumerate(cases):
        parts = [make(of_rank, rows, size, dtype, seed) for of_rank, size in enumerate(sizes)]
        found = collectives.gather_columns(parts[rank], sizes)
        whole = torch.cat(parts, dim=1)
        assert found.dtype == dtype and found.shape == whole.shape, (dtype, sizes, rows)
        assert torch.equal(found.reshape(-1).view(torch.uint8), whole.reshape(-1).view(torch.uint8)), (dtype, sizes, rows)
    for step in range(40):  # decode: the same small shape again and again, each rank late in turn
        if step % 20 == rank:
            time.sleep(0.002)
        parts = [torch.full((1, 2 + of_rank), float(step * world_size + of_rank)) for of_rank in range(world_size)]
        found = collectives.gather_columns(parts[rank], range(2, 2 + world_size))
        assert torch.equal(found, torch.cat(parts, dim=1)), step
    keep = collectives.gather_columns(torch.full((2, 3), float(rank)), [3] * world_size)
    for _ in range(4):
        collectives.gather_columns(torch.full((2, 3), -1.0), [3] * world_size)
    assert torch.equal(keep, torch.arange(world_size).repeat_interleave(3).repeat(2, 1).float()), "a result is a copy"
    collectives.barrier()
    say(rank, collectives.name, collectives.rank, collectives.world_size)
    collectives.close()

end(*start_ranks().values())
"""

LOSE = """
def run_rank(rank):
    collectives = connect(rank)
    gather_zeros(collectives)
    os.write(death_in, b"r")  # ready
    if rank == 1:
        time.sleep(60)
    if rank == 2:
        time.sleep(1)  # it finds one that was lost before
    report_wait(rank, lambda: operate(collectives))

children = start_ranks()
for _ in children:
    os.read(death_out, 1)
os.kill(children[1], loss)  # when killed, a zombie until the others are through
end(children[0], children[2])
"""

SLOW = """
def run_rank(rank):
    collectives = connect(rank)
    collectives.barrier()
    for _ in range(9 if rank == 1 else 0):
        time.sleep(0.3)
        collectives.beat()
    report_wait(rank, collectives.barrier)

end(*start_ranks().values())
"""

SILENT = """
def run_rank(rank):
    collectives = connect(rank)
    collectives.barrier()
    while rank == 1:  # at work, for as long as anybody looks
        time.sleep(0.3)
        collectives.beat()
    if rank == 2:
        time.sleep(60)
    report_wait(rank, collectives.barrier)

end(start_ranks()[0])
"""

ABSENT = """
def run_rank(rank):
    report_wait(rank, lambda: connect(rank))

end(*start_ranks(range(world_size - 1)).values())
"""

ENDED = """
def run_rank(rank):
    for peer in (0, 1):
        for is_zombie in (False, True):
            store = FileStore(f"{path}_{peer}_{is_zombie}", 2)
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitid(os.P_PID, pid, os.WEXITED | (os.WNOWAIT if is_zombie else 0))
            if peer == 0:
                store.set("shm", f"/proc/{pid}/fd/5")
            store.set(f"pid/{peer}", str(pid))
            report_wait(1 - peer, lambda: SharedMemoryCollectives(store, 1 - peer, 2, timeout_seconds))

run_rank(0)
"""

STORE = """
def beat_on(collectives):  # a beat has no answer: it is the one after that fails
    for _ in range(4):
        time.sleep(1.05)
        collectives.beat()

def run_rank(rank):
    if rank == 2:
        host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(death_in, host.port.to_bytes(2, "big"))
        time.sleep(60)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    collectives = GlooCollectives(store, rank, 2, timeout_seconds, address)
    collectives.barrier()
    os.write(death_in, b"r")
    report_wait(rank, collectives.barrier if rank == 0 else lambda: beat_on(collectives))

host = start_ranks([2])[2]
port = int.from_bytes(os.read(death_out, 2), "big")
children = start_ranks([0, 1])
for _ in children:
    os.read(death_out, 1)
time.sleep(0.1)
os.kill(host, signal.SIGKILL)
end(*children.values())
"""

LISTEN = """
def run_rank(rank):
    collectives = connect(rank)
    gather_zeros(collectives)
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/self/net/{table}").read().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                say(rank, words[1].split(":")[0])
    collectives.barrier()

end(*start_ranks().values())
"""


class Wait(NamedTuple):
    """How the wait of one rank ended."""

    rank: int
    kind: str
    seconds: float
    peer: int | None
    died: bool
    message: str


class RankHost:
    """The process that forks the ranks."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        command = [sys.executable, "-c", HOST]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self, script: str, backs: list[str], world_size: int, folder: Path, timeout_seconds: float, **values: object
    ) -> dict[str, list[list[object]]]:
        """What the ranks of a script say on every back, sorted by rank. Nothing of it runs on afterwards."""
        scenarios = [
            {
                "script": RANKS + script,
                "back": back,
                "world_size": world_size,
                "path": str(folder / f"store {back} {world_size}"),
                "said": str(folder / f"said {back} {world_size}"),
                "complaints": str(folder / f"complaints {back} {world_size}"),
                "timeout_seconds": timeout_seconds,
                "address": "127.0.0.1",
                **values,
            }
            for back in backs
        ]
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(scenarios) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        for scenario, code in zip(scenarios, codes, strict=True):
            assert code == 0, f"{scenario['back']}: exit code {code}\n{Path(str(scenario['complaints'])).read_text()}"
        lines = {str(scenario["back"]): Path(str(scenario["said"])).read_text().splitlines() for scenario in scenarios}
        return {back: sorted((json.loads(line) for line in said), key=lambda words: words[0]) for back, said in lines.items()}

    def run_waits(
        self, script: str, backs: list[str], world_size: int, folder: Path, timeout_seconds: float, **values: object
    ) -> dict[str, list[Wait]]:
        """How the waits of a script's ranks end."""
        said = self.run(script, backs, world_size, folder, timeout_seconds, **values)
        return {back: [Wait(*words) for words in lines] for back, lines in said.items()}  # type: ignore[arg-type]

    def close(self) -> None:
        """End it."""
        self._process.communicate()


@pytest.fixture(scope="module")
def host() -> Iterator[RankHost]:
    """One for all tests: importing torch takes seconds."""
    host = RankHost()
    yield host
    host.close()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_what_is_gathered_is_what_the_ranks_gave_in_rank_order(world_size: int, host: RankHost, tmp_path: Path) -> None:
    for back in BACKS:
        name = "shm+gloo" if back in NODES else "shm" if back in ATOMIC else back
        assert host.run(GATHER, [back], world_size, tmp_path, 30) == {back: [[rank, name, rank, world_size] for rank in range(world_size)]}


@pytest.mark.parametrize("operation", ["gather_columns", "barrier"])
def test_a_killed_rank_ends_every_wait_quickly_even_where_it_was_dead_before(operation: str, host: RankHost, tmp_path: Path) -> None:
    waits = host.run_waits(LOSE, BACKS, 3, tmp_path, 40, operation=operation, loss=9)
    for back, (first, third) in waits.items():
        assert (first.rank, third.rank) == (0, 2)
        for wait in (first, third):
            assert wait.kind == "PeerError" and wait.seconds < 8, (back, wait)
            if back in ("shm", *ATOMIC) or operation == "barrier":
                assert (wait.peer, wait.died) == (1, True), (back, wait)
                assert wait.message == f"rank 1 died while rank {wait.rank} waited for it in {operation}"
            elif back == "gloo":  # it tells that one died; the lines tell which, where they know of one only
                assert wait.peer in (1, None)


@pytest.mark.parametrize("operation", ["gather_columns", "barrier"])
def test_a_stopped_rank_ends_every_wait_after_the_timeout(operation: str, host: RankHost, tmp_path: Path) -> None:
    waits = host.run_waits(LOSE, BACKS, 3, tmp_path, 2, operation=operation, loss=19)
    for back, (first, third) in waits.items():
        assert (first.kind, third.kind) == ("PeerError", "PeerError"), back
        assert 1.5 < first.seconds < 6 and third.seconds < 6, (back, first, third)
        if back in ("shm", *ATOMIC) or operation == "barrier":
            assert (first.peer, first.died) == (1, False), (back, first)
            assert first.message.startswith(f"rank 1 did not reach {operation} within 2 s"), back


def test_a_slow_rank_that_shows_that_it_is_at_work_is_waited_for(host: RankHost, tmp_path: Path) -> None:
    for back, waits in host.run_waits(SLOW, BACKS, 3, tmp_path, 2).items():
        assert [wait.kind for wait in waits] == ["no error"] * 3, (back, waits)
        assert waits[0].seconds > 2, f"{back}: the wait was not longer than the timeout"


def test_a_rank_that_shows_nothing_ends_the_wait_even_behind_one_that_is_at_work(host: RankHost, tmp_path: Path) -> None:
    for back, waits in host.run_waits(SILENT, BACKS, 3, tmp_path, 2).items():
        (wait,) = waits
        assert (wait.rank, wait.kind, wait.peer, wait.died) == (0, "PeerError", 2, False), (back, wait)
        assert 1.5 < wait.seconds < 5, (back, wait)
        assert wait.message.startswith("rank 2 did not reach barrier within 2 s"), back


def test_a_rank_that_never_comes_is_named_as_the_run_calls_it(host: RankHost, tmp_path: Path) -> None:
    for back, waits in host.run_waits(ABSENT, BACKS, 4, tmp_path, 1).items():
        assert [wait.rank for wait in waits] == [0, 1, 2], back
        for wait in waits:
            assert (wait.kind, wait.peer, wait.died) == ("PeerError", 3, False) and wait.seconds < 4, (back, wait)
            assert wait.message.startswith("rank 3 did not reach rendezvous within 1 s, 3 of 4 ranks did"), (back, wait)


@pytest.mark.skipif(not HAS_SHARED_MEMORY, reason="plain stores keep their order on x86-64 only")
def test_a_peer_that_ended_before_it_met_the_others_is_named(host: RankHost, tmp_path: Path) -> None:
    (waits,) = host.run_waits(ENDED, ["shm"], 2, tmp_path, 10).values()
    assert [wait.rank for wait in waits] == [0, 0, 1, 1]
    for wait in waits:
        assert (wait.kind, wait.peer, wait.died) == ("PeerError", 1 - wait.rank, True) and wait.seconds < 5, wait


def test_a_store_whose_host_is_gone_is_an_error_of_ours(host: RankHost, tmp_path: Path) -> None:
    waits = host.run_waits(STORE, ["gloo"], 3, tmp_path, 20)["gloo"]
    assert [(wait.rank, wait.kind, wait.peer) for wait in waits] == [(0, "PeerError", None), (1, "PeerError", None)]
    for wait in waits:
        assert wait.message.startswith("the store of the ranks no longer answers, its host has ended: ") and "\n" not in wait.message


def test_ranks_listen_on_the_given_address_only(host: RankHost, tmp_path: Path) -> None:
    for back, said in host.run(LISTEN, ["gloo", *NODES], 3, tmp_path, 20, address="127.0.0.2").items():
        assert said and {address for _, address in said} == {"0200007F"}, back


def test_nodes_are_numbered_by_first_appearance() -> None:
    assert number_nodes(["b", "a", "b", "c", "a"]) == [0, 1, 0, 2, 1]


@pytest.mark.skipif(not HAS_SHARED_MEMORY, reason="plain stores keep their order on x86-64 only")
def test_a_part_whose_row_does_not_fit_a_slot_is_refused() -> None:
    collectives = SharedMemoryCollectives(HashStore(), 0, 1, 5)
    with pytest.raises(ValueError, match="a row of 262145 x 4 bytes does not fit a slot of 1048576 bytes"):
        collectives.gather_columns(torch.zeros((1, 262145)), [262145])
    assert torch.equal(collectives.gather_columns(torch.ones((1, 262144)), [262144]), torch.ones((1, 262144)))


def test_gathers_of_one_shape_may_come_from_inside_and_outside_inference_mode() -> None:
    collectives = SharedMemoryCollectives(HashStore(), 0, 1, 5)
    for _ in range(2):  # of the two slots that take turns
        with torch.inference_mode():
            collectives.gather_columns(torch.zeros((1, 3)), [3])
    for place in range(2):
        given = torch.full((1, 3), float(place))
        assert torch.equal(collectives.gather_columns(given, [3]), given)


def test_one_rank_gets_back_what_it_gave() -> None:
    collectives: Collectives = IdentityCollectives()
    given = torch.randn(3, 4)
    assert collectives.gather_columns(given, [4]) is given
    assert (collectives.rank, collectives.world_size) == (0, 1)
    collectives.barrier()
    collectives.close()
