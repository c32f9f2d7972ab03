"""Prompts of chat requests: messages and tools through the chat template, and how the answer is to be read.

A template that does not show tools to the model gets them as text of the system message, and earlier calls as text of their messages.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launcher.server.api_answers import AnswerReader
from launcher.server.api_requests import ChatRequest
from launcher.server.chat_messages import NamedChoice, schema_of_calls
from launcher.server.chat_rendering import ChatRenderer
from model.engine.grammar import grammar_of_schema, require_grammars
from model.text.tool_calls import CALL_LIST, FORMATS, HERMES, MISTRAL, TOOL_PROMPT, ReasoningReader, ToolFormat, find_format, write_call
from parallel.errors import RequestError

_THINK, _END_OF_THOUGHT = "<think>", "</think>"
_EMPTY_THOUGHT = "\n</think>\n\n"

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """One rendered conversation."""

    text: str
    grammar: str
    """The grammar that the answer has to match, or nothing."""
    tools: ToolFormat | None
    """The form of tool calls in the answer."""
    named: str | None
    """The function whose arguments are the answer."""
    thinks: bool
    """Whether the model may write its reasoning first."""
    max_calls: int | None
    """Maximum number of calls in the answer."""
    short_ids: bool
    """Whether ids of calls have Mistral's form."""

    def build_reader(self) -> AnswerReader:
        """Return a reader for one answer."""
        is_open = self.text.rstrip().endswith(_THINK)
        return AnswerReader(
            reasoning=ReasoningReader(is_open=is_open) if self.thinks else None,
            tools=self.tools,
            named=self.named,
            max_calls=self.max_calls,
        )

    @property
    def marks(self) -> frozenset[str]:
        """Texts of special tokens that the reader needs."""
        tools = self.tools or ToolFormat()
        return frozenset((*tools.opening, *tools.closing, *((_THINK, _END_OF_THOUGHT) if self.thinks else ())))


class ChatPrompts:
    """Renders the conversations of one server."""

    def __init__(self, chat: ChatRenderer, tool_call_parser: str | None = None) -> None:
        """`tool_call_parser`: a name in `FORMATS`; None chooses by the template."""
        self._chat, self._parser = chat, tool_call_parser

    def build(self, body: ChatRequest) -> ChatPrompt:
        """Render a conversation. Raises RequestError if the template rejects it, or if tool calls could not be read."""
        tools = [tool.to_template() for tool in body.offered_tools]
        source = self._chat.read_source(with_tools=bool(tools))
        shows_tools = re.search(r"\btools\b", source) is not None
        name = self._parser or find_format(source) or (None if shows_tools else HERMES)
        call, reads, named = None, None, None
        if isinstance(body.forced_choice, NamedChoice):
            named = body.forced_choice.function.name
            call = next(tool.function.schema for tool in body.tools if tool.function.name == named)
        elif body.forced_choice:
            call, reads = schema_of_calls(body.tools, parallel=body.parallel_tool_calls), CALL_LIST
        elif tools:
            if name is None:
                raise RequestError(
                    "the form in which this model writes tool calls is unknown: start the server with --tool-call-parser, "
                    "or send tool_choice 'required' or a named function"
                )
            reads = FORMATS[name]
        text = self._render(body, tools, shows_tools=shows_tools)
        grammar = body.form.build() if call is None else _build_call_grammar(call)
        thinks = _END_OF_THOUGHT in source
        if thinks and grammar:
            thinks = False  # a grammar begins with the first token, so the reasoning is left out
            text += _EMPTY_THOUGHT if text.rstrip().endswith(_THINK) else ""
        return ChatPrompt(
            text=text,
            grammar=grammar,
            tools=reads,
            named=named,
            thinks=thinks,
            max_calls=None if body.parallel_tool_calls else 1,
            short_ids=name == MISTRAL,
        )

    def _render(self, body: ChatRequest, tools: Messages, *, shows_tools: bool) -> str:
        sent = [message.to_template() for message in body.messages]
        if tools and not shows_tools:
            sent, tools = _describe_tools(sent, tools), []
        text = self.render(body, sent, tools)
        if any("tool_calls" in message for message in sent) and self.render(body, _drop_tool_calls(sent), tools) == text:
            sent, text = self._render_calls(body, sent, tools)
        return _cut_after(text, body.messages[-1].text) if body.continue_final_message else text

    def _render_calls(self, body: ChatRequest, sent: Messages, tools: Messages) -> tuple[Messages, str]:
        """Render a conversation whose calls the template drops from messages with a content."""
        # Some templates look for tool calls only if the content is null; most others fail on null.
        nulls = [{**message, "content": message["content"] or None} if "tool_calls" in message else message for message in sent]
        with suppress(RequestError):
            text = self.render(body, nulls, tools)
            if self.render(body, _drop_tool_calls(nulls), tools) != text:
                return nulls, text
        written = _write_calls(sent)
        return written, self.render(body, written, tools)

    def render(self, body: ChatRequest, messages: Messages, tools: Messages) -> str:
        """Render messages with the request's template variables."""
        effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
        more = {**effort, **body.chat_template_kwargs}
        return self._chat.render(messages, tools or None, body.documents, more, add_generation_prompt=body.add_generation_prompt)


def _build_call_grammar(schema: dict[str, Any]) -> str:
    """Return the grammar of a tool call, written as json.dumps does: its spaces say nothing."""
    require_grammars()
    return grammar_of_schema(schema, {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "})


def _cut_after(text: str, content: str) -> str:
    """Cut a rendered conversation after the content of its last message, as transformers does."""
    place = text.rfind(content.strip())
    if place < 0:
        raise RequestError("continue_final_message: the chat template changes the last message, so it cannot be continued")
    has_end = text[place : place + len(content.lstrip())] == content.lstrip()
    return text[: place + len(content.lstrip() if has_end else content.strip())]


def _drop_tool_calls(messages: Sequence[dict[str, Any]]) -> Messages:
    return [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]


def _describe_tools(messages: Messages, tools: Messages) -> Messages:
    """Describe the tools in the system message."""
    words = TOOL_PROMPT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def _write_calls(messages: Messages) -> Messages:
    """Write calls and their results into the contents of messages, in Hermes' form."""
    written: Messages = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if written and written[-1].get("is_result"):
                written[-1]["content"] += f"\n{result}"
            else:
                written.append({"role": "user", "content": result, "is_result": True})
        elif calls := message.get("tool_calls"):
            texts = [write_call(call["function"]["name"], call["function"]["arguments"]) for call in calls]
            content = "\n".join([message["content"], *texts] if message["content"] else texts)
            written.append({**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content})
        else:
            written.append(message)
    return [{key: value for key, value in message.items() if key != "is_result"} for message in written]
