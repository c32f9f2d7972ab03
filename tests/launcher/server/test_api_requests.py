"""What clients may ask of a server, and what it means to the token generator."""

import json
import time
import tracemalloc
from typing import Any

import pytest

from launcher.server.api_requests import MAX_CHOICES, MAX_PROMPTS, MAX_STOP_TOKEN_IDS, MAX_STOPS, ChatRequest, CompletionRequest
from launcher.server.chat_messages import NamedChoice
from launcher.server.errors import ServiceError
from launcher.server.request_body import BodyReader
from model.engine.sampling_params import SamplingParams

COMPLETIONS, CHATS = BodyReader(CompletionRequest, None), BodyReader(ChatRequest, None)

USER = {"role": "user", "content": "hi"}


def ask(**fields: Any) -> CompletionRequest:
    return COMPLETIONS.read(json.dumps({"prompt": "x", **fields}).encode())


def ask_chat(**fields: Any) -> ChatRequest:
    return CHATS.read(json.dumps({"messages": [USER], **fields}).encode())


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
    with pytest.raises(ServiceError):
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


def test_a_top_p_of_nothing_takes_the_likeliest() -> None:
    assert (plan(top_p=0).do_sample, plan(top_p=0).top_p) == (False, 1.0)
    assert (plan(top_p=5e-324).do_sample, plan(top_p=5e-324).top_p) == (True, 5e-324)


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
    with pytest.raises(ServiceError, match="top_logprobs needs logprobs"):
        ask_chat(top_logprobs=2)
    scored = ask(echo=True, logprobs=3, max_tokens=0).plan_sampling(1, 3, prompt_logprobs=3)
    assert [(params.prompt_logprobs, params.top_logprobs) for params in scored] == [(True, 3)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokns": 5}, "did you mean 'max_tokens'"),
        ({"qqqqqq": 5}, "'qqqqqq' is not a field of this request$"),
        ({"messages": [USER]}, "not a field"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 2, "n": 3}, "^best_of is 2, but has to be at least n, which is 3$"),
        ({"best_of": 2, "stream": True}, "^best_of is not available in a stream$"),
        ({"use_beam_search": True}, "use_beam_search is not supported"),
        ({"response_format": {"type": "xml"}}, "type is 'xml', but has to be one of text, json_object, json_schema"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema is missing"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "exclude each other"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "only one of json, json_object, regex, choice and grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structural_tag is not supported"),
        ({"structured_outputs": {"choice": []}}, "choice holds 0 texts"),
        ({"min_p": 1.5}, "^min_p is 1.5, but has to be a number <= 1$"),
        ({"min_tokens": -1}, "^min_tokens is -1, but has to be an integer >= 0$"),
        ({"bad_words": [" "]}, "bad_words takes up to"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs are not available in a stream"),
        ({"max_tokens": -1}, "^max_tokens is -1, but has to be an integer >= 0$"),
        ({"max_tokens": "5"}, '^max_tokens is "5", but has to be an integer$'),
        ({"max_tokens": 2.5}, "^max_tokens is 2.5, but has to be an integer$"),
        ({"n": 0}, "^n is 0, but has to be an integer >= 1$"),
        ({"n": MAX_CHOICES + 1}, "^n is 17, but has to be an integer <= 16$"),
        ({"temperature": -0.1}, "^temperature is -0.1, but has to be a number >= 0$"),
        ({"temperature": "hot"}, '^temperature is "hot", but has to be a number$'),
        ({"temperature": True}, "^temperature is true, but has to be a number$"),
        ({"temperature": 2.1}, "^temperature is 2.1, but has to be a number <= 2$"),
        ({"stream": "yes"}, '^stream is "yes", but has to be true or false$'),
        ({"top_p": -0.1}, "^top_p is -0.1, but has to be a number >= 0$"),
        ({"top_p": 1.1}, "^top_p is 1.1, but has to be a number <= 1$"),
        ({"top_k": -2}, "^top_k is -2, but has to be an integer >= -1$"),
        ({"repetition_penalty": 0}, "^repetition_penalty is 0, but has to be a number >= 0.01$"),
        ({"repetition_penalty": 1e300}, "has to be a number <= 100$"),
        ({"frequency_penalty": 3}, "^frequency_penalty is 3, but has to be a number <= 2$"),
        ({"presence_penalty": -3}, "^presence_penalty is -3, but has to be a number >= -2$"),
        ({"timeout": 0}, "^timeout is 0, but has to be a number > 0$"),
        ({"seed": "x"}, '^seed is "x", but has to be an integer$'),
        ({"model": 5}, "^model is 5, but has to be a string$"),
        ({"stream_options": {"include_usage": 1}}, "^stream_options.include_usage is an integer, but has to be true or false$"),
        ({"stop": ""}, "none of them empty"),
        ({"stop": ["a"] * (MAX_STOPS + 1)}, "stop takes up to"),
        ({"stop": ["a" * 1001]}, "stop takes up to"),
        ({"stop": [1]}, "^stop.0 is an integer, but has to be a string$"),
        ({"logit_bias": {"a": 1}}, "strings of digits"),
        ({"logit_bias": {"-1": 1}}, "strings of digits"),
        ({"logit_bias": {"\u0663": 1}}, "strings of digits"),
        ({"logit_bias": {"9" * 5000: 1}}, "strings of digits"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "up to 300"),
        ({"logit_bias": {"1": 101}}, "^logit_bias.* has to be a number <= 100$"),
        ({"logprobs": 21}, "^logprobs is 21, but has to be an integer <= 20$"),
        ({"logprobs": True}, "^logprobs is true, but has to be an integer$"),
        ({"prompt": ["a", 1]}, "^prompt.1 is an integer, but has to be a string$"),
        ({"prompt": [{}]}, r"^prompt is \[\{\}\], but has to be a string, a list of strings,"),
        ({"prompt": [2**31]}, "^prompt.0 has to be an integer <= 2147483647$"),
    ],
)
def test_what_cannot_be_done_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ServiceError, match=words):
        ask(**fields)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"5", "the body is an integer, but a JSON object is needed"),
        (b"null", "the body is null, but a JSON object"),
        (b"[]", "the body is a list, but a JSON object"),
        (b'"text"', "the body is a string, but a JSON object"),
        (b"", "the body is not JSON"),
        (b'{"prompt": "a"', "the body is not JSON"),
        (b'{"prompt": "a"} x', "the body is not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "the body is not JSON"),
        (b'{"prompt": "a", "temperature": -Infinity}', "the body is not JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature is 1e999: number out of range"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "seed is 9+\\.\\.\\.: integer value out of range"),
        (b'{"prompt": "\\ud800"}', "a lone surrogate"),
        (b'{"prompt": "\xff"}', "the body is not JSON: 'utf-8' codec can't decode byte 0xff in position 12"),
        (b'{"prompt": "a", "\xff": 1}', "the body is not JSON: 'utf-8' codec"),
        (b'{"prompt": "a", "\\ud800": 1}', "a lone surrogate"),
        (b"[" * 90_000, "the body is a list"),
        (b'{"x": ' + b"[" * 90_000, "nested too deeply"),
        (b'{"prompt": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested too deeply"),
    ],
)
def test_a_body_that_is_no_object_is_refused_in_words(body: bytes, words: str) -> None:
    with pytest.raises(ServiceError, match=words) as refused:
        COMPLETIONS.read(body)
    assert refused.value.status == 400 and len(str(refused.value)) < 300


