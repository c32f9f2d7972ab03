"""The calls that clients of vLLM and OpenAI make, with what vLLM answers: one table, one server of two ranks."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.end_to_end.servers import Server

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Tandem

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.arguments.zone }}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}"
    "<assistant>{{ opening }}{% endif %}"
)
PROMPT = "I love Beijing"
MESSAGES: list[Any] = [{"role": "user", "content": "Where is the tea?"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CLOCK = {
    "type": "object",
    "properties": {"zone": {"enum": ["utc", "cet"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": CLOCK}}]
CALLED = r'<tool_call>\n\{"name": "clock", "arguments": \{"zone": "(utc|cet)"\}\}\n</tool_call>'
HISTORY = [
    *MESSAGES,
    {"role": "assistant", "tool_calls": [{"id": "a1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "utc"}'}}]},
    {"role": "tool", "tool_call_id": "a1", "content": "noon"},
]
RESPONSE_TOOLS = [{"type": "function", "name": "clock", "parameters": CLOCK, "strict": True}]
ANTHROPIC_TOOLS = [{"name": "clock", "description": "The time.", "input_schema": CLOCK}]
Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Call:
    """One call and what its answer has to be."""

    name: str
    check: Check
    path: str = "/v1/completions"
    body: dict[str, Any] | None = None
    events: bool = False
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def sent(self) -> dict[str, Any] | None:
        """The whole body."""
        if self.body is None and not self.fields:
            return None
        plain = {"max_tokens": 8, "temperature": 0}
        defaults: dict[str, dict[str, Any]] = {
            "/v1/completions": {"prompt": PROMPT, **plain},
            "/v1/chat/completions": {"messages": MESSAGES, **plain},
            "/v1/responses": {"input": "Where is the tea?", "max_output_tokens": 60, "temperature": 0},
            "/v1/messages": {"messages": MESSAGES, "max_tokens": 60, "temperature": 0},
        }
        return {**defaults.get(self.path, {}), **(self.body or {}), **self.fields, **({"stream": True} if self.events else {})}


def text(name: str, check: Check, **fields: Any) -> Call:
    """A completion; the check gets the first choice."""
    return Call(name, lambda answer: check(answer["choices"][0]), fields={"n": 1, **fields})


def whole(name: str, check: Check, **fields: Any) -> Call:
    """A completion; the check gets the whole answer."""
    return Call(name, check, fields={"n": 1, **fields})


def chat(name: str, check: Check, **fields: Any) -> Call:
    """A chat completion; the check gets the first choice."""
    return Call(name, lambda answer: check(answer["choices"][0]), "/v1/chat/completions", fields={"n": 1, **fields})


def read_json(content: str) -> bool:
    value = json.loads(content)
    return list(value) == ["name", "age"] and len(value["name"]) <= 5 and 0 <= value["age"] <= 99


def called(message: dict[str, Any]) -> bool:
    """Whether a message holds one call, and no text."""
    (call,) = message["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    return message["content"] is None and call["id"] and call["function"]["name"] == "clock" and arguments["zone"] in ("utc", "cet")


def joined(events: list[dict[str, Any]], *path: str) -> str:
    return "".join((event["choices"][0].get(path[0]) or {}).get(path[1]) or "" for event in events if event["choices"])


def stream_calls(events: list[dict[str, Any]]) -> bool:
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", ())]
    arguments = json.loads("".join(call["function"]["arguments"] for call in calls))
    named = [call for call in calls if "id" in call]
    ended = events[-1]["choices"][0]["finish_reason"]
    return len(named) == 1 and named[0]["function"]["name"] == "clock" and arguments["zone"] in ("utc", "cet") and ended == "tool_calls"


FULL = 200
TABLE: list[Call] = [
    # Completions: prompts.
    text("text", lambda c: c["finish_reason"] in ("length", "stop") and isinstance(c["text"], str)),
    text("token ids", lambda c: c["finish_reason"] == "length", prompt=[1, 60, 61], ignore_eos=True),
    whole("texts", lambda a: [c["index"] for c in a["choices"]] == [0, 1], prompt=[PROMPT, "A llama"]),
    whole("lists of token ids", lambda a: len(a["choices"]) == 2, prompt=[[1, 60], [1, 61, 62]]),
    whole("n", lambda a: [c["index"] for c in a["choices"]] == [0, 1, 2], n=3, temperature=1.0, seed=3),
    whole(
        "best_of",
        lambda a: len(a["choices"]) == 2 and a["usage"]["completion_tokens"] > 16,
        n=2,
        best_of=4,
        temperature=1.0,
        ignore_eos=True,
    ),
    text(
        "truncate_prompt_tokens",
        lambda c: c["prompt_token_ids"] == [9, 9],
        prompt=[7, 9, 9],
        truncate_prompt_tokens=2,
        return_token_ids=True,
    ),
    text("no special tokens", lambda c: c["prompt_token_ids"][0] != 1, add_special_tokens=False, return_token_ids=True),
    # Completions: what is reported.
    text("echo", lambda c: c["text"].startswith(PROMPT), echo=True),
    text(
        "echo with logprobs",
        lambda c: c["logprobs"]["token_logprobs"][0] is None and c["text"] == PROMPT,
        echo=True,
        logprobs=1,
        max_tokens=0,
    ),
    text("logprobs", lambda c: len(c["logprobs"]["top_logprobs"]) == len(c["logprobs"]["tokens"]) > 0, logprobs=2),
    text(
        "prompt_logprobs",
        lambda c: (
            c["prompt_logprobs"][0] is None
            and {"logprob", "rank", "decoded_token"} == set(*map(tuple, [next(iter(c["prompt_logprobs"][1].values()))]))
        ),
        prompt_logprobs=1,
    ),
    text("return_token_ids", lambda c: len(c["token_ids"]) == 8 and c["prompt_token_ids"][0] == 1, return_token_ids=True, ignore_eos=True),
    whole("usage", lambda a: a["usage"]["total_tokens"] == a["usage"]["prompt_tokens"] + 8, ignore_eos=True),
    # Completions: where the answer ends.
    text(
        "stop_token_ids",
        lambda c: c["stop_reason"] == c["token_ids"][-1] == 60,
        stop_token_ids=[60],
        logit_bias={"60": 100},
        return_token_ids=True,
    ),
    text("stop", lambda c: c["finish_reason"] == "stop" and c["stop_reason"] == "b" and c["text"] == "a", stop=["b"], guided_regex="abab"),
    text("stop kept", lambda c: c["text"] == "ab", stop="b", include_stop_str_in_output=True, guided_regex="abab"),
    text("min_tokens", lambda c: len(c["token_ids"]) == 8, min_tokens=8, logit_bias={"2": 100}, return_token_ids=True),
    text(
        "ends at once",
        lambda c: c["token_ids"] == [2] and c["stop_reason"] is None and c["text"] == "",
        logit_bias={"2": 100},
        return_token_ids=True,
    ),
    text("ignore_eos", lambda c: c["finish_reason"] == "length", ignore_eos=True, logit_bias={"2": 100}),
    text("special tokens shown", lambda c: c["text"] == "<s>" * 8, logit_bias={"1": 100}, skip_special_tokens=False),
    text("special tokens hidden", lambda c: c["text"] == "", logit_bias={"1": 100}),
    # Completions: sampling.
    text(
        "allowed_token_ids", lambda c: set(c["token_ids"]) <= {60, 61}, allowed_token_ids=[60, 61], return_token_ids=True, ignore_eos=True
    ),
    text("bad_words", lambda c: "a" not in c["text"], bad_words=["a"], logit_bias={"67": 20}, ignore_eos=True),
    text("logit_bias", lambda c: c["token_ids"] == [60] * 8, logit_bias={"60": 100}, return_token_ids=True),
    text("min_p", lambda c: c["finish_reason"], min_p=0.2, temperature=1.0),
    text("min_p 1 is greedy", lambda c: c["finish_reason"], min_p=1.0, temperature=1.5),
    text("top_k and top_p", lambda c: c["finish_reason"], top_k=5, top_p=0.9, temperature=0.8, seed=1),
    text("top_k of all", lambda c: c["finish_reason"], top_k=-1, temperature=0.8),
    text("penalties", lambda c: c["finish_reason"], frequency_penalty=0.5, presence_penalty=0.5, repetition_penalty=1.1),
    text("priority", lambda c: c["finish_reason"], priority=5),
    text("fields without effect", lambda c: c["finish_reason"], user="me", length_penalty=1.0, use_beam_search=False, suffix=""),
    text("unknown fields", lambda c: c["finish_reason"], chat_id="x", web_search_options={}),
    # Completions: form.
    text("guided_regex", lambda c: re.fullmatch("[0-9]{3}-[a-f]{2}", c["text"]), guided_regex="[0-9]{3}-[a-f]{2}"),
    text("guided_choice", lambda c: c["text"] in ("red", "blue"), guided_choice=["red", "blue"]),
    text("guided_grammar", lambda c: c["text"] in ("(x)", "x"), guided_grammar='root ::= "(x)" | "x"'),
    text(
        "guided_json", lambda c: read_json(c["text"]), guided_json=PERSON, max_tokens=FULL, structured_outputs={"whitespace_pattern": " "}
    ),
    text("regex", lambda c: re.fullmatch("a{2,3}", c["text"]), structured_outputs={"regex": "a{2,3}"}),
    text("choice", lambda c: c["text"] == "only", structured_outputs={"choice": ["only"]}),
    text(
        "json",
        lambda c: read_json(c["text"]),
        structured_outputs={"json": json.dumps(PERSON), "disable_any_whitespace": True},
        max_tokens=FULL,
    ),
    # Completions: streams.
    Call("stream", lambda es: es[-1]["choices"][0]["finish_reason"] and len(es) > 2, events=True, body={}),
    Call(
        "stream with usage",
        lambda es: es[-1]["usage"]["completion_tokens"] and es[-1]["choices"] == [],
        events=True,
        body={"stream_options": {"include_usage": True}},
    ),
    Call("stream of two", lambda es: {e["choices"][0]["index"] for e in es} == {0, 1}, events=True, body={"n": 2}),
    # Chats.
    chat("chat", lambda c: c["message"]["role"] == "assistant" and isinstance(c["message"]["content"], str)),
    chat("parts", lambda c: c["finish_reason"], messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
    chat("developer", lambda c: c["finish_reason"], messages=[{"role": "developer", "content": "Be brief"}, *MESSAGES]),
    chat("max_completion_tokens", lambda c: len(c["token_ids"]) <= 3, max_completion_tokens=3, return_token_ids=True),
    chat("logprobs of a chat", lambda c: len(c["logprobs"]["content"][0]["top_logprobs"]) == 2, logprobs=True, top_logprobs=2),
    chat(
        "json_object",
        lambda c: c["finish_reason"] == "length" or isinstance(json.loads(c["message"]["content"]), dict),
        response_format={"type": "json_object"},
    ),
    chat(
        "json_schema",
        lambda c: read_json(c["message"]["content"]),
        response_format={"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}},
        max_tokens=FULL,
        seed=1,
    ),
    chat(
        "continue_final_message",
        lambda c: c["finish_reason"],
        messages=[*MESSAGES, {"role": "assistant", "content": "It is"}],
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    chat(
        "echo of a message",
        lambda c: c["message"]["content"].startswith("It is"),
        messages=[*MESSAGES, {"role": "assistant", "content": "It is"}],
        echo=True,
    ),
    chat("chat_template_kwargs", lambda c: c["finish_reason"], chat_template_kwargs={"opening": "So"}),
    # Tools.
    chat(
        "tool_choice auto",
        lambda c: called(c["message"]) and c["finish_reason"] == "tool_calls",
        tools=TOOLS,
        guided_regex=CALLED,
        max_tokens=FULL,
    ),
    chat("no call", lambda c: c["message"]["content"] == "tea" and "tool_calls" not in c["message"], tools=TOOLS, guided_choice=["tea"]),
    chat(
        "tool_choice required",
        lambda c: called(c["message"]) and c["finish_reason"] == "tool_calls",
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=FULL,
        seed=2,
    ),
    chat(
        "tool_choice named",
        lambda c: called(c["message"]) and c["finish_reason"] == "stop",
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "clock"}},
        max_tokens=FULL,
    ),
    chat("tool_choice none", lambda c: "tool_calls" not in c["message"], tools=TOOLS, tool_choice="none"),
    chat("a history with tools", lambda c: c["finish_reason"], messages=HISTORY, tools=TOOLS),
    Call(
        "stream of a call", stream_calls, "/v1/chat/completions", {"tools": TOOLS, "guided_regex": CALLED, "max_tokens": FULL}, events=True
    ),
    Call(
        "stream of a chat",
        lambda es: es[0]["choices"][0]["delta"]["role"] == "assistant" and es[-1]["choices"][0]["finish_reason"],
        "/v1/chat/completions",
        {},
        events=True,
    ),
    # The other APIs.
    Call(
        "responses",
        lambda a: a["object"] == "response" and a["output"][0]["content"][0]["type"] == "output_text",
        "/v1/responses",
        {"text": {"format": {"type": "json_schema", "name": "p", "schema": PERSON}}},
    ),
    Call(
        "responses with tools",
        lambda a: json.loads(a["output"][0]["arguments"])["zone"],
        "/v1/responses",
        {"tools": RESPONSE_TOOLS, "tool_choice": {"type": "function", "name": "clock"}},
    ),
    Call(
        "stream of responses",
        lambda es: es[0]["type"] == "response.created" and es[-1]["type"] in ("response.completed", "response.incomplete"),
        "/v1/responses",
        {},
        events=True,
    ),
    Call(
        "messages",
        lambda a: a["type"] == "message" and a["stop_reason"] in ("max_tokens", "end_turn"),
        "/v1/messages",
        {"system": "Be brief."},
    ),
    Call(
        "messages with tools",
        lambda a: a["content"][0]["input"]["zone"] and a["stop_reason"] == "tool_use",
        "/v1/messages",
        {"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "tool", "name": "clock"}},
    ),
    Call(
        "stream of messages",
        lambda es: es[0]["type"] == "message_start" and es[-1]["type"] == "message_stop",
        "/v1/messages",
        {},
        events=True,
    ),
    Call(
        "tokenize",
        lambda a: a["count"] == len(a["tokens"]) == len(a["token_strs"]) and a["max_model_len"] == 2048,
        "/tokenize",
        {"prompt": PROMPT, "return_token_strs": True},
    ),
    Call("tokenize a chat", lambda a: a["tokens"][0] == 1, "/tokenize", {"messages": MESSAGES}),
    Call("detokenize", lambda a: a["prompt"], "/detokenize", {"tokens": [60, 61]}),
    Call("models", lambda a: a["data"][0]["id"] == "tiny", "/v1/models"),
    Call("health", lambda a: a["status"] == "ok", "/health"),
    Call("ping", lambda a: a == b"", "/ping"),
    Call("version", lambda a: a["version"], "/version"),
    Call("metrics", lambda a: b"vllm:generation_tokens_total" in a and b"vllm:prefix_cache_hits_total" in a, "/metrics"),
    Call("openapi", lambda a: "/v1/responses" in a["paths"], "/openapi.json"),
]
REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/completions", {"suffix": "x"}, 400, "suffix is not supported here"),
    ("/v1/completions", {"use_beam_search": True}, 400, "use_beam_search is not supported here"),
    ("/v1/completions", {"guided_json": {"not": {}}}, 400, "the schema, pattern or grammar of the answer cannot be used: Unimpl"),
    ("/v1/completions", {"min_tokens": 9}, 400, "min_tokens is 9, but has to be from 0 to the 8 new tokens asked for"),
    ("/v1/completions", {"allowed_token_ids": [9999]}, 400, "allowed_token_ids names id 9999, but the vocabulary has"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only parts of type 'text'"),
    ("/v1/chat/completions", {"chat_template": "{{ 1 }}"}, 400, "chat_template is not supported here"),
    ("/v1/chat/completions", {"tool_choice": "required"}, 400, "tool_choice 'required' needs tools"),
    ("/v1/responses", {"previous_response_id": "resp_1"}, 400, "previous_response_id is not supported, because nothing is stored"),
    ("/v1/messages", {"messages": [{"role": "system", "content": "x"}]}, 400, "role is 'system', but has to be one of user, assistant"),
    ("/v1/embeddings", {"input": "x"}, 404, "/v1/embeddings is not supported: this server only generates text"),
]


@pytest.fixture(scope="module")
def server(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("table") / "tiny"
    shutil.copytree(checkpoints.float, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    server = Server(tandem, "--checkpoint", folder, "--workers", "2", "--threads-per-rank", "1", "--dtype", "float32")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()


def read_events(content: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in content.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("call", TABLE, ids=lambda call: call.name.replace(" ", "-"))
def test_a_call_is_answered_as_by_vllm(server: Server, call: Call) -> None:
    sent = call.sent
    status, _, answer = server.ask("GET" if sent is None else "POST", call.path, sent)
    assert status == 200, answer
    assert call.check(read_events(answer) if call.events else answer), answer


@pytest.mark.parametrize(("path", "fields", "status", "words"), REFUSED)
def test_a_call_that_cannot_be_answered_is_refused_in_a_sentence(
    server: Server, path: str, fields: dict[str, Any], status: int, words: str
) -> None:
    found, _, answer = server.ask("POST", path, Call("", bool, path, body={}, fields=fields).sent)
    assert (found, words in answer["error"]["message"]) == (status, True), answer


def test_a_limited_answer_continues_after_a_rank_has_died(server: Server) -> None:
    """The grammar's state is rebuilt from the tokens so far. This is the last test of the server: its ranks restart."""
    numbers = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 60, "maxItems": 60}
    body = {"guided_json": numbers, "max_tokens": 500, "temperature": 0.9, "seed": 4}
    whole = server.complete(PROMPT, **body)["choices"][0]
    assert len(json.loads(whole["text"])) == 60
    with server.stream(PROMPT, **body) as events:
        found = [next(events) for _ in range(10)]
        os.kill(server.running.find_ranks()[0], signal.SIGKILL)
        found += events
    assert "restart 1 of" in server.stderr
    assert "".join(event["choices"][0]["text"] for event in found) == whole["text"]


def test_the_table_is_whole() -> None:
    assert len(TABLE) >= 66 and len({call.name for call in TABLE}) == len(TABLE)
