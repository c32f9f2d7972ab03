"""Cores and memory of NUMA nodes, on made-up hosts and on this one."""

import ctypes
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.host.numa import find_node, format_cores, parse_cores, place_ranks, plan_nodes, prefer_node, read_nodes


def write_nodes(root: Path, lists: dict[str, str]) -> Path:
    """A folder like /sys/devices/system/node."""
    for name, cores in lists.items():
        (root / name).mkdir(parents=True)
        (root / name / "cpulist").write_text(cores + "\n")
    (root / "online").write_text("0-1\n")
    return root


def test_nodes_are_read_in_order_and_those_without_cores_are_left_out(tmp_path: Path) -> None:
    root = write_nodes(tmp_path, {"node10": "16-17", "node2": "4-7,12", "node0": "0-3,8-11", "node1": ""})
    assert read_nodes(root) == {0: (0, 1, 2, 3, 8, 9, 10, 11), 2: (4, 5, 6, 7, 12), 10: (16, 17)}


def test_a_kernel_that_tells_no_nodes_has_one_of_all_cores(tmp_path: Path) -> None:
    mine = tuple(sorted(os.sched_getaffinity(0)))
    assert read_nodes(tmp_path / "none") == {0: mine}
    assert read_nodes(write_nodes(tmp_path, {"node0": "what"})) == {0: mine}


def test_lists_of_cores_that_are_none_are_refused() -> None:
    for text in ("a", "1-", "1--2", "1,,2", "-1"):
        with pytest.raises(ValueError, match="is no range of cores"):
            parse_cores(text)
    assert parse_cores("3,0-1\n") == (0, 1, 3)


@given(st.sets(st.integers(0, 300)))
def test_cores_are_written_as_they_are_read(cores: set[int]) -> None:
    assert parse_cores(format_cores(cores)) == tuple(sorted(cores))


NODES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(NODES, st.integers(1, 12), st.integers(1, 6), st.data())
def test_every_rank_gets_cores_of_its_own_and_of_one_node_where_they_fit(
    sizes: list[int], num_ranks: int, threads: int, data: st.DataObject
) -> None:
    cores = iter(range(sum(sizes)))
    nodes = {2 * node: tuple(next(cores) for _ in range(size)) for node, size in enumerate(sizes)}
    free = data.draw(st.sets(st.integers(0, sum(sizes) - 1)))
    placed = place_ranks(num_ranks, threads, free, nodes)
    if len(free) < num_ranks * threads:
        assert placed is None
        return
    assert placed is not None and [len(one) for one in placed] == [threads] * num_ranks
    taken = [core for one in placed for core in one]
    assert len(set(taken)) == len(taken) and set(taken) <= free
    room = sum(len(set(its) & free) // threads for its in nodes.values())
    whole = sum(find_node(one, nodes) is not None for one in placed)
    assert whole >= min(room, num_ranks), "no rank spans two nodes while one has room for it"


def test_ranks_are_spread_over_the_nodes_in_order() -> None:
    nodes = {0: range(8), 1: range(8, 16)}
    assert place_ranks(4, 2, range(16), nodes) == ((0, 1), (2, 3), (8, 9), (10, 11))
    assert place_ranks(2, 8, range(16), nodes) == (tuple(range(8)), tuple(range(8, 16)))
    assert place_ranks(1, 16, range(16), nodes) == (tuple(range(16)),)
    assert place_ranks(3, 4, range(16), nodes) == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))


def test_a_plan_tells_the_node_of_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_nodes(tmp_path, {"node0": "0-3", "node1": "4-7"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert plan_nodes(4, 2, root) == [0, 0, 1, 1]
    assert plan_nodes(1, 8, root) == [None]
    assert plan_nodes(3, 4, root) == [None, None, None], "too few cores"


def _find_policy(line: "multiprocessing.connection.Connection") -> None:
    allowed = prefer_node(0)
    mode, mask = ctypes.c_int(-1), (ctypes.c_ulong * 16)()
    number = {"x86_64": 239, "aarch64": 236}[os.uname().machine]
    failed = ctypes.CDLL(None).syscall(number, ctypes.byref(mode), mask, ctypes.c_ulong(1024), None, ctypes.c_ulong(0))
    line.send((allowed, failed, mode.value, mask[0], prefer_node(1000)))


def test_the_kernel_takes_the_preferred_node() -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_find_policy, args=(there,))
    process.start()
    allowed, failed, mode, mask, unknown = here.recv()
    process.join()
    if not allowed:
        pytest.skip("this kernel or container does not allow set_mempolicy")
    assert (failed, mode, mask) == (0, 1, 1), "MPOL_PREFERRED, node 0"
    assert unknown is False
