"""compare.py from its command line, with programs that only answer."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from compare import find_free, main, run_rounds
from peers import Contender, Speed
from quiet_machine import parse_times
from tandem_bench import PROJECT_ROOT, BenchError

FAKE = shlex.join([sys.executable, str(Path(__file__).with_name("fake_tandem.py"))])
SHAPE = str(PROJECT_ROOT / "scripts" / "bench" / "shapes" / "tinyllama_1.1b.json")
FAKE_LLAMA_BENCH = """#!/bin/sh
echo '[{"n_prompt": 64, "n_gen": 0, "avg_ts": 50.0}, {"n_prompt": 0, "n_gen": 8, "avg_ts": 10.0}]'
"""


def test_programs_run_in_turns_and_one_that_fails_is_left_out_with_its_reason() -> None:
    order: list[str] = []

    def contender(name: str, fails: bool = False, is_tandem: bool = False) -> Contender:
        def measure() -> Speed:
            order.append(name)
            if fails:
                raise BenchError("no luck")
            return Speed(None, {1: 2.0})

        return Contender(name, measure, is_tandem)

    said: list[str] = []
    rounds, details, left_out = run_rounds([contender("t", is_tandem=True), contender("a"), contender("b", fails=True)], 3, said.append)
    assert order == ["t", "a", "b", "a", "t", "t", "a"]
    assert left_out == {"b": "no luck"}
    assert [set(one) for one in rounds] == [{"t", "a"}] * 3
    assert set(details) == {"t", "a"}
    with pytest.raises(BenchError, match="t: no luck"):
        run_rounds([contender("t", fails=True, is_tandem=True)], 1, said.append)


def test_last_line_is_the_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = tmp_path / "llama-bench"
    llama.write_text(FAKE_LLAMA_BENCH)
    llama.chmod(0o755)
    words = ["--model-config", SHAPE, "--tandem", FAKE, "--threads", "2", "--rounds", "2", "--quiet", "0", "--batch-size", "1,8"]
    words += ["--llama-bench", str(llama), "--gguf", "m.gguf", "--results", str(tmp_path / "results")]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    (file,) = (tmp_path / "results").iterdir()
    assert json.loads(file.read_text()) == printed
    assert {"machine", "date", "cores", "per_round"} <= printed.keys()
    assert str(tmp_path) not in file.read_text()
    ratios = [(row["metric"], row["tandem"]) for row in printed["ratios"]]
    names = ["tandem 1x2 rtn-a16w8", "tandem 2x1 rtn-a16w8"]
    assert ratios == [(metric, name) for metric in ("prefill", "decode@1") for name in names]
    speed = printed["per_round"][0][names[0]]["decode@1"]
    assert printed["ratios"][-1]["median"] == pytest.approx(speed / 10.0)


def test_tandem_that_fails_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model-config", SHAPE, "--tandem", "false", "--rounds", "1", "--quiet", "0"]) == 1
    assert "exit code 1" in capsys.readouterr().err


def test_a_second_comparison_of_a_day_gets_a_number(tmp_path: Path) -> None:
    first = find_free(tmp_path, "compare_a")
    first.touch()
    assert (first.name, find_free(tmp_path, "compare_a").name) == ("compare_a.json", "compare_a_2.json")


def test_time_that_other_guests_took_counts_as_busy() -> None:
    assert parse_times("cpu  10 0 5 100 20 0 0 7 3 0\ncpu0 1 2 3\n") == (22, 142)
