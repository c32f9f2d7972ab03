"""How tools, reasoning and limits reach the prompt, and how the answer is read."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from launcher.server.api_answers import AnswerReader, CallIds, build_message
from launcher.server.api_requests import ChatRequest
from launcher.server.chat_prompts import ChatPrompt, ChatPrompts
from launcher.server.request_body import BodyReader
from parallel.errors import RequestError
from tests.launcher.server.fake_engine import build_chat

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
HERMES = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}<tool_call>\n" + PLAIN
THINKS = PLAIN + "<think>\n{# </think> #}"
USER = {"role": "user", "content": "Time?"}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


@pytest.fixture
def plan() -> Iterator[Any]:
    """Renders a conversation: (template, fields of the request, parser)."""
    with ExitStack() as stack:

        def run(template: str, parser: str | None = None, **fields: Any) -> ChatPrompt:
            chat = build_chat(template)
            stack.callback(chat.close)
            body = BodyReader(ChatRequest, None).read(json.dumps({"messages": [USER], **fields}).encode())
            return ChatPrompts(chat, parser).build(body)

        yield run


def read(reader: AnswerReader, pieces: Sequence[str]) -> dict[str, Any]:
    """The message that becomes of an answer."""
    parts = [part for number, text in enumerate(pieces) for part in reader.push(text, is_end=number + 1 == len(pieces))]
    return build_message(parts, CallIds(), is_delta=False)


def test_tools_go_through_a_template_that_has_a_place_for_them(plan: Any) -> None:
    prompt = plan(HERMES, tools=TOOLS)
    assert prompt.text.startswith(json.dumps(TOOLS[0]) + "\n") and prompt.text.endswith("user: Time?\nassistant:")
    message = read(prompt.build_reader(), ["Yes.", CALL[:15], CALL[15:]])
    assert message["content"] == "Yes." and message["tool_calls"][0]["function"] == {"name": "clock", "arguments": "{}"}
    assert plan(HERMES, tools=TOOLS, tool_choice="none").text.startswith("<tool_call>"), "tools that may not be called are not shown"


def test_tools_are_described_where_the_template_has_no_place_for_them(plan: Any) -> None:
    prompt = plan(PLAIN, tools=TOOLS)
    assert prompt.text.startswith("system: # Tools\n") and json.dumps(TOOLS[0]) in prompt.text
    merged = plan(PLAIN, tools=TOOLS, messages=[{"role": "system", "content": "Be brief."}, USER])
    assert merged.text.startswith("system: Be brief.\n\n# Tools\n") and merged.text.count("system:") == 1
    assert read(prompt.build_reader(), [CALL])["content"] is None


def test_a_form_that_is_not_known_is_refused_unless_it_is_named_or_enforced(plan: Any) -> None:
    template = "{{ tools }}<function=x>" + PLAIN
    with pytest.raises(RequestError, match="the form in which this model writes tool calls is unknown: start the server with --tool-call-"):
        plan(template, tools=TOOLS)
    assert plan(template, "hermes", tools=TOOLS).tools is not None
    assert plan(template, tools=TOOLS, tool_choice="required").grammar
    assert plan(template, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "clock"}}).named == "clock"
    assert plan(template).tools is None


def test_one_call_is_kept_where_calls_are_not_to_be_parallel(plan: Any) -> None:
    pieces = [f"{CALL}\n{CALL}"]
    assert len(read(plan(HERMES, tools=TOOLS).build_reader(), pieces)["tool_calls"]) == 2
    assert len(read(plan(HERMES, tools=TOOLS, parallel_tool_calls=False).build_reader(), pieces)["tool_calls"]) == 1


def test_reasoning_is_told_from_the_answer(plan: Any) -> None:
    prompt = plan(THINKS)
    assert prompt.text.endswith("<think>\n")
    message = read(prompt.build_reader(), ["It is", " late.</th", "ink>\n\n", "Noon."])
    assert message == {"role": "assistant", "content": "Noon.", "reasoning_content": "It is late."}
    assert read(plan(PLAIN + "{# </think> #}").build_reader(), ["<think>a</think>b"])["reasoning_content"] == "a"
    assert read(plan(PLAIN).build_reader(), ["<think>a</think>b"])["content"] == "<think>a</think>b"


def test_a_limited_answer_has_no_reasoning(plan: Any) -> None:
    prompt = plan(THINKS, guided_choice=["a", "b"])
    assert prompt.text.endswith("<think>\n\n</think>\n\n") and not prompt.thinks and prompt.grammar


@pytest.mark.parametrize(("content", "end"), [("It is", "It is"), (" It is ", " It is "), ("", "")])
def test_the_last_message_is_continued(plan: Any, content: str, end: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    text = plan(PLAIN, messages=messages, continue_final_message=True, add_generation_prompt=False).text
    assert text == f"user: Time?\nassistant: {end}" or content == ""


def test_a_message_that_the_template_changes_cannot_be_continued(plan: Any) -> None:
    messages = [USER, {"role": "assistant", "content": "It is"}]
    with pytest.raises(RequestError, match="continue_final_message: the chat template changes the last message"):
        plan("{{ messages[-1].content | upper }}", messages=messages, continue_final_message=True, add_generation_prompt=False)


def test_variables_of_a_request_reach_the_template(plan: Any) -> None:
    text = plan(
        "{{ reasoning_effort }} {{ enable_thinking }}", chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low"
    ).text
    assert text == "low False"
