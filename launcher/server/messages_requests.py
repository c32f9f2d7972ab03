"""Request bodies of Anthropic's POST /v1/messages, and their translation to a chat request. Text and tools only."""

import json
from typing import Annotated, Any

from msgspec import Meta, Struct

from launcher.server.api_requests import ChatRequest
from launcher.server.chat_messages import Function, Message, NamedChoice, NamedFunction, Tool, ToolCall, ToolFunction

_MAX_INTEGER = 2**31 - 1
_BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


class Block(Struct, frozen=True, kw_only=True):
    """One part of a message's content."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] = {}
    tool_use_id: str | None = None
    content: str | list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        if self.type not in _BLOCKS:
            raise ValueError(f"type is {self.type[:100]!r}, but has to be one of {', '.join(_BLOCKS)}")
        needed = {"text": "text", "tool_use": "name", "tool_result": "tool_use_id"}.get(self.type)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"{needed} is missing in a block of type {self.type}")

    @property
    def result(self) -> str:
        """The text of a tool's result."""
        if not isinstance(self.content, list):
            return self.content or ""
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in self.content):
            raise ValueError("a tool_result may hold only text")
        return "".join(part["text"] for part in self.content)


class AnthropicMessage(Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[Block]

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise ValueError(f"role is {self.role[:100]!r}, but has to be one of user, assistant")

    def to_chat(self) -> list[Message]:
        """Translate to messages of a chat request: results of tools are messages of their own."""
        if isinstance(self.content, str):
            return [Message(role=self.role, content=self.content)]
        results = [
            Message(role="tool", tool_call_id=one.tool_use_id, content=one.result) for one in self.content if one.type == "tool_result"
        ]
        text = "".join(block.text or "" for block in self.content if block.type == "text")
        thought = "".join(block.thinking or "" for block in self.content if block.type == "thinking")
        calls = [
            ToolCall(id=block.id, function=ToolFunction(name=block.name or "", arguments=block.input))
            for block in self.content
            if block.type == "tool_use"
        ]
        if not text and not calls and results:
            return results
        return [*results, Message(role=self.role, content=text, tool_calls=calls or None, reasoning_content=thought or None)]


class AnthropicTool(Struct, frozen=True, kw_only=True):
    """A tool that the model may call."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str = "custom"

    def __post_init__(self) -> None:
        if self.type != "custom":
            raise ValueError(f"type is {self.type[:100]!r}, but only tools of type 'custom' are supported")


class AnthropicChoice(Struct, frozen=True, kw_only=True):
    """Whether and which tools are called."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool = False

    def __post_init__(self) -> None:
        if self.type not in ("auto", "any", "tool", "none"):
            raise ValueError(f"type is {self.type[:100]!r}, but has to be one of auto, any, tool, none")
        if self.type == "tool" and self.name is None:
            raise ValueError("name is missing")

    def to_chat(self) -> str | NamedChoice:
        """Translate to a tool choice of a chat request."""
        if self.type == "tool":
            return NamedChoice(function=NamedFunction(name=self.name or ""))
        return {"any": "required"}.get(self.type, self.type)


class MessagesRequest(Struct, frozen=True, kw_only=True):
    """POST /v1/messages."""

    messages: list[AnthropicMessage]
    max_tokens: Annotated[int, Meta(ge=1, le=_MAX_INTEGER)]
    model: str | None = None
    system: str | list[Block] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] = 1.0
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = 0
    stop_sequences: list[str] = []
    stream: bool = False
    tools: list[AnthropicTool] = []
    tool_choice: AnthropicChoice | None = None
    thinking: dict[str, Any] | None = None
    """Whether the model writes reasoning is up to its template."""

    def to_chat(self) -> ChatRequest:
        """Translate to a chat request. Raises ValueError."""
        system = self.system if isinstance(self.system, str) else "\n".join(block.text or "" for block in self.system or [])
        messages = [Message(role="system", content=system)] if system else []
        choice = self.tool_choice
        return ChatRequest(
            messages=[*messages, *(one for message in self.messages for one in message.to_chat())],
            model=self.model,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
            stream=self.stream,
            tools=[
                Tool(function=Function(name=tool.name, description=tool.description, parameters=tool.input_schema)) for tool in self.tools
            ],
            tool_choice=None if choice is None else choice.to_chat(),
            parallel_tool_calls=choice is None or not choice.disable_parallel_tool_use,
        )


def read_arguments(text: str) -> dict[str, Any]:
    """Read the arguments of a call; empty if they are not a JSON object, because the answer was cut."""
    try:
        values = json.loads(text or "{}")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
