"""Recorded steps and their inputs on CUDA devices."""

from collections.abc import Callable

import torch

_WARM_UP_RUNS = 2
"""Runs before a recording: kernels are compiled and libraries set up in them, which must not happen while recording."""


class PinnedBlock:
    """Integers that go to a device in one copy, from memory that the device reads by itself."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.values = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        self.on_device = torch.zeros(size, dtype=torch.int32, device=device)
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Wait until `values` may be changed."""
        self._sent.synchronize()

    def send(self) -> None:
        """Start the copy; what is launched after it sees the new values."""
        self.on_device.copy_(self.values, non_blocking=True)
        self._sent.record()


class CudaGraphRecorder:
    """Records steps as CUDA graphs."""

    def open_block(self, size: int, device: torch.device) -> PinnedBlock:
        """Allocate pinned host memory, and memory on the device."""
        return PinnedBlock(size, device)

    def capture(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record a step; return a function that replays it and returns its result, which the next replay overwrites."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay
