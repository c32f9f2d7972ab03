"""Every command on a pretend accelerator, which differs from a CPU where a real device does (`tests/pretend_device`)."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.command_host import CommandHost
from tests.end_to_end.conftest import PROJECT_ROOT, Checkpoints, Tandem
from tests.pretend_device.build import build


@pytest.fixture(scope="module")
def npu(tandem: Tandem, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Tandem]:
    """The command line on a machine with four pretend devices."""
    if shutil.which("g++") is None:
        pytest.skip("the pretend device is compiled with g++, which is not installed")
    folder = build(pytestconfig.cache.mkdir("pretend_device"))
    environment = {**tandem.environment, "PYTHONPATH": f"{folder}:{PROJECT_ROOT}"}
    machine = Tandem(tmp_path_factory.mktemp("npu"), environment, CommandHost(environment))
    yield machine
    for running in machine.started:
        running.end()
    machine.host.close()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_predict(tandem: Tandem, npu: Tandem, checkpoints: Checkpoints, workers: int) -> None:
    words = ("--checkpoint", checkpoints.int8, "--workers", str(workers), "--max-new-tokens", "16")
    on_cpu = tandem.predict(*words)
    on_npu = npu.predict(*words, "--device", "npu")
    assert on_npu.stats["device"] == "npu"
    assert on_npu.jsonl == on_cpu.jsonl
