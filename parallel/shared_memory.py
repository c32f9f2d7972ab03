"""Collectives of CPU ranks on one host: each rank writes its slot, increments its sequence number and reads all slots.

Two buffers alternate: when a rank reuses a buffer, the sequence numbers guarantee that all peers have read it. Plain loads and stores
are ordered on x86-64 only; elsewhere `AtomicWords` orders them, or use torch.distributed. Waiting yields the CPU and ends when a peer
dies. The memory is anonymous, so it disappears with the last rank.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from parallel.errors import PeerError
from parallel.observed_time import ObservedTime
from parallel.process_ends import find_ended
from parallel.shared_words import AtomicWords, WordAccess
from parallel.store_waiting import wait_for_ranks
from parallel.torch_internals import Store

_SLOT_BYTES = 1 << 20
_FLAG_WORDS = 8  # one 64-byte cache line per rank, to avoid false sharing
_BEATS = 1  # the second word of a line; the first is the sequence number
_SPINS_BETWEEN_CHECKS, _SLEEPS_BETWEEN_CHECKS = 2000, 50
_SPINS_BEFORE_SLEEP = 10_000
_SLEEP_SECONDS = 0.0002
_SPINS_BEFORE_LONG_SLEEP, _LONG_SLEEP_SECONDS = 10_300, 0.002
"""A rank that has waited for 0.1 s is idle, such as one of a server without requests: it can poll less often."""


@dataclass(frozen=True, slots=True)
class SharedSlots:
    """State that native code needs to gather on its own."""

    flags: int
    """Address of the ranks' sequence numbers, int64."""
    flag_words: int
    """Stride between the sequence numbers of two ranks, in 64-bit words."""
    slots: int
    """Address of two buffers with one slot per rank."""
    slot_bytes: int
    """Bytes per slot."""
    sequence: int
    """This rank's current sequence number."""
    set_sequence: Callable[[int], None]
    """Set the sequence number after the native gathers."""
    check: Callable[[int], None]
    """Called during a long wait with the awaited sequence number; raises PeerError when a peer has died."""
    line: tuple[int, int, int, int]
    """Addresses of progress counter, operation, entered collectives and their nanoseconds in this rank's progress line."""
    gathering: int
    """Operation code during a gather."""
    computing: int
    """Operation code after a gather."""


@runtime_checkable
class SharesSlots(Protocol):
    """Collectives that can expose their slots to native code."""

    def share_slots(self) -> SharedSlots | None:
        """Return the current slots; None when every gather has to go through `gather_columns`."""
        ...


