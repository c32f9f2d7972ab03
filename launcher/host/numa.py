"""NUMA nodes: which cores have which memory nearby, cores for the ranks of a run, and where a process puts its memory."""

import ctypes
import os
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

NODES = Path("/sys/devices/system/node")
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
"""Number of the system call; libnuma, which wraps it, is rarely installed."""
_MPOL_PREFERRED = 1


def read_nodes(root: Path = NODES) -> dict[int, tuple[int, ...]]:
    """Return the cores of each NUMA node that has some; a single node 0 of all cores where the kernel does not tell."""
    nodes = {}
    for folder in root.glob("node[0-9]*"):
        try:
            cores = parse_cores((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if cores:
            nodes[int(folder.name.removeprefix("node"))] = cores
    return dict(sorted(nodes.items())) or {0: tuple(sorted(os.sched_getaffinity(0)))}


def parse_cores(text: str) -> tuple[int, ...]:
    """Parse the kernel's lists of cores, such as 0-3,8. Raises ValueError."""
    cores: list[int] = []
    for part in text.strip().split(",") if text.strip() else ():
        if not re.fullmatch(r"\d+(-\d+)?", part, re.ASCII):
            raise ValueError(f"{part!r} is no range of cores")
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return tuple(sorted(set(cores)))


def format_cores(cores: Collection[int]) -> str:
    """Inverse of `parse_cores`."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][1] + 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def place_ranks(
    num_ranks: int, threads: int, free: Collection[int], nodes: Mapping[int, Sequence[int]]
) -> tuple[tuple[int, ...], ...] | None:
    """Choose `threads` cores for each rank: of one node where they fit, spread evenly over the nodes. None: too few are free."""
    left = {node: sorted(set(cores) & set(free)) for node, cores in nodes.items()}
    if sum(map(len, left.values())) < num_ranks * threads:
        return None
    homes = [node for node in left if len(left[node]) >= threads]
    chosen: list[tuple[int, ...]] = []
    for rank in range(num_ranks):
        # Neighbours in rank order share a node, so that most gathers stay within it.
        preferred = rank * len(homes) // num_ranks
        fits = [node for node in (*homes[preferred:], *homes[:preferred]) if len(left[node]) >= threads]
        taken: list[int] = []
        for node in fits[:1] or left:
            count = threads - len(taken)
            taken += left[node][:count]
            left[node] = left[node][count:]
        chosen.append(tuple(taken))
    return tuple(chosen)


def plan_nodes(num_ranks: int, threads: int, root: Path = NODES) -> list[int | None]:
    """Return the node of each rank if all run on this host and no other run has claimed a core; None: it gets no cores of one node."""
    nodes = read_nodes(root)
    placed = place_ranks(num_ranks, threads, os.sched_getaffinity(0), nodes)
    return [None] * num_ranks if placed is None else [find_node(cores, nodes) for cores in placed]


def find_node(cores: Collection[int], nodes: Mapping[int, Sequence[int]]) -> int | None:
    """Return the only node that has all of these cores; None if there is none."""
    return next((node for node, its in nodes.items() if set(cores) <= set(its)), None)


def prefer_own_node() -> None:
    """Take this process's further memory from the node of the cores that it is bound to, if a host has several nodes."""
    nodes = read_nodes()
    node = find_node(os.sched_getaffinity(0), nodes)
    if len(nodes) > 1 and node is not None:
        prefer_node(node)


def prefer_node(node: int) -> bool:
    """Take this process's further memory from `node` while it has some. Returns False where the kernel does not allow it.

    Threads that start later inherit this; without it, memory still comes from the node of the core that touches it first.
    """
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return False
    words = (ctypes.c_ulong * (node // 64 + 1))()
    words[node // 64] = 1 << node % 64
    # The kernel reads one bit less than it is told.
    return bool(ctypes.CDLL(None).syscall(number, _MPOL_PREFERRED, words, ctypes.c_ulong(64 * len(words) + 1)) == 0)
