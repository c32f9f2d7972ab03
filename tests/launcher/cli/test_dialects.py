"""Command lines of Golden Stick's quant_ckpt.py, in both dialects, and of msrun, as tandem's own words and settings."""

from typing import Any

import pytest
import typer

from launcher.cli.dialects import translate
from launcher.cli.main import app
from launcher.settings.approaches import check_words, resolve_approach
from launcher.settings.checkpoint_options import QuantizeOptions
from launcher.settings.options import MAX_SECONDS, RunOptions

DOCUMENT = "-c predict_llama2_13b.yaml -s boolq/dev.jsonl -t boolq"


def parse(words: str) -> dict[str, Any]:
    arguments = translate(words.split())
    command: dict[str, Any] = typer.main.get_group(app).commands[arguments[0]].make_context(arguments[0], arguments[1:]).params
    return {name: value for name, value in command.items() if value not in (None, False) and name in QuantizeOptions.__dataclass_fields__}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (f"{DOCUMENT} -a rtn-a16w8", f"{DOCUMENT} -a rtn-a16w8"),
        (f"{DOCUMENT} -q rtn-a16w8", f"{DOCUMENT} -a rtn-a16w8"),
        ("-n ParallelLlamaForCausalLM -q smooth_quant -a int8", "-q smooth_quant --act-quant-dtype int8"),
        ("-q ptq -w int8 -a none -k int8 -o smooth", "-a ptq -w int8 --act-quant-dtype none -k int8 --outliers smooth"),
        ("-a int8 -a ptq", "--act-quant-dtype int8 -q ptq"),
        ("-q ptq -b lm_head w2 -w int8", "-q ptq -b lm_head -b w2 -w int8"),
        ("-q ptq -w int8 -b lm_head w2 int8 LlamaForCausalLM", "-q ptq -w int8 -b lm_head -b w2 -b int8 -b LlamaForCausalLM"),
        ("-n 2 -a rtn-a16w8", "--workers 2 -a rtn-a16w8"),
    ],
)
def test_options_of_quant_ckpt_are_told_apart_by_their_values(theirs: str, ours: str) -> None:
    found = parse(f"quantize {theirs}")
    assert found == parse(f"quantize {ours}")
    assert found["approach"] in ("rtn-a16w8", "smooth_quant", "ptq")


@pytest.mark.parametrize(
    ("said", "approach"),
    [
        ({}, "rtn-a16w8"),
        ({"weight_dtype": "int8"}, "rtn-a16w8"),
        ({"weight_dtype": "none", "kvcache_dtype": "int8"}, "rtn-c8"),
        ({"weight_dtype": "int8", "kvcache_dtype": "int8"}, "rtn-a16w8"),
    ],
)
def test_rtn_is_the_approach_of_its_types(said: dict[str, Any], approach: str) -> None:
    options = resolve_approach(QuantizeOptions(approach="rtn", **said))
    assert options.approach == approach
    check_words(options)  # raises for types that contradict the approach


@pytest.mark.parametrize("word", ["--cluster_time_out=-1", "--cluster_time_out -1", "--cluster_time_out=-3"])
@pytest.mark.parametrize("command", ["predict", "quantize"])
def test_a_negative_time_limit_of_msrun_is_no_limit(command: str, word: str) -> None:
    arguments = translate([command, *word.split(), "--prompt", "-1"])
    assert arguments == [command, "--cluster_time_out", str(MAX_SECONDS), "--prompt", "-1"]


def test_other_words_stay_as_they_are() -> None:
    words = ["predict", "--cluster_time_out=9", "--prompt", "-a", "int8", "-b", "x", "--timeout", "-1"]
    assert translate(words) == ["predict", "--cluster_time_out", "9", *words[2:]]


def test_options_of_a_program_are_not_touched() -> None:
    words = ["run", "--worker_num=2", "--join=True", "--cluster_time_out=-1", "script.py", "-a", "int8", "--cluster_time_out=-1"]
    limit = ["--cluster_time_out", str(MAX_SECONDS)]
    assert translate(words) == [*words[:3], *limit, "--", *words[4:]]


def test_every_option_of_msrun_is_accepted() -> None:
    words = (
        "--worker_num=2 --local_worker_num=2 --master_addr=127.0.0.1 --master_port=8118 --node_rank=0 --log_dir=output/msrun_log"
        " --join=True --cluster_time_out=7200 --bind_core=True --sim_level=-1 --sim_rank_id=-1 --rank_table_file= --worker_log_name=w"
        " --tail_worker_log=0,1"
    )
    program = typer.main.get_group(app).commands["run"].make_context("run", translate(["run", *words.split()[:-1], "x.py"])[1:]).params
    assert (program["workers"], program["join"], program["words"]) == (2, "True", ["x.py"])
    made = typer.main.get_group(app).commands["predict"].make_context("predict", translate(["predict", *words.split()])[1:]).params
    assert {name: made[name] for name in ("workers", "join", "simulation_level", "tail_worker_log", "timeout_seconds")} == {
        "workers": 2,
        "join": "True",
        "simulation_level": -1,
        "tail_worker_log": "0,1",
        "timeout_seconds": 7200.0,
    }
    assert {"join", "rank_table_file"} <= set(RunOptions.__dataclass_fields__)
