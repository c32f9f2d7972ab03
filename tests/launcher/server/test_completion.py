"""From a request's body to prompts: histories with tools, templates that fail, texts that are too long to be tokenized."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.server.completion import Service
from launcher.server.errors import ServiceError
from launcher.server.inflight_requests import InflightRequests
from launcher.server.metrics import ServeMetrics
from launcher.server.queue import Dispatcher
from parallel.errors import RequestError
from tests.launcher.server.fake_engine import ByteTokenizer, build_chat

CALL = {"id": "a1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "utc"}'}}
HISTORY = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a1", "name": "clock", "content": "noon"},
]
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
CALLS = "{% for c in m.tool_calls %}[{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
WITH_TOOLS = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + CALLS + "{{ m.tool_call_id }}{{ m.name }}\n{% endfor %}"
NEEDS_NONE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is undefined %}"
    + CALLS
    + "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)


Build = Callable[..., Service]


@pytest.fixture
def build() -> Iterator[Build]:
    """Builds services; they and their template processes end with the test."""
    with ExitStack() as services:

        def make(template: str = PLAIN, *, context: int = 512, **options: Any) -> Service:
            job = SimpleNamespace(context_tokens=context, block_size=16, max_batch_size=4, eos_token_ids=(257,))
            served = SimpleNamespace(version="0", name="m", job=job, config=SimpleNamespace(vocab_size=258), num_blocks=100, adapters=())
            dispatcher = Dispatcher(InflightRequests(), ServeMetrics(), max_running=4, max_waiting=100)
            front: Any = SimpleNamespace(served=served, dispatcher=dispatcher)
            service = Service(front, ByteTokenizer(), build_chat(template), 60.0, **options)
            services.callback(service.close)
            return service

        yield make


def render(service: Service, messages: Any) -> str:
    """The text of a conversation, out of the ids that the ranks get."""
    asked = asyncio.run(service.plan_chat(json.dumps({"messages": messages, "max_tokens": 1}).encode()))
    (ids,) = asked.prompts
    return ByteTokenizer().decode(ids)


def test_a_history_with_tools_reaches_the_template_whole(build: Build) -> None:
    text = render(build(WITH_TOOLS), HISTORY)
    assert text == 'user: What time is it?\nassistant: [a1 clock {"zone": "utc"}]\ntool: noona1clock\n'


def test_a_template_that_looks_for_calls_without_a_content_gets_it(build: Build) -> None:
    text = render(build(NEEDS_NONE), HISTORY)
    assert text == 'user: What time is it?\nassistant: [a1 clock {"zone": "utc"}]\ntool: noon\n'


def test_calls_that_a_template_would_drop_are_written_into_the_messages(build: Build) -> None:
    written = '<tool_call>\n{"name": "clock", "arguments": {"zone": "utc"}}\n</tool_call>'
    result = "<tool_response>\nnoon\n</tool_response>"
    assert render(build(), HISTORY) == f"user: What time is it?\nassistant: {written}\nuser: {result}\n"
    assert render(build(), HISTORY[::2]) == "user: What time is it?\ntool: noon\n"


@pytest.mark.parametrize(
    "fault", ["{{ 1 / 0 }}", "{{ messages[0].content | int / 0 }}", "{{ raise_exception('no') }}", "{{ messages.x.y }}"]
)
def test_a_template_that_fails_refuses_the_request(build: Build, fault: str) -> None:
    with pytest.raises(RequestError, match=r"the chat template of .* does not take these messages"):
        render(build(fault), HISTORY[:1])


def test_a_text_that_cannot_fit_is_not_tokenized(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    service, encoded = build(context=100), []
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text, special=True: encoded.append(text) or [65])
    monkeypatch.setattr(ByteTokenizer, "token_bytes", lambda self, token_id: b"x" * (token_id % 5))
    for size in (100, 401):
        for body in ({"prompt": "a" * size}, {"prompt": ["b", "a" * size]}, {"prompt": "é" * (size // 2) + "a" * (size % 2)}):
            plan = service.plan_completion(json.dumps({**body, "max_tokens": 1}).encode())
            if size == 100:
                asyncio.run(plan)
            else:
                with pytest.raises(RequestError, match=r"prompt [01] has 401 bytes, but this model can take at most 400: 100 tokens of"):
                    asyncio.run(plan)
    assert max(len(text.encode()) for text in encoded) == 100


def test_the_first_prompt_that_is_too_long_ends_the_tokenization(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    service, encoded = build(context=100), []
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text, special=True: encoded.append(text) or [65] * len(text) * 2)
    with pytest.raises(RequestError, match="prompt 1 has 120 tokens, but the model's context is 100"):
        asyncio.run(service.plan_completion(json.dumps({"prompt": ["a", "a" * 60, "a" * 61]}).encode()))
    assert [len(text) for text in encoded] == [1, 60]


def test_unknown_fields_are_refused_where_that_was_asked_for(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    body = b'{"prompt":"a","max_tokens":1,"max_tokns":5}'
    strict, lenient = build(strict_fields=True), build()
    with pytest.raises(ServiceError, match=r"^'max_tokns' is not a field of this request; did you mean 'max_tokens'\?$") as refused:
        asyncio.run(strict.plan_completion(body))
    assert refused.value.param == "max_tokns" and capsys.readouterr().err == ""
    for _ in range(2):
        asyncio.run(lenient.plan_completion(body))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: unknown field 'max_tokns' in a request is ignored; did you mean 'max_tokens'?")


def test_log_probabilities_of_prompts_are_limited_in_number(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.server.request_planner.MAX_PROMPT_LOGPROBS", 600)
    service = build()
    for logprobs, length, fits in ((1, 150, True), (1, 151, False), (2, 100, True), (None, 400, True)):
        body = {"prompt": [[65] * length] * 2, "echo": True, "logprobs": logprobs, "max_tokens": 0}
        plan = service.plan_completion(json.dumps(body).encode())
        if fits:
            asked = asyncio.run(plan)
            assert [len(one) for one in asked.scored] == [int(logprobs is not None)] * 2
        else:
            with pytest.raises(RequestError, match="requests 604 log-probabilities of prompts, but the maximum is 600"):
                asyncio.run(plan)
