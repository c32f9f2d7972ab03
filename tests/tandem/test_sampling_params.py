"""tandem.SamplingParams: ranges, refusals, and what the engine receives."""

from typing import Any

import pytest
from msgspec import convert

from model.engine import sampling
from tandem import InputError, SamplingParams


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n is 0, but has to be from 1 to 64"),
        ({"n": None}, "n is None, but a whole number is needed"),
        ({"max_tokens": 0}, "max_tokens is 0, but has to be at least 1"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5, but a whole number is needed"),
        ({"temperature": -0.1}, "temperature is -0.1, but has to be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan, but a number is needed"),
        ({"temperature": "1"}, "temperature is '1', but a number is needed"),
        ({"top_p": 0}, "top_p is 0, but has to be above 0 and at most 1"),
        ({"top_k": -2}, "top_k is -2, but has to be at least 1, or 0 for all"),
        ({"seed": 2**32}, "seed is 4294967296, but has to be from 0 to 4294967295"),
        ({"presence_penalty": 3}, "presence_penalty is 3, but has to be from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, but has to be above 0"),
        ({"logprobs": True}, "logprobs is True, but a whole number is needed"),
        ({"stop": ["a", ""]}, r"stop is \['a', ''\], but texts that are not empty are needed"),
        ({"min_p": 1.5}, "min_p is 1.5, but has to be from 0 to 1"),
        ({"min_tokens": 17}, "min_tokens is 17, but has to be from 0 to max_tokens"),
        ({"bad_words": "no"}, "bad_words is 'no', but a list of texts that are not empty is needed"),
        ({"bad_words": ["no", " "]}, r"bad_words is \['no', ' '\], but a list of texts"),
        ({"structured_outputs": 5}, "structured_outputs is a int, but tandem.StructuredOutputsParams or a dictionary is needed"),
        ({"best_of": 2}, "best_of is 2, but tandem does not support best_of: leave it out"),
        ({"skip_special_tokens": False}, "skip_special_tokens is False, but tandem does not support"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SamplingParams(**options)
    params = SamplingParams()
    for name, value in options.items():
        setattr(params, name, value)
    with pytest.raises(InputError, match=words):
        params.check()


def test_defaults_are_those_of_vllm_and_values_without_effect_are_taken() -> None:
    params = SamplingParams(min_p=0.0, best_of=1, skip_special_tokens=True, top_k=-1)
    assert (params.n, params.max_tokens, params.temperature, params.top_p, params.seed) == (1, 16, 1.0, 1.0, None)
    assert repr(SamplingParams(temperature=0, stop="x")) == "SamplingParams(temperature=0, stop='x')"


def test_every_answer_has_its_own_seed_and_temperature_zero_is_greedy() -> None:
    sampled = [
        convert(one, sampling.SamplingParams)
        for one in SamplingParams(n=3, temperature=0.5, top_k=-1, seed=2**32 - 1, logit_bias={3: 1}, logprobs=0).plan_choices(7)
    ]
    assert [one.seed for one in sampled] == [2**32 - 1, 0, 1]
    assert all(one.do_sample and one.max_new_tokens == 7 and one.top_k == 0 and one.logprobs and not one.top_logprobs for one in sampled)
    assert sampled[0].logit_bias == ((3, 1.0),)
    (greedy,) = (convert(one, sampling.SamplingParams) for one in SamplingParams(temperature=0).plan_choices(1))
    assert not greedy.do_sample and not greedy.logprobs
    seeds = {SamplingParams().plan_choices(1)[0]["seed"] for _ in range(8)}
    assert len(seeds) > 1, "without a seed, answers differ"
