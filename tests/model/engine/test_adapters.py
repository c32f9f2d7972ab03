"""Requests with and without LoRA adapters in one engine: each has the tokens that it has alone, whatever is shared or preempted."""

from collections.abc import Callable
from pathlib import Path

import pytest

from model.checkpoint.lora_folder import LoraFolder
from model.decoder.adapters import load_adapter
from model.decoder.llama import LlamaForCausalLM
from model.engine.generation import Engine
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from model.kernels.library import find_kernels
from parallel.errors import RequestError
from tests.model.adapters import write_adapter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_kernels() is None, reason="no kernels: without them the low-order bits depend on the batch"),
]
PROMPT = tuple((5 * i + 3) % 60 for i in range(40))
ADAPTERS = (None, "red", "blue")


@pytest.fixture(scope="module")
def model(
    tiny_llama: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory
) -> LlamaForCausalLM:
    base = tiny_llama("nine_heads")
    built = build_model(base)
    for seed, name in enumerate(("red", "blue")):
        folder = write_adapter(base, tmp_path_factory.mktemp(name), seed=seed, target_modules=["k_proj", "v_proj", "up_proj"])
        load_adapter(built, name, LoraFolder(folder, built.config))
    return built


def ask(index: int, adapter: str | None, prompt: tuple[int, ...] = PROMPT) -> Request:
    return Request(index, prompt, SamplingParams(max_new_tokens=24, ignore_eos=True), adapter=adapter)


def run(engine: Engine, requests: list[Request]) -> list[list[int]]:
    tokens: dict[int, list[int]] = {request.index: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        for event in engine.step():
            tokens[event.index].append(event.token_id)
    return [tokens[request.index] for request in requests]


@pytest.fixture(scope="module")
def alone(model: LlamaForCausalLM) -> dict[str | None, list[int]]:
    found = {adapter: run(Engine(model, share_prefixes=False), [ask(0, adapter)])[0] for adapter in ADAPTERS}
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    return found


@pytest.mark.parametrize(("num_blocks", "speculate"), [(None, False), (None, True), (6, False)], ids=["plain", "speculation", "preemption"])
def test_requests_keep_their_tokens(
    model: LlamaForCausalLM, alone: dict[str | None, list[int]], num_blocks: int | None, speculate: bool
) -> None:
    engine = Engine(model, 6, num_blocks=num_blocks, speculate=speculate)
    order = [None, "red", "blue", "red", None, "blue"]
    for first in (0, 6):  # again, when the prefixes of all of them are cached
        assert run(engine, [ask(first + number, adapter) for number, adapter in enumerate(order)]) == [alone[adapter] for adapter in order]
    assert (engine.counts.preemptions > 0) == (num_blocks is not None)


def test_prefixes_are_shared_within_an_adapter_only(model: LlamaForCausalLM) -> None:
    engine = Engine(model, 4)
    hits = []
    for number, adapter in enumerate((None, "red", "red", "blue", None, "blue")):
        before = engine.counts.prefix_hits
        run(engine, [ask(number, adapter)])
        hits.append(engine.counts.prefix_hits - before)
    assert hits == [0, 0, 32, 0, 32, 32]


def test_resumed_tokens_belong_to_the_adapter(model: LlamaForCausalLM, alone: dict[str | None, list[int]]) -> None:
    engine = Engine(model, 4, prefill_resumed=True)
    for number, adapter in enumerate(ADAPTERS):
        request = ask(number, adapter)
        resumed = Request(number, request.prompt_ids, request.params, tuple(alone[adapter][:9]), adapter=adapter)
        assert run(engine, [resumed]) == [alone[adapter][9:]]


def test_an_unknown_adapter_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(RequestError, match="the LoRA adapter 'green' is not loaded: give it with --lora green=PATH"):
        Engine(model).add(ask(0, "green"))
