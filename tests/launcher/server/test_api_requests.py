"""What callers may ask of a server, and what it means to the token generator."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.server.api_requests import MAX_CHOICES, MAX_PROMPTS, MAX_STOPS, ChatRequest, CompletionRequest
from model.engine.sampling import SamplingParams

USER = {"role": "user", "content": "hi"}


def ask(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "x", **fields})


def ask_chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [USER], **fields})


def plan(**fields: Any) -> SamplingParams:
    (params,) = ask(**fields).plan_sampling(5, None)
    return params


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("", [""]),
        ([""], [""]),
    ],
)
def test_prompts_are_texts_or_ids_one_or_several(prompt: Any, expected: list[Any]) -> None:
    assert ask(prompt=prompt).prompts == expected


@pytest.mark.parametrize(
    "prompt", [None, 5, [], ["a", 1], [1, "a"], [True], [1.0], [-1], [[1], "a"], {"a": 1}, ["a"] * (MAX_PROMPTS + 1), [["a"]]]
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ValidationError):
        ask(prompt=prompt)


def test_sampling_is_what_was_asked() -> None:
    params = plan(
        temperature=0.7,
        top_k=9,
        top_p=0.5,
        seed=3,
        repetition_penalty=1.5,
        frequency_penalty=-1,
        presence_penalty=2,
        logit_bias={"7": -3, "12": 100},
        ignore_eos=True,
    )
    assert params == SamplingParams(
        max_new_tokens=5,
        do_sample=True,
        temperature=0.7,
        top_k=9,
        top_p=0.5,
        seed=3,
        repetition_penalty=1.5,
        frequency_penalty=-1,
        presence_penalty=2,
        logit_bias=((7, -3.0), (12, 100.0)),
        ignore_eos=True,
    )


def test_defaults_are_openais() -> None:
    params = plan()
    assert (params.do_sample, params.temperature, params.top_k, params.top_p) == (True, 1.0, 0, 1.0)
    assert {plan().seed for _ in range(8)} != {params.seed}, "no seed: another one each time"
    assert not ask().stream and ask().n == 1 and ask().stops == [] and not ask().includes_usage


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-12, 5e-324])
def test_a_temperature_of_nearly_nothing_takes_the_likeliest(temperature: float) -> None:
    assert not plan(temperature=temperature).do_sample
    assert plan(temperature=1e-3).do_sample


@pytest.mark.parametrize(("top_k", "expected"), [(-1, 0), (0, 0), (1, 1)])
def test_top_k_of_none_means_all(top_k: int, expected: int) -> None:
    assert plan(top_k=top_k).top_k == expected


@pytest.mark.parametrize(("seed", "seeds"), [(5, [5, 6, 7]), (2**32 - 1, [2**32 - 1, 0, 1]), (-1, [2**32 - 1, 0, 1]), (2**70, [0, 1, 2])])
def test_choices_have_seeds_that_follow_on_each_other(seed: int, seeds: list[int]) -> None:
    assert [params.seed for params in ask(seed=seed, n=3).plan_sampling(5, None)] == seeds


def test_log_probabilities_are_asked_for_in_two_ways() -> None:
    assert [(params.logprobs, params.top_logprobs) for params in ask().plan_sampling(5, 0)] == [(True, 0)]
    assert [(params.logprobs, params.top_logprobs) for params in ask().plan_sampling(5, 4)] == [(True, 4)]
    assert ask(logprobs=0).logprobs == 0
    with pytest.raises(ValidationError, match="top_logprobs needs logprobs"):
        ask_chat(top_logprobs=2)
    with pytest.raises(ValidationError, match="echo with logprobs"):
        ask(echo=True, logprobs=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokns": 5}, "did you mean 'max_tokens'"),
        ({"qqqqqq": 5}, "'qqqqqq' is no field of this request$"),
        ({"messages": [USER]}, "no field"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"max_tokens": "5"}, "valid integer"),
        ({"max_tokens": 2.5}, "valid integer"),
        ({"n": 0}, "greater than or equal to 1"),
        ({"n": MAX_CHOICES + 1}, "less than or equal"),
        ({"temperature": -0.1}, "greater than or equal to 0"),
        ({"temperature": float("nan")}, "finite"),
        ({"temperature": 2.1}, "less than or equal to 2"),
        ({"top_p": 0}, "greater than 0"),
        ({"top_p": 1.1}, "less than or equal to 1"),
        ({"top_k": -2}, "greater than or equal to -1"),
        ({"repetition_penalty": 0}, "greater than or equal to 0.01"),
        ({"repetition_penalty": 1e300}, "less than or equal to 100"),
        ({"frequency_penalty": 3}, "less than or equal to 2"),
        ({"presence_penalty": -3}, "greater than or equal to -2"),
        ({"timeout": 0}, "greater than 0"),
        ({"stop": ""}, "none of them empty"),
        ({"stop": ["a"] * (MAX_STOPS + 1)}, "stop takes up to"),
        ({"stop": ["a" * 1001]}, "stop takes up to"),
        ({"stop": [1]}, "valid string"),
        ({"logit_bias": {"a": 1}}, "strings of digits"),
        ({"logit_bias": {"-1": 1}}, "strings of digits"),
        ({"logit_bias": {"\u0663": 1}}, "strings of digits"),
        ({"logit_bias": {"9" * 5000: 1}}, "strings of digits"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "up to 300"),
        ({"logit_bias": {"1": 101}}, "less than or equal to 100"),
        ({"logprobs": 21}, "less than or equal to 20"),
        ({"logprobs": True}, "valid integer"),
    ],
)
def test_what_cannot_be_done_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ask(**fields)
    assert any(re.search(words, error["msg"]) for error in refused.value.errors())


@pytest.mark.parametrize("raw", [5, None, [], "text"])
def test_a_body_that_is_no_object_is_refused_in_words(raw: Any) -> None:
    with pytest.raises(ValidationError, match="a JSON object is needed"):
        CompletionRequest.model_validate(raw)


def test_fields_that_ask_for_nothing_are_taken() -> None:
    request = ask(
        user="someone",
        metadata={"a": "b"},
        store=False,
        suffix=None,
        best_of=1,
        tools=[],
        response_format={"type": "text"},
        seed=None,
        n=None,
    )
    assert request == ask()


@pytest.mark.parametrize(("stop", "stops"), [(None, []), ("a", ["a"]), (["a", "b c"], ["a", "b c"]), ([], [])])
def test_stop_is_one_text_or_several(stop: Any, stops: list[str]) -> None:
    assert ask(stop=stop).stops == stops


def test_usage_of_a_stream_is_asked_for() -> None:
    assert ask(stream=True, stream_options={"include_usage": True, "include_obfuscation": False}).includes_usage
    assert not ask(stream=True, stream_options={}).includes_usage


def test_messages_come_as_templates_know_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "someone"},
        {"role": "assistant", "content": None},
    ]
    assert [message.to_template() for message in ask_chat(messages=messages).messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hi",
        [{"content": "a"}],
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
    ],
)
def test_other_messages_are_refused(messages: Any) -> None:
    with pytest.raises(ValidationError):
        ask_chat(messages=messages)
