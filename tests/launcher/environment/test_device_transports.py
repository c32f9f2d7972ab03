"""What a rank's transports between devices may listen on."""

import os

import pytest

from launcher.environment.device_transports import bind_device_transports

_NAMES = ("NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "HCCL_IF_IP", "NCCL_RAS_ENABLE", "TORCH_NCCL_ASYNC_ERROR_HANDLING")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/bin"})


def test_ranks_of_one_host_stay_on_the_loopback_interface() -> None:
    bind_device_transports("cuda", "127.0.0.1")
    assert [os.environ[name] for name in _NAMES] == ["=lo", "=lo", "127.0.0.1", "0", "0"]


def test_a_setting_of_the_user_stays_and_a_cpu_needs_none() -> None:
    bind_device_transports("cpu", "127.0.0.1")
    assert not set(_NAMES) & set(os.environ)
    os.environ["NCCL_SOCKET_IFNAME"] = "ib0"
    bind_device_transports("npu", "127.0.0.1")
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["HCCL_SOCKET_IFNAME"]) == ("ib0", "=lo")


def test_an_address_of_no_interface_leaves_the_choice_of_one_open() -> None:
    bind_device_transports("cuda", "203.0.113.7")
    assert "NCCL_SOCKET_IFNAME" not in os.environ and os.environ["HCCL_IF_IP"] == "203.0.113.7"
