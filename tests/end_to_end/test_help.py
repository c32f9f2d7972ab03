"""The help of every command, and `tandem env`."""

import json
import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Tandem

# What each command's help has to name at least.
COMMANDS = {
    "predict": "--config --checkpoint --workers --prompt --prompts-file --max-new-tokens --max-length --do-sample --greedy --temperature"
    " --top-k --top-p --repetition-penalty --seed --ignore-eos --logprobs --dtype --device --threads-per-rank --collectives --output"
    " --block-size --num-blocks --no-prefix-cache --speculate --stats --log-dir"
    " --max-restarts --timeout --worker_num --log_dir --cluster_time_out",
    "quantize": "--config --checkpoint --approach --output --output_dir --overwrite -c -a -q --dataset --dataset_type -t --dataset-path"
    " --dataset_path -s --num-samples --sample-tokens -w -k --act-quant-dtype --outliers --not-converted -b --alpha --fold --group-size"
    " --symmetric --asymmetric --kvcache-granularity --workers --dtype",
    "eval": "--task --data --config --checkpoint --limit --window --workers --dtype --kv-cache-dtype --max-batch-size --json",
    "bench": "--config --checkpoint --model-config --random-weights --quantization --num-layers --workers --batch-size --prompt-tokens"
    " --new-tokens --rounds --dtype --threads-per-rank --collectives --speculate --profile --json",
    "serve": "--config --checkpoint --workers --tensor-parallel-size --host --port --api-key-file --insecure --served-model-name"
    " --max-queue --request-timeout --drain --prefill-tokens --max-body-mb --allow-origin --dtype --max-batch-size --num-blocks --speculate"
    " --log-dir --max-restarts --timeout --nnodes",
    "convert": "--to --dtype --overwrite SRC DST",
    "reshard": "--workers --overwrite SRC DST",
    "env": "--json",
}
# Defaults that a reader needs, in the words beside the option.
DEFAULTS = {
    "--workers": "MS_WORKER_NUM, then the YAML's model_parallel",
    "--prompt": "MindFormers' three",
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
    """Each option or argument in the boxes of a help text, by its first name, to its words, on one line or several."""
    rows: dict[str, str] = {}
    for line in text.splitlines():
        continued = re.match(r"[│|]\s{20,}(\S.*?)\s*[│|]$", line)
        if continued and rows:
            rows[list(rows)[-1]] += f" {continued[1]}"
        found = re.match(r"[│|]\s+(?:\*\s+)?(--?[\w-]+|[A-Z]+)\b.*?<[\w\[\]]+>\s*(.*?)\s*[│|]$", line)
        if found:
            rows[found[1]] = found[2]
    return rows


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


def test_help_of_the_program_lists_every_command(tandem: "Tandem") -> None:
    result = tandem.run("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        assert re.search(rf"^[│|] {command}  ", result.stdout, re.MULTILINE), command


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

    rank = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    found = json.loads(tandem.run("env", "--json", MS_WORKER_NUM="2", **rank).stdout)
    assert (found["launcher"], found["rank"], found["world_size"], found["worker_num"]) == ("torchrun", 1, 2, 2)
    assert found["variables"] == {**rank, "MS_WORKER_NUM": "2"}
