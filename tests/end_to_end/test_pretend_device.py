"""Every command on a pretend accelerator, which differs from a CPU where a real device does (`tests/pretend_device`)."""

import json
import re
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

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


@pytest.mark.parametrize("collectives", ["auto", "shm", "gloo"])
def test_ranks_share_a_device_if_they_may(npu: Tandem, checkpoints: Checkpoints, collectives: str) -> None:
    words = ("--checkpoint", checkpoints.int8, "--max-new-tokens", "16", "--device", "npu", "--collectives", collectives)
    shared = npu.predict(*words, "--workers", "3", "--ranks-per-device", "3", PRETEND_NPU_DEVICES="1")
    assert shared.stats["collectives"] == ("shm" if collectives == "auto" else collectives)
    assert (
        shared.jsonl == npu.predict("--checkpoint", checkpoints.int8, "--workers", "1", "--max-new-tokens", "16", "--device", "npu").jsonl
    )


def test_auto_is_the_cpu_while_no_backend_passes_its_self_check(npu: Tandem, checkpoints: Checkpoints) -> None:
    outcome = npu.predict("--checkpoint", checkpoints.int8, "--workers", "1", "--max-new-tokens", "2")
    assert outcome.stats["device"] == "cpu" and outcome.stats["peak_device_bytes"] == [0]
    assert re.search(r"^note: --device auto uses the CPU, not npu: .+$", outcome.stderr, re.MULTILINE), outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (
            ("--workers", "3"),
            {"PRETEND_NPU_DEVICES": "2"},
            r"3 rank\(s\) on this host need 3 npu devices, but 2 are visible: start at most 2",
        ),
        (("--collectives", "nccl"), {}, "--collectives nccl needs --device cuda, but the device is npu"),
        (("--workers", "1"), {"PRETEND_NPU_BYTES": "1000000"}, r"rank 0 needs 0\.\d+ GB of device memory .* may use 0\.00 GB"),
        (("--workers", "1", "--memory-fraction", "1.5"), {}, "memory-fraction"),
        (("--workers", "1", "--num-blocks", "1"), {}, "the key-value cache holds 1 blocks"),
    ],
)
def test_what_cannot_run_is_refused_before_a_rank_starts(
    npu: Tandem, checkpoints: Checkpoints, arguments: tuple[str, ...], variables: dict[str, str], words: str
) -> None:
    folder = npu.new_folder()
    command = npu.predict_command(folder, "--checkpoint", checkpoints.int8, "--device", "npu", "--max-new-tokens", "16", *arguments)
    result = npu.run_command(command, **variables)
    assert result.returncode == 2, result.stderr
    assert re.search(words, " ".join(result.stderr.split())), result.stderr
    assert not (folder / "logs").exists()


def test_quantization_with_calibration(tandem: Tandem, npu: Tandem, checkpoints: Checkpoints) -> None:
    """The observers' statistics are on the CPU; the model is not."""
    folders = []
    for machine, device, name in ((tandem, "cpu", "cpu"), (npu, "npu", "npu")):
        folders.append(machine.folder / f"quantized-{name}")
        samples = machine.folder / f"samples-{name}.npy"
        np.save(samples, np.random.default_rng(0).integers(3, 290, (4, 24)))
        result = machine.run(
            *("quantize", "-c", checkpoints.config, "--checkpoint", checkpoints.float, "-a", "smooth-quant", "-t", "ids", "-s", samples),
            *("--output", folders[-1], "--device", device, "--workers", "2"),
        )
        assert result.returncode == 0, result.stderr
    on_cpu, on_npu = (load_file(folder / "model.safetensors") for folder in folders)
    assert on_cpu.keys() == on_npu.keys()
    for key, tensor in on_cpu.items():
        torch.testing.assert_close(on_npu[key].float(), tensor.float(), rtol=1e-4, atol=1.0 if tensor.dtype == torch.int8 else 1e-6)


def test_evaluation_and_bench(tandem: Tandem, npu: Tandem, checkpoints: Checkpoints) -> None:
    text = npu.folder / "text"
    text.write_text("A llama is an animal that lives in the mountains. " * 20)
    words = ("eval", "--task", "perplexity", "--data", text, "--checkpoint", checkpoints.float, "--json")
    on_cpu = json.loads(tandem.run(*words).stdout)
    on_npu = json.loads(npu.run(*words, "--device", "npu", "--workers", "2").stdout)
    assert on_npu["perplexity"] == pytest.approx(on_cpu["perplexity"], rel=1e-5)
    words = ("bench", "--checkpoint", checkpoints.int8, "--prompt-tokens", "16", "--new-tokens", "4", "--workers", "2", "--json")
    measured = json.loads(npu.run(*words, "--device", "npu").stdout)
    assert measured["device"] == "npu" and measured["collectives"] == "hccl"
    assert all(peak > weights for peak, weights in zip(measured["peak_device_bytes"], measured["weight_bytes"], strict=True))
