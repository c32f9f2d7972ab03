"""Logits that are NaN or infinite: the sequence ends with an error that says why, and nobody else notices."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.backends.registry import find_backend
from model.decoder.llama import LlamaForCausalLM
from model.engine.choice import Choice
from model.engine.events import SequenceFailure, TokenEvent
from model.engine.generation import Engine, generate
from model.engine.request import Request
from model.engine.sampling import LEAST_LOGPROB, RandomNumbers, SamplingState, sample
from model.engine.sampling_params import SamplingParams
from model.layers.linear import RowBlock
from model.layers.quantized_linear import StoredLinear, build_linear
from model.spec.linear_scheme import LinearScheme
from parallel.collectives import Collectives
from parallel.errors import NonFiniteError
from tandem import AutoModel

pytestmark = pytest.mark.usefixtures("one_thread")

BAD = 60
"""The token that float16 cannot hold."""
HEALTHY = ((5, 61, 7), (9, 8, 7, 6, 5, 4, 3, 41, 42, 43, 44), (70,))
SICK = (5, BAD, 7)
WORDS = "the logits are NaN or infinite in float16 at step {}, first behind {}: use --dtype bfloat16 or float32"
RULES: list[dict[str, Any]] = [
    {},
    {"logprobs": True, "top_logprobs": 3},
    {"do_sample": True, "top_k": 40},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 0, "top_p": 0.9},
    {"repetition_penalty": 1.3, "logit_bias": ((3, 1.0),)},
]


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose embedding of BAD is beyond float16, and within bfloat16 and float32."""
    source, folder = tiny_llama("nine_heads"), tmp_path_factory.mktemp("overflow")
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][BAD] *= 1e8
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def ask(prompts: tuple[tuple[int, ...], ...], count: int = 8, **rules: Any) -> list[Request]:
    return [Request(i, prompt, SamplingParams(max_new_tokens=count, ignore_eos=True, seed=i, **rules)) for i, prompt in enumerate(prompts)]


