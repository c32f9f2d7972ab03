"""The help of every command, and `tandem env`."""

import importlib.metadata
import json
import re
from typing import TYPE_CHECKING

import pytest
import typer

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Tandem

# What each command's help has to name at least.
COMMANDS = {
    "predict": "--config --checkpoint --model --workers --prompt --prompts-file --max-new-tokens --max-length --do-sample --greedy"
    " --temperature --top-k --top-p --repetition-penalty --seed --ignore-eos --logprobs --dtype --device --threads-per-rank --collectives"
    " --output --format --block-size --num-blocks --no-prefix-cache --speculate --draft-model --draft-tokens"
    " --stats --log-dir --max-restarts --timeout --offline",
    "chat": "--checkpoint --model --workers --system --max-new-tokens --temperature --dtype --device --offline",
    "quantize": "--config --checkpoint --approach --output --overwrite -c -a --dataset -t --dataset-path -s --num-samples --sample-tokens"
    " -w -k --act-quant-dtype --outliers --not-converted -b --alpha --fold --group-size --symmetric --asymmetric --kvcache-granularity"
    " --workers --dtype",
    "eval": "--task --data --config --checkpoint --limit --window --workers --dtype --kv-cache-dtype --max-batch-size --json",
    "bench": "--config --checkpoint --model-config --random-weights --quantization --num-layers --workers --batch-size --prompt-tokens"
    " --new-tokens --rounds --dtype --threads-per-rank --collectives --speculate --draft-model --profile --json",
    "serve": "--config --checkpoint --workers --host --port --api-key-file --insecure --served-model-name"
    " --max-queue --request-timeout --drain --prefill-tokens --max-body-mb --allow-origin --dtype --max-batch-size --num-blocks --speculate"
    " --draft-model --log-dir --log-level --max-restarts --timeout --nnodes",
    "batch": "--config --checkpoint --workers --output --resume --served-model-name --strict-fields --tool-call-parser --max-batch-size"
    " --max-restarts INPUT MODEL",
    "plan": "--config --checkpoint --model-config --workers --quantization --dtype --batch-size --tokens --bandwidth"
    " --draft-model --svg --json",
    "convert": "--to --dtype --overwrite --no-verify SRC DST",
    "reshard": "--workers --overwrite --no-verify SRC DST",
    "verify": "--deep --json --checkpoint",
    "run": "--module -m --workers -n --max-restarts --timeout --log-dir SCRIPT",
    "env": "--json",
}
# Other launchers' and libraries' spellings: accepted, but not shown. Each with a value, and the option whose value it gives.
ALIASES = {
    "predict": "--worker_num=3 --workers=3 | --tensor-parallel-size=3 -n=3 | --log_dir=x --log-dir=x | --cluster_time_out=9 --timeout=9"
    " | --config_path=c --config=c | --load_checkpoint=c --checkpoint=c | --bind_core=True --bind-cores=True | --node_rank=1 --node-rank=1"
    " | --local_worker_num=2 --local-workers=2 | --master_addr=h --master-addr=h | --master_port=9 --master-port=9"
    " | --max-num-seqs=4 --max-batch-size=4"
    " | --num-gpu-blocks-override=5 --num-blocks=5"
    " | --num-speculative-tokens=2 --draft-tokens=2"
    " | --no-enable-prefix-caching --no-prefix-cache | --enable-prefix-caching --prefix-cache",
    "serve": "--max-num-batched-tokens=64 --prefill-tokens=64 | --tensor-parallel-size=2 --workers=2",
    "quantize": "-q=gptq -a=gptq | --dataset_type=ids -t=ids | --dataset_path=f -s=f | --output_dir=o --output=o"
    " | --opname_blacklist=w2 -b=w2"
    " | --weight_quant_dtype=int8 -w=int8 | --kvcache_quant_dtype=int8 -k=int8 | --act_quant_dtype=int8 --act-quant-dtype=int8"
    " | --outliers_suppression=smooth --outliers=smooth",
}
# Defaults that a reader needs, in the words beside the option.
DEFAULTS = {
    "--workers": "MS_WORKER_NUM, then the YAML's model_parallel",
    "--prompt": "standard input",
    "--max-length": "1024",
    "--temperature": "1",
    "--top-k": "50",
    "--seed": "0",
    "--device": "auto",
    "--collectives": "auto",
    "--log-dir": "output/log",
    "--max-restarts": "1",
    "--timeout": "300",
}


