"""What `scripts/bench/device_check.py` does without a GPU: options, the time limit, the table and the file."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import device_check
import device_check_kernels
from model.decoder import llama
from tests.model.decoder.test_step_graph import Recorder
from tests.model.interpreted_kernels import build_interpreted_backend


def test_without_a_gpu_it_says_so_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert device_check.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("no CUDA device is visible to PyTorch ") and len(said.err.splitlines()) == 1


def test_options_have_defaults_and_take_names() -> None:
    options = device_check.parse([])
    assert options.output.name == "device_check.json" and options.seconds < 480 and options.only == []
    assert device_check.parse(["--only", "goldens", "recovery"]).only == ["goldens", "recovery"]


def test_a_failed_check_is_told_and_stops_no_other() -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("too small")

    found = device_check.run_checks({"bad": fail, "good": lambda: {"rate": 12.3456}}, 60)
    assert found["bad"]["failed"] == "ValueError: too small" and found["good"]["rate"] == 12.3456
    assert "too small" in device_check.draw_table(found) and "traceback" not in device_check.draw_table(found)


def test_no_check_starts_after_the_time_limit() -> None:
    found = device_check.run_checks({"long": lambda: time.sleep(0.05) or {}, "late": dict}, 0.01)
    assert found["late"] == {"skipped": "no time left"}


def test_the_table_has_one_line_per_result() -> None:
    found = {"bits": {"same": True, "alone": False}, "speed": {"7B": {"int8": 3000.123, "bf16": 2}}}
    assert device_check.draw_table(found).splitlines() == [
        "check | what  | result",
        "------+-------+------------------",
        "bits  | same  | yes",
        "bits  | alone | NO",
        "speed | 7B    | int8 3000, bf16 2",
    ]


def test_the_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "results" / "found.json"
    device_check.write_json(path, {"bits": {"same": True}})
    assert json.loads(path.read_text()) == {"bits": {"same": True}} and [one.name for one in path.parent.iterdir()] == ["found.json"]


def test_the_checks_are_those_of_both_modules() -> None:
    from device_check_kernels import KERNEL_CHECKS, SHAPES
    from device_check_models import MODEL_CHECKS, SIZES

    assert not KERNEL_CHECKS.keys() & MODEL_CHECKS.keys()
    hidden, inner, _, heads = SIZES["7B"]
    assert SHAPES["7B down"] == (hidden, inner) and SHAPES["7B gate_up"] == (2 * inner, hidden) and hidden % heads == 0


def run_once(run: Callable[[], Any], times: int = 1) -> float:
    run()
    return 0.5


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The checks on models, on the CPU and with tiny sizes."""
    import device_check_models

    monkeypatch.setattr(device_check_models, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(device_check_models, "SIZES", {"7B": (32, 48, 1, 2)})
    monkeypatch.setattr(device_check_models, "CONTEXT", 17)
    monkeypatch.setattr(device_check_models, "clock", run_once)
    monkeypatch.setattr(device_check_kernels, "measure_copy", lambda: 1e6)
    return device_check_models


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_speed_compares_recorded_steps_with_others(tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build_interpreted_backend(monkeypatch)
    monkeypatch.setattr(llama, "find_backend", lambda device_type: backend)
    monkeypatch.setattr(backend, "recorder", Recorder())
    monkeypatch.setattr(tiny_models, "build", lambda size, scheme, build=tiny_models.build: build(size, scheme).half())
    found = tiny_models.speed("7B", tiny_models.INT8)
    assert found["graph tokens/s"] == 2 and found["same bits"] is True


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_speed_of_transformers_runs(tiny_models: Any) -> None:
    assert tiny_models.speed_of_transformers("7B", compiled=False) == {"tokens/s": 2}


def test_the_command_of_the_goldens_gives_the_same_text_twice(stories: Path) -> None:
    from device_check_models import find_texts, predict

    first, second = (find_texts(predict(stories, "cpu", ranks, 6)) for ranks in (1, 2))
    assert first == second and len(first) == 1 and first[0]
