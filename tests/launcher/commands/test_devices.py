"""Which device ranks get, on machines that have other devices than this one."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from launcher.commands.devices import check_collectives, choose_device
from launcher.environment.detection import LaunchEnvironment
from model.backends.registry import find_backend
from parallel.errors import ConfigError

ALONE = LaunchEnvironment()


def rank_of(launcher: str, **fields: int) -> LaunchEnvironment:
    return LaunchEnvironment(launcher=launcher, rank=0, world_size=4, **fields)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, int], list[int]]:
    """Pretends that this machine has so many devices of a type; gives the indices that are made current."""

    def run(kind: str | None, count: int) -> list[int]:
        chosen: list[int] = []
        monkeypatch.setattr("torch.accelerator.is_available", lambda: kind is not None)
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: SimpleNamespace(type=kind) if kind else None)
        monkeypatch.setattr("torch.accelerator.device_count", lambda: count)
        monkeypatch.setattr("torch.accelerator.set_device_index", chosen.append)
        return chosen

    return run


@pytest.mark.parametrize(("kind", "count"), [(None, 0), ("cuda", 1), ("npu", 8)])
@pytest.mark.parametrize("word", ["auto", "cpu"])
def test_auto_is_the_cpu_whatever_the_machine_has(install: Callable[..., list[int]], kind: str | None, count: int, word: str) -> None:
    chosen = install(kind, count)
    assert choose_device(word, ALONE, 2) == "cpu"
    assert find_backend("cpu").open_device(1) == torch.device("cpu") and chosen == []


def test_an_explicit_device_needs_one_for_each_rank(install: Callable[..., list[int]]) -> None:
    chosen = install("cuda", 2)
    assert choose_device("cuda", ALONE, 2) == "cuda"
    with pytest.raises(ConfigError, match=r"^3 rank\(s\) on this host need as many cuda devices, but 2 are visible: start at most 2"):
        choose_device("cuda", ALONE, 3)
    assert [find_backend("cuda").open_device(rank) for rank in (0, 1)] == [torch.device("cuda", 0), torch.device("cuda", 1)] and chosen == [
        0,
        1,
    ]
    with pytest.raises(ConfigError, match="--device is npu, but this PyTorch supports cuda only"):
        choose_device("npu", ALONE, 1)
    install(None, 0)
    with pytest.raises(ConfigError, match="--device is cuda, but this PyTorch supports cpu only"):
        choose_device("cuda", ALONE, 1)


def test_launchers_that_give_each_rank_its_own_device_show_it_as_the_first(install: Callable[..., list[int]]) -> None:
    chosen = install("cuda", 1)
    assert choose_device("cuda", rank_of("Slurm", local_rank=3, local_world_size=4), 4) == "cuda"
    assert find_backend("cuda").open_device(3) == torch.device("cuda", 0) and chosen == [0]
    with pytest.raises(ConfigError, match=r"4 rank\(s\) .* but 1 are visible"):
        choose_device("cuda", rank_of("torchrun", local_rank=0, local_world_size=4), 4)
    install("cuda", 2)
    with pytest.raises(ConfigError, match=r"4 rank\(s\) .* but 2 are visible"):
        choose_device("cuda", rank_of("MindSpore", local_rank=3), 4)  # which does not say how many ranks this host has


def test_nccl_is_refused_without_a_gpu_or_without_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("auto", "shm", "gloo"):
        check_collectives(name, "cpu")
    with pytest.raises(ConfigError, match="nccl needs --device cuda, but the device is cpu"):
        check_collectives("nccl", "cpu")
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a PyTorch build with NCCL"):
        check_collectives("nccl", "cuda")
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    check_collectives("nccl", "cuda")
