"""A model whose float16 overflows for one prompt, as users and clients see it: that prompt gets an error, and nobody else notices."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from tests.end_to_end.servers import Server

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

HEALTHY, SICK = "The tea is warm", "A # llama"
"""The embedding of # is beyond float16."""
WORDS = "the logits are NaN or infinite in float16 at step 1, first behind the embedding: use --dtype bfloat16 or float32"
OPTIONS = ("--threads-per-rank", "1", "--dtype", "float16")
NUM_NEW = 12


@pytest.fixture(scope="module")
def folder(checkpoints: "Checkpoints", tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("overflow") / "tiny"
    shutil.copytree(checkpoints.float, folder)
    (token_id,) = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("#", add_special_tokens=False).ids
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token_id] *= 1e8
    tensors["lm_head.weight"][token_id] = 0  # no answer takes it
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("workers", "more"), [("1", ("--logprobs",)), ("2", ("--do-sample", "--top-k", "0")), ("3", ("--speculate", "--max-batch-size", "1"))]
)
def test_a_prompt_fails_alone(tandem: "Tandem", folder: Path, workers: str, more: tuple[str, ...]) -> None:
    arguments = ("--checkpoint", folder, *OPTIONS, "--workers", workers, "--max-new-tokens", str(NUM_NEW), "--ignore-eos", *more)
    alone = tandem.predict(*arguments, "--prompt", HEALTHY)
    place = tandem.new_folder()
    found = tandem.run_command(tandem.predict_command(place, *arguments, "--prompt", SICK, "--prompt", HEALTHY))
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == f"tandem: prompt 0 ended with an error: {WORDS}"
    assert "restart" not in found.stderr and "Traceback" not in found.stderr and not (place / "logs" / "verdict.json").exists()
    assert found.stdout == alone.stdout, "the other prompt has its result, the failed one has none"
    sick, healthy = (json.loads(line, parse_constant=pytest.fail) for line in (place / "results.jsonl").read_text().splitlines())
    assert (sick["finish_reason"], sick["token_ids"], sick["error"]) == ("error", [], WORDS)
    assert healthy == {**alone.records[0], "index": 1}
    json.loads((place / "stats.json").read_text(), parse_constant=pytest.fail)


def test_what_failed_runs_again_in_another_type(tandem: "Tandem", folder: Path) -> None:
    place = tandem.new_folder()
    arguments = ("--checkpoint", folder, "--workers", "1", "--max-new-tokens", "3", "--ignore-eos", "--prompt", SICK, "--prompt", HEALTHY)
    assert tandem.run_command(tandem.predict_command(place, *arguments, "--dtype", "float16")).returncode == 1
    again = tandem.run_command(tandem.predict_command(place, *arguments, "--dtype", "float32", "--resume"))
    assert again.returncode == 0, again.stderr
    records = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    assert [(record["index"], record["finish_reason"], len(record["token_ids"])) for record in records] == [
        (0, "length", 3),
        (1, "length", 3),
    ]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_evaluation_is_refused_with_the_reason(tandem: "Tandem", folder: Path, tmp_path: Path, workers: str) -> None:
    (tmp_path / "text.txt").write_text(f"{HEALTHY} {SICK} " * 20)
    arguments = ("--task", "perplexity", "--data", tmp_path / "text.txt", "--window", "32", "--json", "--log-dir", tmp_path / "logs")
    found = tandem.run("eval", *arguments, "--checkpoint", folder, *OPTIONS, "--workers", workers)
    assert (found.returncode, found.stdout) == (1, "")
    last = found.stderr.splitlines()[-1]
    assert last == "tandem: the logits are NaN or infinite in float16 in the evaluation: use --dtype bfloat16 or float32"
    assert "restart" not in found.stderr and not (tmp_path / "logs" / "verdict.json").exists()


@pytest.fixture(scope="module")
def server(tandem: "Tandem", folder: Path) -> Iterator[Server]:
    server = Server(tandem, "--checkpoint", folder, *OPTIONS, "--workers", "2")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 1, "top_k": 40, "seed": 1},
    {"temperature": 1, "seed": 1},
]


def test_a_request_gets_an_error_and_the_others_their_answers(server: Server) -> None:
    wanted = {"max_tokens": NUM_NEW, "ignore_eos": True, "temperature": 0}
    expected = server.complete(HEALTHY, **wanted)["choices"]
    before = server.status["ranks"]
    with ThreadPoolExecutor(8) as pool:
        healthy = [pool.submit(server.complete, HEALTHY, **wanted) for _ in range(6)]
        sick = [pool.submit(server.ask, "POST", "/v1/completions", {"prompt": SICK, "max_tokens": 5, **rules}) for rules in SAMPLED]
        several = pool.submit(server.ask, "POST", "/v1/completions", {"prompt": [HEALTHY, SICK], "n": 2, "max_tokens": 5})
        assert all(answer.result()["choices"] == expected for answer in healthy)
    for answer in (*sick, several):
        status, _, body = answer.result()
        assert (status, body["error"]["message"], body["error"]["code"], body["error"]["type"]) == (
            500,
            WORDS,
            "logits_not_finite",
            "server_error",
        )
    status = server.status
    assert (status["restarts"], status["running"], status["state"]) == (0, 0, "ready")
    assert [rank["pid"] for rank in status["ranks"]] == [rank["pid"] for rank in before]


@pytest.mark.parametrize("rules", SAMPLED, ids=str)
def test_a_stream_ends_with_an_error(server: Server, rules: dict[str, Any]) -> None:
    with server.stream(SICK, max_tokens=5, **rules) as events:
        (event,) = events
    assert event == {"error": {"message": WORDS, "type": "server_error", "param": None, "code": "logits_not_finite"}}
