"""`tandem batch`: answers as those of predict, although a rank is killed; what cannot be answered; a resumption."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.end_to_end.servers import wait_until

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

pytestmark = pytest.mark.slow

PROMPTS = [f"{name} is" for name in ("Huawei", "A llama", "Beijing", "The tea", "A bicycle", "The chain")]
NEW = 40
RANKS = ("--threads-per-rank", "1", "--dtype", "float32")


def write(path: Path, bodies: list[dict[str, Any]]) -> Path:
    lines = [{"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": body} for n, body in enumerate(bodies)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    return {line["custom_id"]: line["response"] for line in map(json.loads, path.read_text().splitlines())}


def test_a_batch_is_answered_as_by_predict_although_a_rank_dies(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(checkpoints.float, folder)
    expected = tandem.predict(
        *("--checkpoint", folder, "--workers", "1", *RANKS, "--max-new-tokens", str(NEW), "--ignore-eos", "--greedy"),
        *(word for prompt in PROMPTS for word in ("--prompt", prompt)),
    ).records
    bodies: list[dict[str, Any]] = [{"prompt": one, "max_tokens": NEW, "temperature": 0, "ignore_eos": True} for one in PROMPTS * 4]
    bodies += [
        {"prompt": "x", "max_tokens": -1},
        {"prompt": "x", "stream": True},
        {"prompt": "x", "guided_choice": ["red"], "max_tokens": 9},
    ]
    source, output = write(tmp_path / "in.jsonl", bodies), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "launcher", "batch", source, folder, "--workers", "2", *RANKS, "--max-batch-size", "4"]
    running = tandem.start([*command, "--output", output, "--log-dir", tmp_path / "logs"])
    wait_until(lambda: output.exists() and len(output.read_text().splitlines()) >= 4, "the first answers")
    os.kill(running.find_ranks()[1], signal.SIGKILL)
    _, errors = running.process.communicate(timeout=180)
    assert running.process.returncode == 0, errors
    assert "restart 1 of" in errors and "27 requests are answered" in errors
    answers = read(output)
    assert list(answers) == [f"r{number}" for number in range(27)], "in the order of the requests, none twice"
    for number in range(24):
        assert answers[f"r{number}"]["body"]["choices"][0]["text"] == expected[number % 6]["text"]
    assert answers["r24"]["status_code"] == 400 and "max_tokens is -1" in answers["r24"]["body"]["error"]["message"]
    assert answers["r25"]["body"]["error"]["message"] == "stream is not available in a batch"
    assert answers["r26"]["body"]["choices"][0]["text"] == "red"
    # A resumption answers only what is missing.
    kept = output.read_text().splitlines(keepends=True)
    output.write_text("".join(kept[:-1]))
    result = tandem.run("batch", source, "--checkpoint", folder, "--workers", "1", *RANKS, "--output", output, "--resume")
    assert result.returncode == 0, result.stderr
    again = output.read_text().splitlines(keepends=True)
    assert again[:-1] == kept[:-1] and read(output)["r26"]["body"]["choices"][0]["text"] == "red"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--output", "{}/out"), "no input: give a file of requests"),
        (("{}/in", "--checkpoint", "{model}"), "--output is missing"),
        (("{}/in", "{model}", "--output", "{}/in"), "is the input file: give another one"),
        (("{}/none", "{model}", "--output", "{}/out"), "INPUT .*/none does not exist"),
        (("{}/bad", "{model}", "--output", "{}/out"), "line 1: method is 'GET', but has to be 'POST'"),
    ],
)
def test_a_batch_that_cannot_be_run_is_refused(refuse: Any, arguments: tuple[str, ...], words: str) -> None:
    def make(checkpoints: "Checkpoints", folder: Path) -> list[str]:
        write(folder / "in", [{"prompt": "x"}])
        (folder / "bad").write_text('{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}\n')
        model = [] if any("{model}" in word for word in arguments) else ["--checkpoint", str(checkpoints.float)]
        return ["batch", *(word.format(folder, model=checkpoints.float) for word in arguments), *model]

    refuse(make, [words], False)
