"""Copies of weights from host memory to a device at the speed of the bus: through two pinned buffers in turn.

A copy from pinned memory runs while the other buffer is filled. From other memory, a driver copies through a small buffer of its own and
waits for each part.
"""

import functools
import threading

import torch

from model.backends.device_types import is_host_memory

_PART_BYTES = 16 << 20


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on the device; itself if it is already there. The copy is complete for what the device computes next."""
    if is_host_memory(device.type) or tensor.device.type == device.type:
        return tensor.to(device)
    return _open(device).copy(tensor)


@functools.cache
def _open(device: torch.device) -> "PinnedUpload":
    return PinnedUpload(device)


class PinnedUpload:
    """The two buffers of one device. Threads take turns."""

    def __init__(self, device: torch.device, part_bytes: int = _PART_BYTES) -> None:
        self._device, self._lock = device, threading.Lock()
        with torch.inference_mode(False):
            self._buffers = [torch.empty(part_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.Event(device) for _ in range(2)]
        self._next = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy on the device."""
        source = tensor.detach().contiguous()
        out = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        if not source.numel():
            return out
        part_bytes = self._buffers[0].numel()
        parts, places = (torch.split(whole.view(-1).view(torch.uint8), part_bytes) for whole in (source, out))
        with self._lock:
            for part, place in zip(parts, places, strict=True):
                buffer, copied = self._buffers[self._next][: part.numel()], self._copied[self._next]
                self._next = 1 - self._next
                copied.synchronize()  # until the device has read what this buffer held
                buffer.copy_(part)
                place.copy_(buffer, non_blocking=True)
                copied.record(torch.accelerator.current_stream(self._device))  # a thread's current device may be another
        return out
