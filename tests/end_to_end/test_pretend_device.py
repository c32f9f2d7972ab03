"""Every command on a pretend accelerator, which differs from a CPU where a real device does (`tests/pretend_device`)."""

import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.command_host import CommandHost
from tests.end_to_end.conftest import PROJECT_ROOT, SECONDS, Checkpoints, Tandem
from tests.end_to_end.servers import Server, wait_until
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
        (
            ("--workers", "1"),
            {"PRETEND_NPU_MEMORY": "/no/memory"},
            r"\(RuntimeError: cannot open /no/memory\): use --device cpu",
        ),
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


@pytest.mark.parametrize("approach", ["smooth_quant", "rtn-c8"])
def test_quantization_with_calibration(tandem: Tandem, npu: Tandem, checkpoints: Checkpoints, approach: str) -> None:
    """The observers' statistics are on the CPU; the model is not."""
    folders = []
    for machine, device, name in ((tandem, "cpu", "cpu"), (npu, "npu", "npu")):
        folders.append(machine.folder / f"{approach}-{name}")
        samples = machine.folder / f"samples-{name}.npy"
        np.save(samples, np.random.default_rng(0).integers(3, 290, (4, 24)))
        result = machine.run(
            *("quantize", "-c", checkpoints.config, "--checkpoint", checkpoints.float, "-a", approach, "-t", "ids", "-s", samples),
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
    result = npu.run(*words, "--device", "npu", "--workers", "2")
    assert result.returncode == 0, result.stderr
    on_npu = json.loads(result.stdout)
    assert on_npu["perplexity"] == pytest.approx(on_cpu["perplexity"], rel=1e-5)
    words = ("bench", "--checkpoint", checkpoints.int8, "--prompt-tokens", "16", "--new-tokens", "4", "--workers", "2", "--json")
    result = npu.run(*words, "--device", "npu", PRETEND_NPU_BYTES="24000000")  # a small block for the bandwidth
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["device"] == "npu" and measured["collectives"] == "hccl"
    assert all(peak > weights for peak, weights in zip(measured["peak_device_bytes"], measured["weight_bytes"], strict=True))


@pytest.mark.parametrize("sharing", [1, 2])
def test_an_answer_continues_with_the_same_tokens_after_a_rank_died(npu: Tandem, checkpoints: Checkpoints, sharing: int) -> None:
    """Whether the devices gather or the host does for ranks that share one. The dead rank's device memory is free again."""
    memory = npu.new_folder() / "memory"
    variables = {
        "PRETEND_NPU_DEVICES": str(2 // sharing),
        "PRETEND_NPU_BYTES": str(24_000_000 * sharing),
        "PRETEND_NPU_MEMORY": str(memory),
    }
    options = ("--workers", "2", "--device", "npu", "--ranks-per-device", str(sharing), "--memory-fraction", "0.8")
    server = Server(npu, "--checkpoint", checkpoints.int8, *options, **variables)
    try:
        server.wait_until_ready()
        whole = server.complete("I love", max_tokens=48, temperature=0, ignore_eos=True)["choices"][0]["text"]
        ranks = server.running.find_ranks()
        with server.stream("I love", max_tokens=48, temperature=0, ignore_eos=True) as events:
            text = next(events)["choices"][0]["text"]
            os.kill(ranks[1], signal.SIGKILL)
            text += "".join(event["choices"][0]["text"] for event in events)
        assert text == whole
        assert (server.running.find_ranks()[0] == ranks[0]) == (sharing == 2), "a rank that gathers through the host keeps its weights"
        state = server.status
        weights, cache = state["ranks"][0]["weight_bytes"], state["ranks"][0]["kv_cache_bytes"]
        assert weights < 19_200_000 - cache < 19_200_000 - weights, "the cache takes what the weights leave of the allowed memory"
        wait_until(lambda: server.status["ranks"][0]["device_bytes"], "a report")
        assert weights + cache <= server.status["ranks"][0]["device_bytes"] <= 19_200_000
        assert re.search(r'^tandem_rank_device_bytes\{rank="1"\} [\d.e+]+$', str(server.ask("GET", "/metrics")[2], "utf-8"), re.MULTILINE)
    finally:
        server.end()


@pytest.mark.parametrize("script", ["check_uploads.py", "check_many_ranks.py"])
def test_in_one_process(npu: Tandem, script: str) -> None:
    result = npu.run_command([sys.executable, PROJECT_ROOT / "tests" / "pretend_device" / script])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("distance", "allowed", "collectives"), [(1, 1, "hccl"), (0, 1, None), (0, 2, "shm")])
def test_ranks_that_each_see_one_device_compare_them(
    npu: Tandem, checkpoints: Checkpoints, distance: int, allowed: int, collectives: str | None
) -> None:
    """As Slurm and Kubernetes start them: a rank's own device is its first, or all ranks have the same first one."""
    folder, port = npu.new_folder(), _free_port()
    shared = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "2"}
    shared |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PRETEND_NPU_DEVICES": "1"}
    options = ("--checkpoint", checkpoints.int8, "--device", "npu", "--ranks-per-device", str(allowed), "--max-new-tokens", "16")
    ranks = []
    for rank in range(2):
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "PRETEND_NPU_FIRST": str(rank * distance)}
        ranks.append(npu.start(npu.predict_command(folder, *options), **shared, **own))
    ends = [running.process.communicate(timeout=SECONDS) for running in ranks]
    codes = [running.process.returncode for running in ranks]
    if collectives is None:
        assert codes == [1, 1]
        words = "2 ranks have the same npu device, but --ranks-per-device is 1: give each its own, or allow it with --ranks-per-device 2"
        assert any(words in stderr for _, stderr in ends), ends
        return
    assert codes == [0, 0], ends
    assert json.loads((folder / "stats.json").read_text())["collectives"] == collectives
    alone = npu.predict("--checkpoint", checkpoints.int8, "--workers", "1", "--max-new-tokens", "16", "--device", "npu")
    assert (folder / "results.jsonl").read_text() == alone.jsonl


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
