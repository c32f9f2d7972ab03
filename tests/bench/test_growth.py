"""growth.py from its command line with a fake `tandem bench`, and the arithmetic behind it."""

import json
import shlex
import sys
from pathlib import Path

import pytest

import growth
from calibration import fit_machine, simulate_point
from chart import Bar, Line, Panel, draw_bars, draw_panels
from growth_points import CONTEXTS, LARGE_LAYERS, AnswerFile, Point, list_points, scale_layers
from rounds import Spread
from simulate import Machine

FAKE = shlex.join([sys.executable, str(Path(__file__).with_name("fake_tandem.py"))])


def test_points_are_measured_once_and_the_rest_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--results", str(tmp_path), "--panels", "size", "--quiet", "0"]
    assert growth.main([*words, "--tandem", FAKE]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["points"] == 3 + len(LARGE_LAYERS)
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines()
    # A killed run leaves a part of a line: that point is measured again, the others are not.
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    assert growth.main([*words, "--tandem", "false"]) == 1
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]) == 1
    assert growth.main([*words, "--tandem", FAKE]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    assert set(first["simulated_70b"]["in one host"]) == {"1", "2", "4", "8", "16"}
    assert set(first["tokens_per_second_by_billions"]) == {"0.1", "1.1", "7", "70"}


def test_nothing_measured_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert growth.main(["--results", str(tmp_path), "--draw"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == 0


def test_the_median_step_of_a_context_point_has_that_context_behind_it() -> None:
    points = list_points(2)["context"]
    assert [point.decode_context_tokens for point in points.values()] == list(CONTEXTS)
    assert [point.prompt_tokens for point in points.values()] == list(CONTEXTS)


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_ranks_have_a_core_each_as_far_as_there_are_any(cores: int) -> None:
    for point in (point for panel in list_points(cores).values() for point in panel.values()):
        assert point.threads_per_rank >= 1
        assert point.workers * point.threads_per_rank <= max(cores, point.workers)


def test_steps_of_few_layers_are_scaled_by_their_difference() -> None:
    # 10 ms beside the layers, 5 ms a layer.
    assert scale_layers((2, 1 / 0.02), (4, 1 / 0.03), 80) == pytest.approx(1 / 0.41)


def test_fitted_rates_are_those_that_made_the_figures() -> None:
    truth = Machine(bandwidth_bytes_per_second=30e9, layer_seconds=3e-4, operations_per_second=1e15)
    points = list(list_points(2)["size"].values())
    measured = []
    for point in points:
        answer = {
            "quantization": "rtn-a16w8",
            "dtype": "bfloat16",
            "gather_seconds": 2e-5,
            "prefill_tokens_per_second": 1.0,
            "memory_bandwidth_bytes_per_second": 60e9,
        }
        measured.append((point, {**answer, "decode": [{"batch_size": 1, "tokens_per_second": simulate_point(point, answer, truth, 2, 1)}]}))
    machine = fit_machine(measured, 2)
    assert machine.bandwidth_bytes_per_second == pytest.approx(30e9, rel=1e-6)
    assert machine.layer_seconds == pytest.approx(3e-4, rel=1e-6)
    one = fit_machine(measured[:1], 2)
    assert (one.layer_seconds, one.bandwidth_bytes_per_second < 30e9) == (0.0, True)


def test_answers_with_other_settings_have_other_keys(tmp_path: Path) -> None:
    points = [point for panel in list_points(2).values() for point in panel.values()]
    assert len({point.key for point in points}) == len(set(points))
    file = AnswerFile(tmp_path / "new" / "answers.jsonl")
    point = Point(shape="tinyllama_1.1b", workers=2, threads_per_rank=1)
    file.add(point.key, {"decode": []})
    assert AnswerFile(file.path).answers == {point.key: {"decode": []}}


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'tandem-launcher[bench]'")
    value = Spread(2.0, 1.0, 3.0, 3)
    draw_bars([Bar("decode@1", "tandem", value, True), Bar("decode@1", "peer", value, False)], "title", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    lines = [Line(label="measured", points=[(2, 1.0), (1, 2.0)]), Line(label="simulated", points=[(1, 2.0)], simulated=True)]
    panels = [Panel(title="ranks", x_label="ranks", lines=lines), Panel(title="size", x_label="parameters, billions", lines=lines)]
    draw_panels([*panels, panels[0]], "title", tmp_path / "new" / "panels.svg")
    assert "<svg" in (tmp_path / "new" / "panels.svg").read_text()
