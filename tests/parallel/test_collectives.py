"""Ranks in real processes: what they gather is torch.cat of what they gave, and a wait for a lost peer ends."""

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.collectives import Collectives, IdentityCollectives
from parallel.node_collectives import plan_nodes

PROJECT_ROOT = Path(__file__).resolve().parents[2]
X86_64 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="plain stores keep their order on x86-64 only")
BACKS = [pytest.param("shm", marks=X86_64), "gloo"]
NODES = [pytest.param(f"nodes {words}", marks=X86_64) for words in ("in turn", "in a row", "alone")]

RANKS = """
import os, signal, sys, time
import torch
from torch.distributed import FileStore
from parallel.collectives import DistributedCollectives
from parallel.errors import PeerError
from parallel.node_collectives import NodeCollectives
from parallel.shared_memory import SharedMemoryCollectives

back, world_size, path, timeout_seconds = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
death_out, death_in = os.pipe()

def say(*words):
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())

def connect(rank):
    store = FileStore(path, world_size)
    if back == "shm":
        return SharedMemoryCollectives(store, rank, world_size, timeout_seconds)
    if back.startswith("nodes"):  # ranks of one host in the parts of several
        nodes = {"nodes in turn": [0, 1, 0, 1], "nodes in a row": [0, 0, 1, 1], "nodes alone": [0, 1, 2, 3]}[back][:world_size]
        return NodeCollectives(store, rank, nodes, timeout_seconds, "127.0.0.1")
    return DistributedCollectives(store, rank, world_size, back, timeout_seconds)

def gather_zeros(collectives):
    return collectives.gather_columns(torch.zeros((1, 2)), [2] * world_size)

def report_wait(rank, operation):
    started = time.monotonic()
    try:
        operation()
    except PeerError as error:
        say(rank, "PeerError", time.monotonic() - started, *str(error).split())
    else:
        say(rank, "no-error 0")

def start_ranks():
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            try:
                run_rank(rank, connect(rank))
                os._exit(0)
            except BaseException as error:
                say(rank, "failed", repr(error))
                os._exit(1)
        children.append(child)
    return children
"""

GATHER = """
def make(of_rank, rows, size, dtype, seed):
    generator = torch.Generator().manual_seed(1000 * seed + of_rank)
    return torch.randn((rows, size), generator=generator, dtype=torch.float64).to(dtype)

def run_rank(rank, collectives):
    sizes_of = {2: ([5, 5], [7, 1], [1, 300]), 3: ([4, 4, 4], [9, 2, 5], [1, 1, 4096]), 4: ([4, 4, 4, 4], [9, 2, 5, 700])}[world_size]
    seed = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for sizes in sizes_of:
            for rows in (1, 2, 33, 700):  # 700 rows of 4096 take several rounds through a slot of 1 MiB
                seed += 1
                parts = [make(of_rank, rows, size, dtype, seed) for of_rank, size in enumerate(sizes)]
                found = collectives.gather_columns(parts[rank], sizes)
                assert found.dtype == dtype and torch.equal(found, torch.cat(parts, dim=1)), (dtype, sizes, rows)
    for step in range(100):  # decode: the same small shape again and again, each rank late in turn
        if step % 50 == rank:
            time.sleep(0.002)
        parts = [torch.full((1, 2 + of_rank), float(step * world_size + of_rank)) for of_rank in range(world_size)]
        found = collectives.gather_columns(parts[rank], range(2, 2 + world_size))
        assert torch.equal(found, torch.cat(parts, dim=1)), step
    keep = collectives.gather_columns(torch.full((2, 3), float(rank)), [3] * world_size)
    for _ in range(4):
        collectives.gather_columns(torch.full((2, 3), -1.0), [3] * world_size)
    assert torch.equal(keep, torch.arange(world_size).repeat_interleave(3).repeat(2, 1).float()), "a result is a copy"
    collectives.barrier()
    say(rank, "gathered", collectives.name, collectives.rank, collectives.world_size)
    collectives.close()

for child in start_ranks():
    os.waitpid(child, 0)
"""

KILL = """
def run_rank(rank, collectives):
    gather_zeros(collectives)
    os.write(death_in, b"r")  # ready
    if rank == 1:
        time.sleep(60)
    if rank == 0:
        report_wait(rank, lambda: gather_zeros(collectives))
    else:
        time.sleep(2)
        report_wait(rank, collectives.barrier)

children = start_ranks()
for _ in children:
    os.read(death_out, 1)
time.sleep(0.3)
os.kill(children[1], signal.SIGKILL)  # a zombie until the others are through
os.waitpid(children[0], 0)
os.waitpid(children[2], 0)
"""

SLOW = """
def run_rank(rank, collectives):
    collectives.barrier()
    if rank == 1:
        for _ in range(12):
            time.sleep(0.3)
            if "silent" not in path:
                collectives.beat()
    report_wait(rank, collectives.barrier)

for child in start_ranks():
    os.waitpid(child, 0)
"""

LISTEN = """
def run_rank(rank, collectives):
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
                say(rank, "listens", words[1].split(":")[0])
    collectives.barrier()

for child in start_ranks():
    os.waitpid(child, 0)
"""