class SharedMemoryCollectives:
    """Gather through memory shared by all ranks of one host.

    `ranks`: rank numbers to use in messages when this group is part of a run. `access`: None on x86-64, where plain words are ordered.
    """

    name = "shm"

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        *,
        ranks: Sequence[int] | None = None,
        access: WordAccess | None = None,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._timeout_seconds = timeout_seconds
        self._ranks = list(range(world_size)) if ranks is None else list(ranks)
        self._sequence = 0
        flag_bytes = world_size * _FLAG_WORDS * 8
        size = flag_bytes + 2 * world_size * _SLOT_BYTES
        memory, descriptor = _map_shared(store, rank, self._ranks, size, timeout_seconds)
        slots = torch.frombuffer(memory, dtype=torch.uint8, offset=flag_bytes).view(2, world_size, _SLOT_BYTES)
        self._slots = [[slots[buffer, peer] for peer in range(world_size)] for buffer in range(2)]
        self._views: dict[tuple[object, ...], list[torch.Tensor]] = {}
        self._peers = [peer for peer in range(world_size) if peer != rank]
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._flags: memoryview[int] | AtomicWords
        self._flags = memoryview(memory)[:flag_bytes].cast("q") if access is None else AtomicWords(self._address, access)
        self._flag_bytes = flag_bytes
        self._unwatched = (ctypes.c_int64 * 4)()
        self._clock = ObservedTime()
        self._heard: tuple[int, dict[int, tuple[int, float]]] = (0, {})
        self._watch = _PeerWatch(store, self._peers, self._ranks)
        try:
            self.barrier()
        finally:
            os.close(descriptor)  # by now the others have opened rank 0's

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)]; many rows take several rounds."""
        rows, itemsize = local.shape[0], local.element_size()
        rows_a_round = _SLOT_BYTES // max(max(sizes) * itemsize, 1)  # sizes may all be 0
        if rows <= rows_a_round:
            return self._gather_round(local, sizes)
        if rows_a_round == 0:
            raise ValueError(f"a row of {max(sizes)} x {itemsize} bytes does not fit a slot of {_SLOT_BYTES} bytes")
        return torch.cat([self._gather_round(part, sizes) for part in torch.split(local, rows_a_round)])

    def share_slots(self) -> SharedSlots:
        """Return the state for native gathers. The user follows the protocol of `gather_columns` and reports the final sequence number."""
        first = ctypes.addressof(self._unwatched)
        return SharedSlots(
            flags=self._address,
            flag_words=_FLAG_WORDS,
            slots=self._address + self._flag_bytes,
            slot_bytes=_SLOT_BYTES,
            sequence=self._sequence,
            set_sequence=self._set_sequence,
            check=self._check_wait,
            line=(first, first + 8, first + 16, first + 24),
            gathering=0,
            computing=0,
        )

    def _set_sequence(self, sequence: int) -> None:
        self._sequence = sequence

    def _check_wait(self, sequence: int) -> None:
        self._sequence = sequence
        if self._heard[0] != sequence:
            self._heard = sequence, {}
        self._check_peers("gather_columns", self._heard[1])

    def barrier(self) -> None:
        """Block until every rank has reached the barrier."""
        self._sequence += 1
        self._meet("barrier")

    def beat(self) -> None:
        """Signal the peers that this rank is alive."""
        self._flags[self.rank * _FLAG_WORDS + _BEATS] += 1

    def close(self) -> None:
        """Stop watching the peers; the memory is freed with the process."""
        self._watch.close()

    def _gather_round(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        self._sequence += 1
        views = self._slot_views(self._sequence % 2, local.shape[0], sizes, local.dtype)
        views[self.rank].copy_(local)
        self._meet("gather_columns")
        return torch.cat(views, dim=1)

    def _slot_views(self, buffer: int, rows: int, sizes: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
        key = (buffer, rows, tuple(sizes), dtype)
        views = self._views.get(key)
        if views is None:
            if len(self._views) >= 256:  # prefill uses many different row counts, decode only a few
                self._views.clear()
            # Within inference mode, views would be tensors that no gather outside of it may write to.
            with torch.inference_mode(False):
                views = [
                    slot[: rows * size * dtype.itemsize].view(dtype).view(rows, size)
                    for slot, size in zip(self._slots[buffer], sizes, strict=True)
                ]
            self._views[key] = views
        return views

    def _meet(self, operation: str) -> None:
        """Increment this rank's sequence number and wait until every peer has reached it."""
        flags, sequence = self._flags, self._sequence
        flags[self.rank * _FLAG_WORDS] = sequence
        heard: dict[int, tuple[int, float]] = {}
        for peer in self._peers:
            spins = 0
            while flags[peer * _FLAG_WORDS] < sequence:
                os.sched_yield()
                spins += 1
                sleeps = spins > _SPINS_BEFORE_SLEEP
                if spins % (_SLEEPS_BETWEEN_CHECKS if sleeps else _SPINS_BETWEEN_CHECKS) == 0:
                    self._check_peers(operation, heard)
                if sleeps:
                    time.sleep(_SLEEP_SECONDS if spins < _SPINS_BEFORE_LONG_SLEEP else _LONG_SLEEP_SECONDS)

    def _check_peers(self, operation: str, heard: dict[int, tuple[int, float]]) -> None:
        """Raise PeerError for a peer that has died or has been silent for too long. `heard`: each peer's last beat count and when it
        changed.

        Checks all peers, not only the one being waited for: a rank that is still loading must not hide one that hangs.
        """
        me, now = self._ranks[self.rank], self._clock.read()
        for peer in self._peers:
            is_dead, beats = self._watch.is_dead(peer), self._flags[peer * _FLAG_WORDS + _BEATS]
            if peer not in heard or heard[peer][0] != beats:
                heard[peer] = beats, now
            is_late = now - heard[peer][1] > self._timeout_seconds
            # Read the sequence number last: the peer may have arrived, or even continued and exited, in the meantime.
            if not (is_dead or is_late) or self._flags[peer * _FLAG_WORDS] >= self._sequence:
                continue
            other = self._ranks[peer]
            if is_dead:
                raise PeerError(f"rank {other} died while rank {me} waited for it in {operation}", operation, peer=other, died=True)
            raise PeerError(
                f"rank {other} did not reach {operation} within {self._timeout_seconds:g} s of rank {me}; "
                "a longer --timeout allows slower ranks",
                operation,
                peer=other,
            )


class _PeerWatch:
    """Detects whether a peer's process has exited, zombies included."""

    def __init__(self, store: Store, peers: Sequence[int], names: Sequence[int]) -> None:
        self._descriptors = {}
        for peer in peers:
            try:
                self._descriptors[peer] = os.pidfd_open(int(store.get(f"pid/{names[peer]}")))
            except ProcessLookupError:
                self.close()
                name = names[peer]
                raise PeerError(f"rank {name} died before it met the others", "rendezvous", peer=name, died=True) from None

    def is_dead(self, peer: int) -> bool:
        """Return whether the peer's process has exited."""
        return bool(find_ended({peer: self._descriptors[peer]}))

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}


def _map_shared(store: Store, rank: int, ranks: Sequence[int], size: int, timeout_seconds: float) -> tuple[mmap.mmap, int]:
    """Map `size` bytes of anonymous memory, created by rank 0 and opened by the others through /proc. Blocks until all are present.

    Returns the memory and its descriptor, which rank 0 has to keep open until the others have opened it.
    """
    if rank == 0:
        descriptor = os.memfd_create("tandem")
        os.ftruncate(descriptor, size)
        store.set("shm", f"/proc/{os.getpid()}/fd/{descriptor}")
    store.set(f"pid/{ranks[rank]}", str(os.getpid()))
    wait_for_ranks(store, "pid", ranks, timeout_seconds, "rendezvous")
    if rank == 0:
        return mmap.mmap(descriptor, size), descriptor
    try:
        descriptor = os.open(store.get("shm").decode(), os.O_RDWR)
    except FileNotFoundError:
        first = ranks[0]
        raise PeerError(f"rank {first} died before it met the others", "rendezvous", peer=first, died=True) from None
    return mmap.mmap(descriptor, size), descriptor
