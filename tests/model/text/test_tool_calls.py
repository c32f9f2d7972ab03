"""Tool calls in the forms of several families, however the text is cut, and what only looks like one."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.text.tool_calls import (
    CALL_LIST,
    FORMATS,
    TOOL_PROMPT,
    CallArguments,
    CallStart,
    ReasoningReader,
    Text,
    ToolCallReader,
    ToolFormat,
    find_format,
    write_call,
)

HERMES, LLAMA, MISTRAL = (FORMATS[name] for name in ("hermes", "llama3_json", "mistral"))
ARGUMENTS = {"city": 'Par}is [x] "q" é \\', "n": [1, {"b": 2}], "name": "x"}
WRITTEN = json.dumps(ARGUMENTS, ensure_ascii=False)
Calls = list[tuple[str, Any]]


def read(form: ToolFormat, text: str, cuts: list[int]) -> tuple[str, Calls]:
    """Content and calls of a text that arrives in parts."""
    reader, parts, start = ToolCallReader(form), [], 0
    for end in [*sorted(cut % (len(text) + 1) for cut in cuts), len(text)]:
        parts += reader.push(text[start:end], is_end=False)
        start = end
    parts += reader.push("", is_end=True)
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallStart):
            calls.append([part.name, ""])
        elif isinstance(part, CallArguments):
            calls[-1][1] += part.text
    assert reader.num_calls == len(calls)
    return "".join(part.text for part in parts if isinstance(part, Text)), [(name, json.loads(text)) for name, text in calls]


F, G = ("f", ARGUMENTS), ("g", {})
CASES: list[tuple[ToolFormat, str, str, Calls]] = [
    (HERMES, f'Sure.\n<tool_call>\n{{"name": "f", "arguments": {WRITTEN}}}\n</tool_call>', "Sure.\n", [F]),
    (HERMES, f"{write_call(*F)}\n{write_call(*G)}", "", [F, G]),
    (HERMES, f'<tool_call>\n{{"arguments": {WRITTEN}, "name": "f"}}\n</tool_call>', "", [F]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_call>', "", [("f", {"a": 1})]),
    (HERMES, '<tool_call>{"name":"g"}</tool_call> Done.', " Done.", [G]),
    (HERMES, "no call <tool", "no call <tool", []),
    (HERMES, "<tool_call>\nnot json\n</tool_call>", "<tool_call>\nnot json\n</tool_call>", []),
    (HERMES, '<tool_call>\n{"a": 1}\n</tool_call>', '<tool_call>\n{"a": 1}\n</tool_call>', []),
    (HERMES, '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    (LLAMA, f'{{"name": "f", "parameters": {WRITTEN}}}', "", [F]),
    (LLAMA, f'<|python_tag|>{{"name": "f", "parameters": {WRITTEN}}}; {{"name": "g", "parameters": {{}}}}', "", [F, G]),
    (LLAMA, '{"type": "function", "function": {"name": "g", "parameters": {}}}', "", [G]),
    (LLAMA, 'Hello {"name"', 'Hello {"name"', []),
    (LLAMA, '{"a": 1} and so', '{"a": 1} and so', []),
    (LLAMA, "[a link](to)", "[a link](to)", []),
    (MISTRAL, f'[TOOL_CALLS] [{{"name": "f", "arguments": {WRITTEN}}}, {{"name": "g", "arguments": {{}}}}]', "", [F, G]),
    (MISTRAL, f"[TOOL_CALLS]f[ARGS]{WRITTEN}[TOOL_CALLS]g{{}}", "", [F, G]),
    (MISTRAL, '[TOOL_CALLS]f[CALL_ID]abc123[ARGS]{"a": 1}', "", [("f", {"a": 1})]),
    (MISTRAL, "Hi [there]", "Hi [there]", []),
    (CALL_LIST, f'[\n  {{"name": "f", "parameters": {WRITTEN}}}, {{"name":"g","parameters":{{}}}} ]', "", [F, G]),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
@given(cuts=st.lists(st.integers(0, 500), max_size=30))
@settings(max_examples=60, deadline=None)
def test_calls_are_read_however_the_text_is_cut(form: ToolFormat, text: str, content: str, calls: Calls, cuts: list[int]) -> None:
    assert read(form, text, cuts) == (content, calls)
    assert read(form, text, list(range(len(text)))) == (content, calls)


@given(text=st.text(alphabet='<>/tool_ca"{}[]:, nameargums\n\\f', max_size=60), cuts=st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=300, deadline=None)
def test_a_text_without_marks_stays_as_it_is(text: str, cuts: list[int]) -> None:
    if "<tool_call>" not in text:
        assert read(HERMES, text, cuts) == (text, [])
        assert "[" in text or read(MISTRAL, text, cuts) == (text, [])


def test_arguments_come_as_they_are_written() -> None:
    reader = ToolCallReader(HERMES)
    assert reader.push('<tool_call>\n{"name": "f", "argum', is_end=False) == []
    assert reader.push('ents": {"a": "x', is_end=False) == [CallStart("f"), CallArguments('{"a": "x')]
    assert reader.push("y", is_end=False) == [CallArguments("y")]
    assert reader.push('"}}\n', is_end=False) == [CallArguments('"}')]


@pytest.mark.parametrize("name", ["hermes", "mistral", "llama3_json"])
def test_a_call_that_is_cut_keeps_what_there_is(name: str) -> None:
    start = {"hermes": '<tool_call>{"name": "f", "arguments": ', "mistral": "[TOOL_CALLS]f", "llama3_json": '{"name": "f", "parameters": '}
    reader = ToolCallReader(FORMATS[name])
    parts = [*reader.push(f'{start[name]}{{"a": 1', is_end=False), *reader.push("", is_end=True)]
    assert parts == [CallStart("f"), CallArguments('{"a": 1')]


@pytest.mark.parametrize(
    ("is_open", "text", "expected"),
    [
        (False, "<think>\na b\n</think>\n\nc", ("a b\n", "c")),
        (True, "a b</think>c", ("a b", "c")),
        (True, "a b", ("a b", "")),
        (False, "no <think> here", ("", "no <think> here")),
        (False, " <thin", ("", " <thin")),
        (True, "a </thi", ("a </thi", "")),
    ],
)
@given(cuts=st.lists(st.integers(0, 40), max_size=30))
@settings(max_examples=40, deadline=None)
def test_reasoning_is_separated(is_open: bool, text: str, expected: tuple[str, str], cuts: list[int]) -> None:
    reader, start, found = ReasoningReader(is_open=is_open), 0, ["", ""]
    for end in [*sorted(cut % (len(text) + 1) for cut in cuts), len(text)]:
        thought, rest = reader.push(text[start:end], is_end=end == len(text) and start < end)
        found, start = [found[0] + thought, found[1] + rest], end
    thought, rest = reader.push("", is_end=True)
    assert (found[0] + thought, found[1] + rest) == expected


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% for tool in tools %}<tool_call>{% endfor %}", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ('Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}', "llama3_json"),
        ("<tool_call><function=name>", None),
        ("{{ messages }}", None),
    ],
)
def test_the_form_is_recognized_by_the_template(template: str, name: str | None) -> None:
    assert find_format(template) == name


def test_the_prompt_for_tools_teaches_a_form_that_is_read() -> None:
    assert find_format(TOOL_PROMPT.format(tools="{}")) == "hermes"