def build_large_body(name: str, size: int) -> bytes:
    """A body of about `size` bytes that asks for much of one thing."""
    start, element, end = LARGE[name]
    if b"%d" in element:
        elements = b"".join(element % i for i in range(100_000, 100_000 + size // (len(element) + 4)))
    else:
        elements = element * (size // len(element))
    return start + elements + end


LARGE = {
    "objects": (b'{"prompt":[', b"{},", b"{}]}"),
    "lists": (b'{"prompt":[', b"[],", b"[]]}"),
    "ids": (b'{"prompt":[', b"1000,", b"1]}"),
    "texts": (b'{"prompt":[', b'"a",', b'"a"]}'),
    "mixed": (b'{"prompt":[', b'"a",', b"1]}"),
    "deep": (b'{"prompt":', b"[", b"]}"),
    "stops": (b'{"prompt":"a","stop":[', b'"a",', b'"a"]}'),
    "biases": (b'{"prompt":"a","logit_bias":{', b'"%d":1,', b'"1":1}}'),
    "fields": (b"{", b'"%d":1,', b'"prompt":"a"}'),
    "one field again and again": (b"{", b'"prompt":"a",', b'"prompt":5}'),
    "a long name": (b'{"prompt":"a","', b"k", b'":1}'),
    "a long number": (b'{"prompt":"a","seed":', b"9", b"}"),
    "an ignored field": (b'{"prompt":"a","metadata":[', b'{"":0},', b"0]}"),
    "tools": (b'{"prompt":"a","tools":[', b"{},", b"{}]}"),
    "messages": (b'{"messages":[', b'{"role":"user"},', b'{"role":"user"}]}'),
    "empty messages": (b'{"messages":[', b"{},", b"{}]}"),
    "parts": (b'{"messages":[{"role":"user","content":[', b'{"type":"text","text":""},', b"{}]}]}"),
    "calls": (b'{"messages":[{"role":"user","tool_calls":[', b'{"function":{"name":""}},', b"{}]}]}"),
    "arguments": (b'{"messages":[{"role":"user","tool_calls":[{"function":{"name":"","arguments":{"":[', b'{"":0},', b"0]}}}]}]}"),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_body_is_read_in_time_and_memory_proportional_to_its_size(name: str) -> None:
    reader: Any = CHATS if b'"messages"' in LARGE[name][0] else COMPLETIONS

    def read(body: bytes) -> None:
        if name == "ids":
            assert len(reader.read(body).prompts[0]) > len(body) // 6, "whether they fit is decided where the context is known"
        elif name == "an ignored field":
            assert reader.read(body).prompts == ["a"]
        else:
            with pytest.raises(ServiceError) as refused:
                reader.read(body)
            assert len(str(refused.value)) < 300

    body = build_large_body(name, 3_900_000)
    started = time.process_time()
    read(body)
    assert time.process_time() - started < 1
    body = build_large_body(name, 300_000)
    tracemalloc.start()
    try:
        read(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50 * len(body)


def test_unknown_fields_are_reported_once_read_and_otherwise_ignored() -> None:
    noted: list[tuple[str, str]] = []
    reader = BodyReader(CompletionRequest, lambda name, hint: noted.append((name, hint)))
    body = {"prompt": "x", "chat_id": {"a": [1]}, "max_tokns": 5, "web_search_options": {}}
    assert reader.read(json.dumps(body).encode()) == ask()
    assert noted == [
        ("chat_id", ""),
        ("max_tokns", "; did you mean 'max_tokens'?"),
        ("web_search_options", "; did you mean 'stream_options'?"),
    ]
    noted.clear()
    assert reader.read(build_large_body("fields", 300_000)).prompts == ["a"]
    assert noted == [("100000", "")], "the names of many fields are not listed"


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("clock", "map")]


def test_tools_are_offered_unless_the_choice_is_none() -> None:
    assert [tool.to_template() for tool in ask_chat(tools=TOOLS).offered_tools] == TOOLS
    assert ask_chat(tools=TOOLS, tool_choice="none").offered_tools == []
    assert ask_chat(tools=TOOLS, tool_choice="auto").forced_choice is None
    assert ask_chat(tools=TOOLS, tool_choice="required").forced_choice == "required"
    named = ask_chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "map"}}).forced_choice
    assert isinstance(named, NamedChoice) and named.function.name == "map"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"type": "function"}]}, r"^tools.0.function is missing$"),
        ({"tools": [{"type": "retrieval", "function": {"name": "a"}}]}, "only tools of type 'function' are supported"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools names the function 'clock' twice"),
        ({"tools": TOOLS * 65}, "tools holds 130 tools, but the maximum is 128"),
        ({"tool_choice": "required"}, "tool_choice 'required' needs tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice is 'any', but has to be one of none, auto, required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "names 'x', which is not among the tools"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "excludes response_format"),
        ({"functions": [{"name": "a"}]}, "functions is not supported"),
        ({"continue_final_message": True}, "continue_final_message needs add_generation_prompt: false"),
    ],
)
def test_tools_that_cannot_be_offered_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ServiceError, match=words):
        ask_chat(**fields)


