"""Collectives of ranks on accelerators: two kinds of transport in one object.

Tensors in host memory (the ranks' messages, numbers and samples) always go through the host's collectives, which notice a dead peer.
Tensors on a device go through a group of the devices, or are staged through host memory where ranks share a device.
"""

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.collectives import Collectives
from parallel.errors import PeerError
from parallel.observed_time import ObservedTime
from parallel.peer_lines import PeerLines
from parallel.torch_internals import Store

_LOOK_SECONDS = 0.05
_GROUP_SECONDS = timedelta(days=1000)
"""Disables the group's own watchdog, which would abort the process: peers are watched here and by the parent."""


class StagedCollectives:
    """The host's collectives, with copies from and to the device around them. Any number of ranks may share a device."""

    def __init__(self, host: Collectives) -> None:
        self._host = host
        self.name, self.rank, self.world_size = host.name, host.rank, host.world_size

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)], on the device of `local`."""
        return self._host.gather_columns(local.cpu(), sizes).to(local.device)

    def barrier(self) -> None:
        """Block until every rank has reached the barrier."""
        self._host.barrier()

    def beat(self) -> None:
        """Signal the peers that this rank is alive."""
        self._host.beat()

    def close(self) -> None:
        """Release the resources of the host's collectives."""
        self._host.close()


class DeviceCollectives(StagedCollectives):
    """A group of devices, each with one rank: NCCL, or what the device's plugin registers with torch.distributed.

    The group works asynchronously, and waits for a dead peer for ever; so each gather is followed by a wait that watches the peers.
    `address`: the local address to listen on.
    """

    def __init__(
        self, host: Collectives, store: Store, backend: str, device: torch.device, timeout_seconds: float, address: str = "127.0.0.1"
    ) -> None:
        super().__init__(host)
        self.name, self._timeout_seconds = backend, timeout_seconds
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2)]
        self._lines = PeerLines(store, self.rank, range(self.world_size), address, timeout_seconds)
        self._group: dist.ProcessGroup | None = None
        try:
            if dist.is_initialized():  # the second model of a program
                self._group = dist.new_group(timeout=_GROUP_SECONDS, backend=backend)
            else:
                named = device if backend == "nccl" else None  # NCCL otherwise guesses it from the rank's number
                dist.init_process_group(
                    backend, store=store, rank=self.rank, world_size=self.world_size, timeout=_GROUP_SECONDS, device_id=named
                )
        except RuntimeError as error:
            raise self._fail("connect", error) from error

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join [rows, sizes[rank]] of every rank into [rows, sum(sizes)], on the device of `local`."""
        if local.device.type == "cpu":
            return self._host.gather_columns(local, sizes)
        return self._gather_on_device(local, sizes)

    def _gather_on_device(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Parts are sent as bytes, padded to the widest part, between buffers that stay at their addresses."""
        rows, widest = local.shape[0], max(sizes)
        size = rows * widest * local.element_size()
        sent, received = self._reserve(0, size), self._reserve(1, self.world_size * size)
        sent.view(local.dtype).view(rows, widest)[:, : local.shape[1]] = local
        try:
            if size:
                dist.all_gather_single(received, sent, group=self._group)
                self._wait(local.device)
        except RuntimeError as error:
            raise self._fail("gather_columns", error) from error
        parts = received.view(local.dtype).view(self.world_size, rows, widest)
        if min(sizes) == widest:
            return parts.transpose(0, 1).reshape(rows, -1)
        return torch.cat([part[:, :width] for part, width in zip(parts, sizes, strict=True)], dim=1)

    def close(self) -> None:
        """Leave the group."""
        self._lines.close()
        dist.destroy_process_group(self._group)
        super().close()

    def _reserve(self, number: int, size: int) -> torch.Tensor:
        """Return the first `size` bytes of a buffer, which grows to the largest gather."""
        if self._buffers[number].numel() < size:
            with torch.inference_mode(False):  # no gather outside of inference mode may write to a tensor made within
                self._buffers[number] = torch.empty(size, dtype=torch.uint8, device=self._buffers[number].device)
        return self._buffers[number][:size]

    def _wait(self, device: torch.device) -> None:
        """Wait until the device has gathered. Raises RuntimeError if a peer died or the time limit is exceeded."""
        event = torch.Event(device)
        event.record(torch.accelerator.current_stream(device))
        clock, next_look = ObservedTime(), time.monotonic() + _LOOK_SECONDS
        while not event.query():
            if time.monotonic() < next_look:
                continue
            next_look = time.monotonic() + _LOOK_SECONDS
            if self._lines.find_gone():
                raise RuntimeError("a peer is gone")
            if clock.read() > self._timeout_seconds:
                raise RuntimeError(f"no answer within {self._timeout_seconds:g} s")

    def _fail(self, operation: str, error: RuntimeError) -> PeerError:
        gone = self._lines.find_gone()
        if len(gone) == 1:  # with several, the first death caused the others
            return PeerError(f"rank {gone[0]} died while rank {self.rank} waited for it in {operation}", operation, peer=gone[0], died=True)
        return PeerError(f"rank {self.rank} waited in {operation} for a rank that died or stopped: {error}", operation)