def run(model: LlamaForCausalLM, requests: list[Request], **options: Any) -> tuple[dict[int, list[TokenEvent]], list[SequenceFailure]]:
    engine, failures = Engine(model, **options), list[SequenceFailure]()
    events: dict[int, list[TokenEvent]] = {request.index: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        for event in engine.step():
            events[event.index].append(event)
        failures += engine.failures
    assert engine.num_used_blocks == 0
    return events, failures


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_sequence_ends_and_the_others_get_the_same_bits(
    folder: Path, run_ranks: Callable[..., list[Any]], rules: dict[str, Any], world_size: int
) -> None:
    prompts = (HEALTHY[0], SICK, *HEALTHY[1:])

    def work(model: LlamaForCausalLM) -> Any:
        return run(model, ask(prompts, **rules)), run(model, [one for one in ask(prompts, **rules) if one.index != 1])

    first, *others = run_ranks(folder, world_size, work, dtype="float16")
    assert all(other == first for other in others), "all ranks decide alike"
    (events, failures), (alone, none) = first
    assert failures == [SequenceFailure(1, 0, WORDS.format(1, "the embedding"))] and none == []
    assert events.pop(1) == [] and events == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_type_that_holds_the_numbers_goes_on(folder: Path, build_model: Callable[..., LlamaForCausalLM], dtype: str) -> None:
    events, failures = run(build_model(folder, dtype), ask((SICK,)))
    assert failures == [] and len(events[0]) == 8


@pytest.mark.parametrize("speculate", [False, True])
def test_a_sequence_that_has_begun_keeps_its_tokens(
    folder: Path, build_model: Callable[..., LlamaForCausalLM], speculate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "batch_invariant", property(lambda self: True))
    params = SamplingParams(max_new_tokens=8, ignore_eos=True, logit_bias=((BAD, 100.0),))
    prompt = (5, 6, 7, 5, 6, 7, 5, 6)
    requests = [Request(0, prompt, params), *ask((HEALTHY[0],) * 2)[1:]]
    events, failures = run(build_model(folder, "float16"), requests, speculate=speculate)
    assert [event.token_id for event in events[0]] == [BAD], "a bias has it chosen, and it is the one that float16 cannot hold"
    assert failures == [SequenceFailure(0, 1, WORDS.format(2, "the embedding"))]
    assert len(events[1]) == 8


@pytest.mark.parametrize("cache", [None, "token"])
def test_blocks_of_a_failed_sequence_do_no_harm_to_the_next(
    folder: Path, build_model: Callable[..., LlamaForCausalLM], cache: str | None
) -> None:
    model = build_model(folder, "float16")
    model.scheme = dataclasses.replace(model.scheme, kv_cache=cache)
    sick = Request(0, (SICK[1], *range(40)), SamplingParams(max_new_tokens=8))
    healthy = Request(1, (*range(20), 21), SamplingParams(max_new_tokens=20, ignore_eos=True))
    engine = Engine(model, 1, num_blocks=3)
    engine.add(sick)
    engine.step()
    assert [failure.index for failure in engine.failures] == [0] and engine.num_used_blocks == 0
    found = list(generate(engine, [healthy]))
    assert found == list(generate(Engine(model, 1, num_blocks=3), [healthy]))


@pytest.mark.parametrize("cache", [None, "token", "tensor"])
def test_what_a_failed_prompt_keeps_is_shared_with_nobody(
    folder: Path, build_model: Callable[..., LlamaForCausalLM], cache: str | None
) -> None:
    """An int8 cache with stored scales ("tensor") holds a NaN as 0: who shared such blocks would go on with wrong numbers."""
    model = build_model(folder, "float16")
    model.scheme = dataclasses.replace(model.scheme, kv_cache=cache)
    for layer in model.layers if cache == "tensor" else ():
        layer.assign_cache_scales(torch.tensor([0.05]), torch.tensor([0.05]), torch.device("cpu"))
    prompt = (BAD, *range(40))
    engine = Engine(model, 2)
    for request in ask((prompt, prompt, (*HEALTHY[1], *range(30))), logit_bias=((BAD, -100.0),)):
        engine.add(request)
    engine.step()
    assert engine.failures and engine._scheduler.pool.find(list(prompt), hollow=False)[0] == []
    failures = list(engine.failures)
    while engine.has_unfinished:
        engine.step()
        failures += engine.failures
    assert sorted(failure.index for failure in failures) == [0, 1], failures


def test_a_prompt_in_parts_fails_in_the_part_that_is_not_finite(folder: Path, build_model: Callable[..., LlamaForCausalLM]) -> None:
    prompt = (*range(40), BAD, *range(1, 50))
    events, failures = run(build_model(folder, "float16"), ask((prompt,)), prefill_tokens=16)
    assert [failure.position for failure in failures] == [0] and events == {0: []}


def test_generate_raises(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder, "float16")
    with pytest.raises(NonFiniteError, match=r"in float16 at step 1, first behind the embedding: use --dtype bfloat16 or float32"):
        model.generate(SICK)
    assert model.generate(HEALTHY[0]).pop().tolist()[:3] == list(HEALTHY[0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.mlp.down_proj.weight", "layer 1 of 2"),
        ("model.layers.0.self_attn.v_proj.weight", "layer 0 of 2"),
        ("model.norm.weight", "the last norm or the head"),
        ("lm_head.weight", "the last norm or the head"),
    ],
)
def test_the_first_layer_is_named(
    folder: Path, tmp_path: Path, build_model: Callable[..., LlamaForCausalLM], name: str, words: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    _, (failure,) = run(build_model(tmp_path), ask((HEALTHY[0],)))
    assert failure.message == (
        f"the logits are NaN or infinite in float32 at step 1, first behind {words}: check the weights with tandem verify"
    )


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("sizes", [[67], [34, 33], [1, 60, 6]], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 40, 66])
def test_a_row_that_is_not_finite_has_no_next_token(
    gather_ranks: Callable[..., list[Any]], rules: dict[str, Any], sizes: list[int], value: float, place: int
) -> None:
    logits = torch.randn((3, 67), generator=torch.Generator().manual_seed(1))
    expected, others = logits.clone(), logits.clone()
    logits[1, place] = value
    others[1] = -torch.inf

    def work(collectives: Collectives) -> list[list[Choice | None]]:
        start = sum(sizes[: collectives.rank])
        part = slice(start, start + sizes[collectives.rank])
        params = SamplingParams(max_new_tokens=5, **rules)
        states = [[SamplingState(params, {3}, RandomNumbers(row)) for row in range(3)] for _ in range(3)]
        rows = (logits, others, expected)
        return [sample(one[:, part], state, sizes, collectives) for one, state in zip(rows, states, strict=True)]

    for found, infinite, healthy in gather_ranks(len(sizes), work):
        assert found[1] is None and infinite[1] is None
        assert [found[0], found[2]] == [infinite[0], infinite[2]] == [healthy[0], healthy[2]] and healthy[1] is not None


def test_a_token_without_a_chance_has_vllms_least_log_probability(gather_ranks: Callable[..., list[Any]]) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])

    def work(collectives: Collectives) -> Choice | None:
        params = SamplingParams(max_new_tokens=1, logprobs=True, top_logprobs=3)
        (choice,) = sample(logits, [SamplingState(params, set(), RandomNumbers(0))], [3], collectives)
        return choice

    (choice,) = gather_ranks(1, work)
    assert choice.token_id == 2 and [token for token, _ in choice.top_logprobs] == [2, 0, 1]
    assert choice.top_logprobs[2][1] == LEAST_LOGPROB == -9999.0


def test_static_int8_activations_keep_a_nan() -> None:
    scheme = LinearScheme(activation="tensor")
    layer = build_linear(32, (RowBlock(16, 16),), (scheme,), torch.float16, find_backend("cpu"))
    weight = torch.randint(-127, 128, (16, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    layer.assign(StoredLinear(weight=weight, scale=torch.rand(16, 1), input_scale=0.02), torch.device("cpu"))
    x = torch.randn((3, 32), generator=torch.Generator().manual_seed(0)).half()
    expected = layer(x)
    x[1, 5] = torch.nan
    found = layer(x)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], expected[[0, 2]])