def _read_rows(text: str) -> dict[str, str]:
    """Each option or argument of a help text, by its long name, to its words, on one line or several."""
    rows: dict[str, str] = {}
    start = text.index("\nArguments:" if "\nArguments:" in text else "\nOutput:")
    for line in text[start : text.index("  Example")].splitlines():
        found = re.match(r"  (?:-\w, )?(--[\w-]+|[A-Z]+)\b(?:\S| \S)*(?:  +(\S.*))?$", line)
        if found:
            rows[found[1]] = found[2] or ""
        elif rows and re.match(r" {6,}\S", line):
            rows[list(rows)[-1]] += f" {line.strip()}"
    return {name: words.strip() for name, words in rows.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_with_its_meaning_and_shows_an_example(tandem: "Tandem", command: str) -> None:
    result = tandem.run(command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for name in COMMANDS[command].split():
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", result.stdout), f"{name} is not named"
    rows = _read_rows(result.stdout)
    assert set(rows) >= {name for name in COMMANDS[command].split() if name in DEFAULTS}
    assert all(len(words) > 10 for words in rows.values()), rows
    assert re.search(rf"Examples?: tandem {command} ", result.stdout)


def test_help_of_predict_tells_the_defaults(tandem: "Tandem") -> None:
    rows = _read_rows(tandem.run("predict", "-h").stdout)
    for name, default in DEFAULTS.items():
        assert re.search(rf"Default: .*{re.escape(default)}", rows[name]), (name, rows[name])


def test_help_of_predict_fits_two_screens(tandem: "Tandem") -> None:
    assert tandem.run("predict", "--help", COLUMNS="100").stdout.count("\n") < 90


def _parse(command: str, words: list[str]) -> dict[str, object]:
    from launcher.cli.main import app

    made: dict[str, object] = typer.main.get_group(app).commands[command].make_context(command, list(words)).params
    return made


@pytest.mark.parametrize(("command", "pair"), [(command, pair) for command, pairs in ALIASES.items() for pair in pairs.split(" | ")])
def test_an_alias_is_the_same_option(command: str, pair: str) -> None:
    alias, option = (word.split("=") for word in pair.split())
    assert _parse(command, alias) == _parse(command, option)
    assert _parse(command, option) != _parse(command, [])


def test_help_of_the_program_lists_every_command(tandem: "Tandem") -> None:
    result = tandem.run("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command}  ", result.stdout, re.MULTILINE), command


def test_the_version_is_that_of_the_package(tandem: "Tandem") -> None:
    result = tandem.run("--version")
    assert (result.returncode, result.stdout) == (0, f"tandem {importlib.metadata.version('tandem-launcher')}\n")


def test_no_words_show_the_help(tandem: "Tandem") -> None:
    assert tandem.run().stdout == tandem.run("--help").stdout


def test_an_unknown_command_is_named(tandem: "Tandem") -> None:
    result = tandem.run("predikt")
    assert (result.returncode, result.stdout) == (2, "")
    assert "predikt" in result.stderr
    assert "Traceback" not in result.stderr


def test_env_as_json_prints_one_object_and_nothing_else(tandem: "Tandem") -> None:
    result = tandem.run("env", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert found["launcher"] == "none"
    assert found["rank"] is None
    assert found["versions"]["torch"] == importlib.metadata.version("torch") and found["versions"]["tandem"]
    assert found["cpu"]["usable_cores"] >= 1 and found["memory"]["available_bytes"] > 0
    assert found["backend"]["kernels"] in ("native", "torch") and isinstance(found["accelerators"], list)
    assert set(found["cgroup"]) == {"memory_limit_bytes", "oom_kills"}

    rank = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    found = json.loads(tandem.run("env", "--json", MS_WORKER_NUM="2", **rank).stdout)
    assert (found["launcher"], found["rank"], found["world_size"], found["worker_num"]) == ("torchrun", 1, 2, 2)
    assert found["variables"] == {**rank, "MS_WORKER_NUM": "2"}
