"""LoRA adapters on the command line, in the server and in Python: the tokens of PEFT, for any ranks, and after a rank has died."""

import itertools
import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers

from tandem import LLM, InputError, LoRARequest, SamplingParams
from tests.end_to_end.servers import Server, wait_until
from tests.model.adapters import write_adapter

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

PROMPT = "I love Beijing, because the streets are wide and the tea is warm. A llama is an animal"
NEW = 40
RANKS = ("--threads-per-rank", "1", "--dtype", "float32")
GREEDY = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def adapters(checkpoints: "Checkpoints", tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(checkpoints.float, folder / "red", seed=1, target_modules=["q_proj", "v_proj"])
    write_adapter(checkpoints.float, folder / "blue", seed=2, r=6, use_rslora=True, target_modules="all-linear")
    return {name: folder / name for name in ("red", "blue")}


@pytest.fixture(scope="module")
def expected(checkpoints: "Checkpoints", adapters: dict[str, Path]) -> dict[str | None, list[int]]:
    """The greedy tokens of PEFT for each adapter, and of transformers."""
    tokenizer = find_tokenizer(checkpoints.float)
    found: dict[str | None, list[int]] = {}
    for name in (None, *adapters):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoints.float, dtype=torch.float32)
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, adapters[name])
        ids = torch.tensor([tokenizer.encode(PROMPT)])
        options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
        found[name] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()[ids.shape[1] :]
    assert len({tuple(ids) for ids in found.values()}) == 3
    return found


def find_tokenizer(folder: Path) -> Any:
    from model.text.tokenizer import read_tokenizer

    return read_tokenizer(folder)


def name_all(adapters: dict[str, Path]) -> list[str]:
    return [word for name, path in adapters.items() for word in ("--lora", f"{name}={path}")]


@pytest.mark.parametrize("workers", [1, 3])
def test_predict_gives_the_tokens_of_peft(
    tandem: "Tandem",
    checkpoints: "Checkpoints",
    adapters: dict[str, Path],
    expected: dict[str | None, list[int]],
    workers: int,
) -> None:
    name = "red" if workers == 1 else "blue"
    options = ["--lora", str(adapters["red"])] if workers == 1 else [*name_all(adapters), "--adapter", name]
    outcome = tandem.predict(
        *("--checkpoint", checkpoints.float, "--workers", str(workers), *RANKS, "--max-new-tokens", str(NEW), "--ignore-eos"),
        *("--prompt", PROMPT, *options),
    )
    assert outcome.records[0]["token_ids"] == expected[name]
    kept = outcome.stats["adapter_bytes"]
    planned = tandem.run("plan", checkpoints.float, "--workers", str(workers), "--json", *options[: 2 if workers == 1 else 4])
    plan = json.loads(planned.stdout)
    sizes = [sum(one) for one in zip(*plan["adapters"].values(), strict=True)]
    assert kept == sizes == [rank["adapter_bytes"] for rank in plan["ranks"]]


@pytest.fixture(scope="module")
def server(tandem: "Tandem", checkpoints: "Checkpoints", adapters: dict[str, Path]) -> Iterator[Server]:
    server = Server(tandem, "--checkpoint", checkpoints.float, "--workers", "2", *RANKS, *name_all(adapters))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()


def test_requests_choose_by_model_and_keep_their_tokens_when_a_rank_dies(server: Server, expected: dict[str | None, list[int]]) -> None:
    base = server.client.models.list().data[0].id
    fields: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "temperature": 0, "return_token_ids": True, "logprobs": 0}
    models = {None: base, "red": "red", "blue": "blue"}
    # One after the other: a cached prefix of another adapter would change the tokens.
    alone = {name: server.complete(PROMPT, model=model, **fields)["choices"][0] for name, model in models.items()}
    for name, choice in alone.items():
        assert choice["token_ids"][:NEW] == expected[name]
    with ExitStack() as stack:
        streams = {name: stack.enter_context(server.stream(PROMPT, model=model, **fields)) for name, model in models.items()}
        begun = {name: list(itertools.islice(stream, 20)) for name, stream in streams.items()}
        os.kill(server.running.find_ranks()[1], signal.SIGKILL)
        for name, stream in streams.items():
            events = [*begun[name], *stream]
            assert {event["model"] for event in events} == {models[name]}
            assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == alone[name]["text"]
    wait_until(lambda: server.health == (200, "ok"), "ready again")
    assert server.status["restarts"] == 1 and server.status["adapters"] == ["red", "blue"]


def test_adapters_are_listed_with_their_base(server: Server) -> None:
    _, _, answer = server.ask("GET", "/v1/models")
    base = answer["data"][0]["id"]
    assert [(one["id"], one["parent"]) for one in answer["data"]] == [(base, None), ("red", base), ("blue", base)]
    assert server.ask("GET", "/v1/models/blue")[2]["parent"] == base
    status, _, answer = server.ask("POST", "/v1/completions", {"prompt": "x", "model": "green"})
    assert status == 404 and answer["error"]["message"] == f"the model 'green' is not served here; {base!r} and 'red' and 'blue' are"


def test_llm_chooses_by_lora_request(
    checkpoints: "Checkpoints", adapters: dict[str, Path], expected: dict[str | None, list[int]], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"dtype": "float32", "threads_per_rank": 1, "log_dir": tmp_path}
    with LLM(checkpoints.float, 2, enable_lora=True, lora=adapters, **options) as llm:
        red, blue = (LoRARequest(name, number, str(adapters[name])) for number, name in enumerate(adapters, 1))
        found = llm.generate([PROMPT] * 3, GREEDY, lora_request=[red, None, blue])
        assert [out.outputs[0].token_ids for out in found] == [expected["red"], expected[None], expected["blue"]]
        (one,) = llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("blue"))
        assert one.outputs[0].token_ids == expected["blue"]
        with pytest.raises(InputError, match=r"there is no adapter 'green': the adapters are red, blue"):
            llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("green", 3, "/green"))
        with pytest.raises(InputError, match=r"lora_path of 'red' is /elsewhere, but .* was loaded"):
            llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("red", 1, "/elsewhere"))
        with pytest.raises(InputError, match=r"lora_request has 1 entries, but there are 2 prompts"):
            llm.generate([PROMPT] * 2, GREEDY, lora_request=[red])
    with pytest.raises(InputError, match=r"LLM loads adapters when it is created"):
        LLM(checkpoints.float, enable_lora=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("red={red}", "blue={blue}"), "--lora gives 2 adapters, red, blue: choose one with --adapter"),
        (("red={red}", "--adapter", "green"), "--adapter is 'green', but --lora gives red"),
        (("red={red}", "red={blue}"), "--lora names two adapters 'red', {red} and {blue}: give each a name of its own"),
        (("red={red}/none",), "--lora red={red}/none: this folder does not exist"),
        (("red={red}/adapter_config.json",), "--lora red={red}/adapter_config.json is a file, but the folder of a PEFT adapter is needed"),
        (("red=",), "--lora is 'red=', but NAME=PATH is needed"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_starts(
    tandem: "Tandem", checkpoints: "Checkpoints", adapters: dict[str, Path], words: tuple[str, ...], message: str
) -> None:
    options: list[str] = []
    for word in words:
        options += [word] if word.startswith("--") or options[-1:] == ["--adapter"] else ["--lora", word.format(**adapters)]
    result = tandem.run("predict", checkpoints.float, "--prompt", "x", *options)
    assert (result.returncode, result.stderr) == (2, f"tandem: {message.format(**adapters)}\n")