ABSENT = """
def run_rank(rank, collectives):
    gather_zeros(collectives)
    if rank == 1:
        time.sleep(60)
    report_wait(rank, lambda: gather_zeros(collectives))

children = start_ranks()
os.waitpid(children[0], 0)
os.kill(children[1], signal.SIGKILL)
"""


def run_ranks(script: str, back: str, world_size: int, store: Path, timeout_seconds: float) -> list[list[str]]:
    """What the ranks of a script say, sorted by rank, word by word. Nothing of it runs on afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", RANKS + script, back, str(world_size), str(store), str(timeout_seconds)],
        env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complaints = process.communicate(timeout=100)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    assert process.returncode == 0, complaints
    return sorted(line.split(maxsplit=3) for line in said.splitlines())


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("back", BACKS)
def test_what_is_gathered_is_what_the_ranks_gave_in_rank_order(back: str, world_size: int, tmp_path: Path) -> None:
    said = run_ranks(GATHER, back, world_size, tmp_path / "store", 60)
    assert said == [[str(rank), "gathered", back, f"{rank} {world_size}"] for rank in range(world_size)]


@pytest.mark.parametrize("back", BACKS)
def test_a_wait_for_a_peer_that_is_killed_ends_quickly_even_where_it_was_dead_before(back: str, tmp_path: Path) -> None:
    said = run_ranks(KILL, back, 3, tmp_path / "store", 60)
    assert [words[:2] for words in said] == [["0", "PeerError"], ["2", "PeerError"]]
    for (rank, _, seconds, message), operation in zip(said, ("gather_columns", "barrier"), strict=True):
        assert float(seconds) < 5
        if back == "shm":
            assert message == f"rank 1 died while rank {rank} waited for it in {operation}"
        else:
            assert message.startswith(f"rank {rank} waited in {operation} for a rank that died or stopped: ")


@pytest.mark.parametrize("back", NODES)
def test_ranks_on_several_nodes_gather_the_same(back: str, tmp_path: Path) -> None:
    for world_size in (3, 4):
        said = run_ranks(GATHER, back, world_size, tmp_path / f"store{world_size}", 60)
        assert said == [[str(rank), "gathered", "shm+gloo", f"{rank} {world_size}"] for rank in range(world_size)]


@pytest.mark.parametrize("back", NODES)
def test_a_killed_rank_is_felt_on_every_node(back: str, tmp_path: Path) -> None:
    # Every rank gathers: the killed one's host feels it in its memory, the others between the hosts.
    script = KILL.replace("report_wait(rank, collectives.barrier)", "report_wait(rank, lambda: gather_zeros(collectives))")
    said = run_ranks(script, back, 3, tmp_path / "store", 60)
    assert [words[:2] for words in said] == [["0", "PeerError"], ["2", "PeerError"]]
    assert all(float(words[2]) < 8 for words in said)


@pytest.mark.parametrize("back", [*BACKS, *NODES[:2]])
def test_a_slow_rank_that_shows_that_it_is_at_work_is_waited_for(back: str, tmp_path: Path) -> None:
    said = run_ranks(SLOW, back, 3, tmp_path / "store", 2)
    assert [words[:2] for words in said] == [[str(rank), "no-error"] for rank in range(3)]


@pytest.mark.parametrize("back", [*BACKS, *NODES[:2]])
def test_a_slow_rank_that_shows_nothing_ends_the_wait(back: str, tmp_path: Path) -> None:
    said = run_ranks(SLOW, back, 3, tmp_path / "silent", 2)
    first = next(words for words in said if words[0] == "0")
    assert first[1] == "PeerError" and 1.5 < float(first[2]) < 4
    assert first[3].startswith("rank 1 did not reach barrier within 2 s")


def test_gloo_listens_on_the_given_address_only(tmp_path: Path) -> None:
    said = run_ranks(LISTEN, "gloo", 2, tmp_path / "store", 20)
    assert {words[2] for words in said} == {"0100007F"} and {words[0] for words in said} == {"0", "1"}


def test_nodes_are_numbered_by_first_appearance() -> None:
    assert plan_nodes(["b", "a", "b", "c", "a"]) == [0, 1, 0, 2, 1]


@pytest.mark.parametrize("back", BACKS)
def test_a_peer_that_never_comes_ends_the_wait_after_the_timeout(back: str, tmp_path: Path) -> None:
    said = run_ranks(ABSENT, back, 2, tmp_path / "store", 2)
    ((_, kind, seconds, message),) = said
    assert kind == "PeerError" and 1.5 < float(seconds) < 7
    if back == "shm":
        assert message == "rank 1 did not reach gather_columns within 2 s of rank 0; a longer --timeout allows slower ranks"
    else:
        assert message.startswith("rank 0 waited in gather_columns for a rank that died or stopped: ")


def test_one_rank_gets_back_what_it_gave() -> None:
    collectives: Collectives = IdentityCollectives()
    given = torch.randn(3, 4)
    assert collectives.gather_columns(given, [4]) is given
    assert (collectives.rank, collectives.world_size) == (0, 1)
    collectives.barrier()
    collectives.close()
