"""Sampling against a plain numpy version over whole logits, for any split of the vocabulary."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from model.backends.largest import find_largest
from model.engine.choice import NO_TOKEN, Choice
from model.engine.sampling import RandomNumbers, SamplingState, sample
from model.engine.sampling_params import SamplingParams
from parallel.collectives import Collectives, IdentityCollectives
from parallel.errors import RequestError

VOCAB = 67
SPLITS = ([67], [34, 33], [1, 60, 6], [20, 20, 20, 7])
OPTIONS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.7},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_k": 200, "temperature": 0.6},
    {"do_sample": True, "top_k": 0, "top_p": 0.7, "temperature": 1.9},
    {"do_sample": True, "top_k": 12, "top_p": 0.5},
    {"do_sample": True, "top_k": 30, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.4},
    {"do_sample": True, "top_k": 9, "repetition_penalty": 0.6, "logprobs": True},
    {"do_sample": False, "frequency_penalty": 1.5, "presence_penalty": -0.5},
    {"do_sample": False, "logit_bias": ((66, 100.0), (0, -3.5), (20, 2.25))},
    {"do_sample": True, "top_k": 0, "top_p": 0.999, "frequency_penalty": -2.0, "presence_penalty": 2.0},
    {"do_sample": True, "top_k": 7, "repetition_penalty": 1.2, "presence_penalty": 1.25, "logit_bias": ((5, 4.0),), "top_logprobs": 3},
]
COUNTS = {2: 3, 40: 1, 65: 2}
"""How often ids came before, where a penalty counts them."""


def start_state(seed: int, penalized: tuple[int, ...] = (), **options: Any) -> SamplingState:
    params = SamplingParams(max_new_tokens=50, seed=seed, **options)
    counts = dict(COUNTS) if params.frequency_penalty or params.presence_penalty else {}
    return SamplingState(params, set(penalized), RandomNumbers(seed), counts)


def draw_plainly(logits: np.ndarray, state: SamplingState) -> int:
    """MindFormers' steps, each over the whole vocabulary: repetition penalty, temperature, top-k, top-p, one choice; OpenAI's bias and
    penalties behind the first."""
    params, values = state.params, logits.astype(np.float32).copy()
    for token in state.penalized:
        penalty = np.float32(params.repetition_penalty)
        values[token] = values[token] * penalty if values[token] < 0 else values[token] / penalty
    for token, bias in params.logit_bias:
        values[token] += np.float32(bias)
    for token, count in state.counts.items():
        values[token] -= np.float32(count) * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
    by_rank = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if not params.do_sample:
        return by_rank[0]
    wide = values.astype(np.float64) / params.temperature
    for token in by_rank[params.top_k or len(values) :]:
        wide[token] = -np.inf
    probabilities = np.exp(wide - wide.max())
    probabilities /= probabilities.sum()
    reached = 0.0
    for token in by_rank:
        if reached >= params.top_p:
            probabilities[token] = 0
        else:
            reached += probabilities[token]
    probabilities /= probabilities.sum()
    return int(np.random.RandomState(state.params.seed).choice(len(values), p=probabilities))


def make_logits(rows: int, seed: int) -> torch.Tensor:
    """Few bits, so that there are ties."""
    return (torch.randn((rows, VOCAB), generator=torch.Generator().manual_seed(seed)) * 2).to(torch.bfloat16).float()


@pytest.fixture(params=[None, find_largest], ids=["in host memory", "on the device"])
def sample_split(request: pytest.FixtureRequest, gather_ranks: Callable[..., list[Any]]) -> Callable[..., list[Choice]]:
    """`sample` of whole logits by ranks that each see their part; all ranks must agree."""

    def run(logits: torch.Tensor, build_states: Callable[[], list[SamplingState]], sizes: list[int]) -> list[Choice]:
        def work(collectives: Collectives) -> list[Choice]:
            start = sum(sizes[: collectives.rank])
            return sample(
                logits[:, start : start + sizes[collectives.rank]], build_states(), sizes, collectives, find_largest=request.param
            )

        first, *others = gather_ranks(len(sizes), work)
        assert all(other == first for other in others)
        return list(first)

    return run


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_token_is_the_one_of_the_plain_steps_for_any_split(
    options: dict[str, Any], sizes: list[int], sample_split: Callable[..., list[Choice]]
) -> None:
    rows = 40
    logits = make_logits(rows, 7)

    def build_states() -> list[SamplingState]:
        return [start_state(seed, penalized=(3, 40, 66, seed), **options) for seed in range(rows)]

    expected = [draw_plainly(values, state) for values, state in zip(logits.numpy(), build_states(), strict=True)]
    assert [choice.token_id for choice in sample_split(logits, build_states, sizes)] == expected


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_sequences_with_different_options_in_one_batch_do_not_touch_each_other(
    sizes: list[int], sample_split: Callable[..., list[Choice]]
) -> None:
    for chosen in (OPTIONS, [options for options in OPTIONS if options.get("top_k") != 0 and not options.get("logprobs")]):
        logits = make_logits(len(chosen), 11)

        def build_states(chosen: list[dict[str, Any]] = chosen) -> list[SamplingState]:
            return [start_state(seed, penalized=(1, 2), **options) for seed, options in enumerate(chosen)]

        expected = [draw_plainly(values, state) for values, state in zip(logits.numpy(), build_states(), strict=True)]
        assert [choice.token_id for choice in sample_split(logits, build_states, sizes)] == expected


def test_a_large_top_k_draws_the_same_and_exchanges_no_more_than_whole_logits(sample_split: Callable[..., list[Choice]]) -> None:
    """65,536 candidates of a rank would not fit a slot of shared memory, and a client may ask for them."""
    vocab, top_k = 200_000, 150_000
    logits = torch.randn((2, vocab), generator=torch.Generator().manual_seed(3))
    widest = []

    class Alone(IdentityCollectives):
        def gather_columns(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
            widest.append(max(sizes) * local.element_size())
            return super().gather_columns(local, sizes)

    def build_states() -> list[SamplingState]:
        return [start_state(seed, do_sample=True, top_k=top_k, temperature=1.9) for seed in (0, 1)]

    expected = [draw_plainly(values, state) for values, state in zip(logits.numpy(), build_states(), strict=True)]
    assert [choice.token_id for choice in sample(logits, build_states(), [vocab], Alone())] == expected
    assert [choice.token_id for choice in sample_split(logits, build_states, [100_000, 100_000])] == expected
    assert widest == [vocab * 4]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_of_equal_logits_the_lowest_id_wins(sizes: list[int], sample_split: Callable[..., list[Choice]]) -> None:
    logits = torch.zeros((2, VOCAB))
    logits[1, [64, 35, 36, 12]] = 4
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 1}):
        found = sample_split(logits, lambda options=options: [start_state(seed, **options) for seed in (0, 1)], sizes)
        assert [choice.token_id for choice in found] == [0, 12]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_of_equal_logits_the_lowest_ids_are_the_candidates(sizes: list[int], sample_split: Callable[..., list[Choice]]) -> None:
    found = sample_split(torch.zeros((90, VOCAB)), lambda: [start_state(seed, do_sample=True, top_k=30) for seed in range(90)], sizes)
    assert max(choice.token_id for choice in found) < 30 and len(set(found)) > 20


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("do_sample", [False, True])
def test_log_probabilities_are_those_of_the_raw_logits(
    do_sample: bool, sizes: list[int], sample_split: Callable[..., list[Choice]]
) -> None:
    logits = make_logits(6, 3) * 3
    options = {"do_sample": do_sample, "logprobs": True, "temperature": 0.7, "top_k": 4, "repetition_penalty": 1.5}
    found = sample_split(logits, lambda: [start_state(seed, penalized=(5, 6), **options) for seed in range(6)], sizes)
    expected = torch.log_softmax(logits.double(), dim=1)
    for row, (token, logprob, _, rank) in enumerate(found):
        assert logprob == pytest.approx(float(expected[row, token]), rel=1e-6, abs=1e-6)
        assert rank == 1 + int((expected[row] > expected[row, token]).sum())
    alone = sample(logits, [start_state(seed, penalized=(5, 6), **options) for seed in range(6)], [VOCAB], IdentityCollectives())
    assert found == alone, "the same bits for any split"


def test_log_probabilities_are_given_only_to_those_that_ask() -> None:
    states = [start_state(0, logprobs=True), start_state(0)]
    first, second = (choice.logprob for choice in sample(make_logits(2, 1), states, [VOCAB], IdentityCollectives()))
    assert first is not None and first < 0 and second is None


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_the_likeliest_tokens_come_with_the_chosen_one(sizes: list[int], sample_split: Callable[..., list[Choice]]) -> None:
    logits = make_logits(3, 5) * 3
    options = {"logprobs": True, "temperature": 0.5, "do_sample": True, "presence_penalty": 2.0}
    found = sample_split(logits, lambda: [start_state(seed, top_logprobs=count, **options) for seed, count in enumerate((0, 1, 5))], sizes)
    expected = torch.log_softmax(logits.double(), dim=1).numpy()
    for row, (choice, count) in enumerate(zip(found, (0, 1, 5), strict=True)):
        best = sorted(range(VOCAB), key=lambda token: (-logits[row, token], token))[:count]
        assert [token for token, _ in choice.top_logprobs] == best
        assert [value for _, value in choice.top_logprobs] == pytest.approx(list(expected[row, best]), rel=1e-5, abs=1e-6)


def test_penalties_count_new_tokens_and_not_those_of_the_prompt() -> None:
    state = SamplingState(SamplingParams(max_new_tokens=9, frequency_penalty=1.5), {0, 1, 2}, RandomNumbers(0))
    logits = torch.tensor([[4.0, 3.0, 0.0]])
    assert [sample(logits, [state], [3], IdentityCollectives())[0].token_id for _ in range(5)] == [0, 1, 0, 1, 0]
    assert state.counts == {0: 3, 1: 2}


def draw_sequence(seed: int, neighbours: int = 0) -> list[int]:
    states = [start_state(seed, do_sample=True, top_k=20), *[start_state(99, do_sample=True, top_k=0) for _ in range(neighbours)]]
    steps = [sample(make_logits(1, step).expand(len(states), -1), states, [VOCAB], IdentityCollectives()) for step in range(20)]
    return [tokens[0][0] for tokens in steps]


def test_a_seed_draws_the_same_tokens_again_whoever_is_beside() -> None:
    assert draw_sequence(5) == draw_sequence(5) == draw_sequence(5, neighbours=2)
    assert draw_sequence(5) != draw_sequence(6)


def test_a_chosen_token_is_penalized_from_then_on() -> None:
    state, logits = start_state(0, repetition_penalty=2.0), torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    assert [sample(logits, [state], [4], IdentityCollectives())[0][0] for _ in range(3)] == [1, 2, 1]
    assert state.penalized == {1, 2}
    assert logits.tolist() == [[1.0, 3.0, 2.0, -1.0]], "the logits stay as they are"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("max_new_tokens", 0, "max_new_tokens is 0, but has to be at least 1"),
        ("temperature", 0.0, "temperature is 0.0, but has to be above 0"),
        ("temperature", float("nan"), "temperature is nan"),
        ("top_k", -1, "top_k is -1, but has to be at least 0"),
        ("top_p", 0.0, "top_p is 0.0, but has to be above 0 and at most 1"),
        ("top_p", 1.1, "top_p is 1.1, but has to be above 0 and at most 1"),
        ("repetition_penalty", 0.0, "repetition_penalty is 0.0, but has to be above 0"),
        ("seed", -1, "seed is -1, but has to be from 0 to 4294967295"),
        ("seed", 2**32, "seed is 4294967296, but has to be from 0 to 4294967295"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_with_its_value(option: str, value: float, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**{"max_new_tokens": 5, option: value})


def restrict(logits: list[float], new: tuple[int, ...] = (), allowed: dict[int, Any] | None = None, **options: Any) -> Any:
    """The choice of a greedy sequence with some new tokens."""
    state = SamplingState(SamplingParams(max_new_tokens=9, **options), set(), RandomNumbers(0), end_ids=frozenset({3}))
    for token in new:
        state.take(token)
    (choice,) = sample(torch.tensor([logits]), [state], [len(logits)], IdentityCollectives(), allowed)
    return choice if choice is None else choice.token_id


def test_restrictions_leave_the_best_of_the_other_tokens() -> None:
    logits = [1.0, 2.0, 3.0, 4.0]
    assert restrict(logits) == 3
    assert restrict(logits, allowed_token_ids=(0, 1)) == 1
    assert restrict(logits, (0,), min_tokens=2) == 2 and restrict(logits, (0, 0), min_tokens=2) == 3
    assert restrict(logits, bad_words=((3,),)) == 2
    assert restrict(logits, (1,), bad_words=((1, 3), (0, 2))) == 2 and restrict(logits, (0, 2), bad_words=((1, 3), (0, 2))) == 3
    mask = np.array([True, True, False, False])
    assert restrict(logits, allowed={0: mask}, grammar="g") == 1
    assert restrict(logits, allowed={0: mask}, grammar="g", logprobs=True) == 1
    assert restrict(logits, allowed={0: mask}, grammar="g", min_tokens=5, bad_words=((1,),)) == 0, "a grammar decides the end"


@pytest.mark.parametrize("logprobs", [False, True])
def test_restrictions_that_exclude_every_token_are_told_from_logits_that_are_not_finite(logprobs: bool) -> None:
    options: dict[str, Any] = {"allowed_token_ids": (0,), "bad_words": ((0,),), "logprobs": logprobs}
    assert restrict([1.0, 2.0], **options) == NO_TOKEN.token_id
    for value in (float("nan"), float("inf")):
        assert restrict([1.0, value], **options) is None
        assert restrict([1.0, value], allowed={0: np.array([True, False])}, grammar="g", logprobs=logprobs) is None


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 0, "top_p": 0.9}, {"top_k": 20}, {"top_k": 20, "top_p": 0.5}], ids=str)
def test_min_p_leaves_tokens_that_are_likely_enough(options: dict[str, Any]) -> None:
    logits = make_logits(1, 7) * 0.7
    probabilities = logits[0].double().softmax(0)
    likely = set(torch.nonzero(probabilities >= 0.2 * probabilities.max()).flatten().tolist())
    found = set()
    for seed in range(300):
        state = start_state(seed, do_sample=True, min_p=0.2, **options)
        found.add(sample(logits, [state], [VOCAB], IdentityCollectives())[0].token_id)
    assert found <= likely
    assert len(likely) > 1 and (found == likely or "top_p" in options)


@pytest.mark.parametrize("fields", [{"min_p": 1.1}, {"min_p": -0.1}, {"min_tokens": 10}, {"min_tokens": -1}])
def test_restrictions_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="has to be"):
        SamplingParams(max_new_tokens=9, **fields)
