"""Checkpoints whose ends of answers stand in different files, and stop texts that are special tokens, on any number of ranks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.end_to_end.servers import Server

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Tandem

PROMPT = "Once upon a time"
TOKENS = [432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426]
"""What transformers 5.24 and llama.cpp give: the answer ends at 426."""
TEXT = ", there was a little girl named Lily"


@pytest.fixture(scope="module")
def cases(shared_dir: Path) -> Path:
    folder = shared_dir / "cases"
    if not folder.is_dir():
        pytest.skip("no cases among the shared data")
    return folder


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("01-generation-config-eos/model", "1"),
        ("01-generation-config-eos/model", "2"),
        ("17-gguf-eot-token/model.gguf", "1"),
        ("17-gguf-eot-token/model.gguf", "3"),
    ],
)
def test_an_answer_ends_where_the_files_say(tandem: "Tandem", cases: Path, name: str, workers: str) -> None:
    arguments = ("--checkpoint", cases / name, "--workers", workers, "--dtype", "float32", "--prompt", PROMPT, "--max-new-tokens", "40")
    (record,) = tandem.predict(*arguments).records
    assert (record["token_ids"], record["finish_reason"], record["text"]) == (TOKENS, "eos", f"{TEXT}.")
    if workers != "1":
        (ignored,) = tandem.predict(*arguments, "--ignore-eos").records
        assert (ignored["token_ids"][:11], len(ignored["token_ids"]), ignored["finish_reason"]) == (TOKENS, 40, "length")


def test_what_is_converted_ends_there_too(tandem: "Tandem", cases: Path, tmp_path: Path) -> None:
    found = tandem.run("convert", cases / "17-gguf-eot-token" / "model.gguf", tmp_path / "hf")
    assert found.returncode == 0, found.stderr
    arguments = ("--workers", "1", "--dtype", "float32", "--prompt", PROMPT, "--max-new-tokens", "40")
    (record,) = tandem.predict("--checkpoint", tmp_path / "hf", *arguments).records
    assert (record["token_ids"], record["finish_reason"]) == (TOKENS, "eos")


@pytest.fixture(scope="module")
def server(tandem: "Tandem", cases: Path) -> Iterator[Server]:
    server = Server(tandem, "--checkpoint", cases / "22-stop-special-token" / "model", "--dtype", "float32", "--workers", "2")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()


STOPS: list[tuple[dict[str, Any], str]] = [
    ({"stop": ["<|eot|>"]}, TEXT),
    ({"stop": "Lily<|eot|>"}, TEXT.removesuffix("Lily")),
    ({"stop": ["<|eot|> She loved"]}, TEXT),
    ({"stop_token_ids": [426]}, TEXT),
    ({"stop_token_ids": [426], "ignore_eos": True}, TEXT),
    ({"stop_token_ids": [317]}, TEXT.removesuffix(" Lily")),
]


@pytest.mark.parametrize(("fields", "text"), STOPS, ids=str)
def test_an_answer_stops_at_special_tokens(server: Server, fields: dict[str, Any], text: str) -> None:
    (choice,) = server.complete(PROMPT, max_tokens=40, temperature=0, **fields)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    with server.stream(PROMPT, max_tokens=40, temperature=0, **fields) as events:
        pieces = [event["choices"][0] for event in events]
    assert ("".join(piece["text"] for piece in pieces), pieces[-1]["finish_reason"]) == (text, "stop")


def test_a_chat_stops_at_ids_too(server: Server, cases: Path) -> None:
    vocab = json.loads((cases / "22-stop-special-token" / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 30, "temperature": 0, "logprobs": True}

    def chat(**fields: Any) -> tuple[list[str], str]:
        _, _, answer = server.ask("POST", "/v1/chat/completions", {**asked, **fields})
        (choice,) = answer["choices"]
        return [token["token"] for token in choice["logprobs"]["content"]], choice["finish_reason"]

    whole, reason = chat()
    assert (len(whole), reason) == (30, "length")
    end = whole[9]
    assert chat(stop_token_ids=[vocab[end.replace(" ", "▁")]]) == (whole[: whole.index(end) + 1], "stop")
    status, _, answer = server.ask("POST", "/v1/chat/completions", {**asked, "stop_token_ids": [512]})
    assert (status, answer["error"]["message"]) == (400, "stop_token_ids names id 512, but the vocabulary has 512")
