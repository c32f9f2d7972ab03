"""Gathers of device tensors where the device's part is played: what is joined, and who is blamed for a gather that never ends.

The whole path, with a device in its own process for each rank, is in tests/end_to_end/test_pretend_device.py.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from parallel.collectives import IdentityCollectives
from parallel.device_collectives import DeviceCollectives, StagedCollectives
from parallel.errors import PeerError

DEVICE = torch.device("meta")


class Host(IdentityCollectives):
    """Rank 1 of three: notes what it is asked to gather."""

    rank, world_size = 1, 3

    def __init__(self) -> None:
        self.asked: list[torch.Tensor] = []

    def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        self.asked.append(local)
        return torch.zeros((local.shape[0], sum(sizes)), dtype=local.dtype)


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks whose connections have closed."""
    ranks: list[int] = []
    monkeypatch.setattr(
        "parallel.device_collectives.PeerLines", lambda *arguments: SimpleNamespace(find_gone=lambda: ranks, close=lambda: None)
    )
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr("torch.accelerator.current_stream", lambda device: None)
    return ranks


def open_collectives(monkeypatch: pytest.MonkeyPatch, *, done: bool, seconds: float = 60.0) -> DeviceCollectives:
    event = SimpleNamespace(record=lambda stream: None, query=lambda: done)
    monkeypatch.setattr("torch.Event", lambda device: event)
    return DeviceCollectives(Host(), HashStore(), "nccl", DEVICE, seconds)


def test_host_tensors_never_reach_the_devices(monkeypatch: pytest.MonkeyPatch, gone: list[int]) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("NCCL takes no tensors in host memory")

    monkeypatch.setattr("torch.distributed.all_gather_single", refuse)
    collectives = open_collectives(monkeypatch, done=True)
    local = torch.ones((2, 1))
    assert collectives.gather_columns(local, [1, 1, 1]).shape == (2, 3)
    host = collectives._host
    assert isinstance(host, Host) and host.asked == [local]
    staged = StagedCollectives(host)
    assert (staged.name, staged.rank, staged.world_size) == (host.name, 1, 3)
    assert staged.gather_columns(local, [1, 1, 1]).device.type == "cpu"


@given(sizes=st.lists(st.integers(0, 5), min_size=3, max_size=3), rows=st.integers(1, 4), number=st.integers(0, 3))
def test_parts_of_any_width_are_joined_in_rank_order(sizes: list[int], rows: int, number: int) -> None:
    dtype = (torch.float32, torch.bfloat16, torch.int8, torch.float64)[number]
    parts = [torch.randint(-100, 100, (rows, size)).to(dtype) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel.device_collectives.PeerLines", lambda *arguments: SimpleNamespace())
        patch.setattr("torch.distributed.is_initialized", lambda: False)
        patch.setattr("torch.distributed.init_process_group", lambda *arguments, **options: None)
        patch.setattr(DeviceCollectives, "_wait", lambda self, device: None)
        collectives = DeviceCollectives(Host(), HashStore(), "nccl", torch.device("cpu"), 1.0)

        def gather(received: torch.Tensor, sent: torch.Tensor, group: Any) -> None:
            widest = max(sizes)
            assert torch.equal(sent.view(dtype).view(rows, widest)[:, : sizes[1]], parts[1])
            for place, part in zip(received.view(dtype).view(3, rows, widest), parts, strict=True):
                place[:, : part.shape[1]] = part

        patch.setattr("torch.distributed.all_gather_single", gather)
        addresses = set()
        for _ in range(2):
            assert torch.equal(collectives._gather_on_device(parts[1], sizes), torch.cat(parts, dim=1))
            addresses.add(tuple(buffer.data_ptr() for buffer in collectives._buffers))
        assert len(addresses) == 1, "the buffers stay where they are"


@pytest.mark.parametrize(
    ("dead", "peer", "words"),
    [
        ([2], 2, "^rank 2 died while rank 1 waited for it in gather_columns$"),
        ([0, 2], None, "waited in gather_columns for a rank that died or stopped: a peer is gone"),
        ([], None, "waited in gather_columns for a rank that died or stopped: no answer within 0.2 s"),
    ],
)
def test_a_gather_that_never_ends_blames_the_dead(
    monkeypatch: pytest.MonkeyPatch, gone: list[int], dead: list[int], peer: int | None, words: str
) -> None:
    """As NCCL does: its kernel waits for a dead peer for ever, and the call itself has returned."""
    monkeypatch.setattr("torch.distributed.all_gather_single", lambda *arguments, **options: None)
    collectives = open_collectives(monkeypatch, done=False, seconds=0.2)
    gone += dead
    with pytest.raises(PeerError, match=words) as failed:
        collectives.gather_columns(torch.empty((1, 2), device=DEVICE), [2, 2, 2])
    assert (failed.value.peer, failed.value.died) == (peer, peer is not None)