def test_fields_that_ask_for_nothing_are_taken() -> None:
    request = ask(
        user="someone",
        metadata={"a": "b"},
        store=False,
        suffix=None,
        best_of=None,
        response_format=None,
        seed=None,
        n=None,
    )
    assert request == ask()
    assert ask(response_format={"type": "text"}).form.is_empty and ask(best_of=1).num_choices == 1


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
        {"role": "user", "content": "ab", "name": "someone"},
        {"role": "assistant", "content": ""},
    ]


def test_calls_of_tools_and_their_results_come_as_templates_know_them() -> None:
    call = {"id": "a1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    bare = {"type": "function", "function": {"name": "clock", "arguments": {"zone": ["utc"]}}}
    result = {"role": "tool", "tool_call_id": "a1", "name": "clock", "content": "noon"}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call, bare]}, result]
    assert [message.to_template() for message in ask_chat(messages=messages).messages] == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{**call, "function": {"name": "clock", "arguments": {}}}, bare]},
        result,
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hi",
        [{"content": "a"}],
        [{"role": "function", "content": "a"}],
        [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "a"}}]}],
        [{"role": "assistant", "tool_calls": [{}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1]"}}]}],
        [{"role": "assistant", "function_call": {"name": "a"}}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
    ],
)
def test_other_messages_are_refused(messages: Any) -> None:
    with pytest.raises(ServiceError):
        ask_chat(messages=messages)


def test_ids_end_an_answer_on_both_routes() -> None:
    assert plan(stop_token_ids=[7, 0]).stop_token_ids == (7, 0)
    (params,) = ask_chat(stop_token_ids=[7]).plan_sampling(5, None)
    assert params.stop_token_ids == (7,) and plan().stop_token_ids == plan(stop_token_ids=None).stop_token_ids == ()


@pytest.mark.parametrize("value", [7, ["7"], [7.0], [True], [-1], [[7]], [0] * (MAX_STOP_TOKEN_IDS + 1)])
def test_what_is_no_list_of_ids_is_refused(value: Any) -> None:
    with pytest.raises(ServiceError):
        ask(stop_token_ids=value)
