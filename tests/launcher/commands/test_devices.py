"""Which device ranks get, on machines that have other devices than this one."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from launcher.commands.devices import ChosenDevice, check_collectives, choose_device
from launcher.environment.detection import LaunchEnvironment
from launcher.job.device_facts import DeviceFacts
from model.backends.registry import find_backend
from parallel.errors import ConfigError

ALONE = LaunchEnvironment()
CPU = ChosenDevice("cpu")
Choose = Callable[..., ChosenDevice]


def rank_of(launcher: str, **fields: int) -> LaunchEnvironment:
    return LaunchEnvironment(launcher=launcher, rank=0, world_size=4, **fields)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Choose]:
    """Makes `choose_device(word, environment, num_local, ranks_per_device)` of a machine with so many devices of a type."""

    def build(kind: str | None, count: int = 0, free_bytes: tuple[int, ...] = (1000,), complaint: str | None = None) -> Choose:
        monkeypatch.setattr("launcher.commands.devices.may_have_accelerator", lambda: True)

        def read(checks: bool) -> DeviceFacts:
            # Without a check nothing is known against the device.
            said = complaint if checks else None
            facts = DeviceFacts(kind=kind, count=count, free_bytes=free_bytes, total_bytes=free_bytes, complaint=said)
            assert DeviceFacts.from_json(facts.to_json()) == facts
            return facts

        def choose(word: str, environment: LaunchEnvironment, num_local: int, ranks_per_device: int = 1) -> ChosenDevice:
            return choose_device(word, environment, num_local, ranks_per_device, read)

        return choose

    return build


def test_auto_asks_nobody_on_a_machine_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(checks: bool) -> DeviceFacts:
        raise AssertionError("the devices were looked at")

    monkeypatch.setattr("launcher.commands.devices.may_have_accelerator", lambda: False)
    assert choose_device("auto", ALONE, 2, 1, read) == CPU
    monkeypatch.setattr("launcher.commands.devices.may_have_accelerator", lambda: True)
    assert choose_device("cpu", ALONE, 2, 1, read) == CPU


def test_auto_is_the_device_once_its_self_check_passes(machine: Callable[..., Choose], capsys: pytest.CaptureFixture[str]) -> None:
    assert machine(None)("auto", ALONE, 1) == CPU  # a driver without a device
    assert machine("cuda", 2, (900, 700))("auto", ALONE, 2) == ChosenDevice("cuda", 700)
    assert capsys.readouterr().err == ""
    assert machine("cuda", 2, complaint="int8_linear differs")("auto", ALONE, 2) == CPU
    assert capsys.readouterr().err == "note: --device auto uses the CPU, not cuda: int8_linear differs\n"
    assert machine("cuda", 1)("auto", ALONE, 2) == CPU
    assert capsys.readouterr().err == (
        "note: --device auto uses the CPU, not cuda: 2 rank(s) on this host need 2 cuda devices, but 1 are visible\n"
    )
    assert (
        machine("cuda", 1)("auto", LaunchEnvironment(launcher="torchrun", rank=1, world_size=2, local_rank=1, local_world_size=2), 2) == CPU
    )
    assert capsys.readouterr().err == "", "rank 0 says it for all"


def test_a_driver_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def read(checks: bool) -> DeviceFacts:
        raise ConfigError("the devices of this host cannot be used (RuntimeError: CUDA error 999)")

    monkeypatch.setattr("launcher.commands.devices.may_have_accelerator", lambda: True)
    assert choose_device("auto", ALONE, 1, 1, read) == CPU
    said = "the devices of this host cannot be used (RuntimeError: CUDA error 999)"
    assert capsys.readouterr().err == f"note: --device auto uses the CPU, not an accelerator: {said}\n"
    with pytest.raises(ConfigError, match=r"cannot be used \(RuntimeError: CUDA error 999\): use --device cpu"):
        choose_device("cuda", ALONE, 1, 1, read)


def test_an_explicit_device_needs_one_for_each_rank_unless_they_share(machine: Callable[..., Choose]) -> None:
    two = machine("cuda", 2, complaint="no matter")
    assert two("cuda", ALONE, 2) == ChosenDevice("cuda", 1000)
    with pytest.raises(ConfigError, match=r"^3 rank\(s\) on this host need 3 cuda devices, but 2 are visible: start at most 2 ranks"):
        two("cuda", ALONE, 3)
    assert two("cuda", ALONE, 3, 2) == ChosenDevice("cuda", 500, 2)
    assert two("cuda", ALONE, 2, 4) == ChosenDevice("cuda", 1000), "two ranks are spread over both devices"
    with pytest.raises(ConfigError, match=r"^5 rank\(s\) .* need 3 cuda devices, with 2 on each, but 2 are visible: start at most 4 ranks"):
        two("cuda", ALONE, 5, 2)
    with pytest.raises(ConfigError, match="--device is npu, but this PyTorch supports cuda only"):
        two("npu", ALONE, 1)
    with pytest.raises(ConfigError, match="--device is cuda, but this PyTorch supports cpu only"):
        machine(None)("cuda", ALONE, 1)


def test_a_launcher_may_give_each_rank_its_own_device(machine: Callable[..., Choose]) -> None:
    one = machine("cuda", 1)
    assert one("cuda", rank_of("Slurm", local_rank=3, local_world_size=4), 4) == ChosenDevice("cuda", 1000)
    with pytest.raises(ConfigError, match=r"4 rank\(s\) .* but 1 are visible"):
        one("cuda", rank_of("torchrun", local_rank=0, local_world_size=4), 4)
    with pytest.raises(ConfigError, match=r"4 rank\(s\) .* but 2 are visible"):
        machine("cuda", 2)("cuda", rank_of("MindSpore", local_rank=3), 4)  # which does not say how many ranks this host has


@pytest.mark.parametrize(("count", "indices"), [(1, [0, 0, 0]), (2, [0, 1, 0]), (4, [0, 1, 2])])
def test_a_rank_opens_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch, count: int, indices: list[int]) -> None:
    current: list[int] = []
    monkeypatch.setattr("torch.accelerator.device_count", lambda: count)
    monkeypatch.setattr("torch.accelerator.set_device_index", current.append)
    assert [find_backend("cuda").open_device(rank) for rank in range(3)] == [torch.device("cuda", index) for index in indices]
    assert current == indices
    assert find_backend("cpu").open_device(1) == torch.device("cpu")


def test_a_device_is_known_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(get_device_properties=lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    monkeypatch.setattr("torch.get_device_module", lambda device: driver)
    assert find_backend("cuda").identify(torch.device("cuda", 3)) == "GPU-3"
    monkeypatch.setattr("torch.get_device_module", lambda device: SimpleNamespace())
    assert find_backend("npu").identify(torch.device("cuda", 3)) is None


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
    with pytest.raises(ConfigError, match="nccl needs a device for each rank, but 2 ranks share one"):
        check_collectives("nccl", "cuda", 2)
