"""Request bodies of OpenAI's POST /v1/responses, and their translation to a chat request.

Text and function tools only; nothing is stored.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

from launcher.server.api_requests import MAX_TOP_LOGPROBS, ChatRequest
from launcher.server.chat_messages import Function, Message, NamedChoice, NamedFunction, TextPart, Tool, ToolCall, ToolFunction
from launcher.server.structured_output import JsonSchema, ResponseFormat

_MAX_INTEGER = 2**31 - 1


class InputItem(Struct, frozen=True, kw_only=True):
    """One item of the input: a message, a function call, its result, or earlier reasoning."""

    type: str = "message"
    role: str | None = None
    content: str | list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str = "{}"
    output: str | list[TextPart] | None = None

    def __post_init__(self) -> None:
        if self.type not in ("message", "function_call", "function_call_output", "reasoning"):
            raise ValueError(f"type is {self.type[:100]!r}, but only messages, function calls and their outputs are supported")
        needed = {"message": ("role",), "function_call": ("name", "call_id"), "function_call_output": ("call_id", "output")}
        for name in needed.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing in an item of type {self.type}")


class FunctionTool(Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: str = ""
    type: str = "function"
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        if self.type != "function":
            raise ValueError(f"type is {self.type[:100]!r}, but only tools of type 'function' are supported")
        if not self.name:
            raise ValueError("name is missing")


class FunctionChoice(Struct, frozen=True, kw_only=True):
    """A tool choice that names a function."""

    name: str
    type: str = "function"


class TextFormat(Struct, frozen=True, kw_only=True):
    """The form of the answer's text."""

    type: str = "text"
    name: str = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(Struct, frozen=True, kw_only=True):
    """Options of the answer's text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Struct, frozen=True, kw_only=True):
    """Options of the reasoning."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(Struct, frozen=True, kw_only=True):
    """POST /v1/responses."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=_MAX_INTEGER)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    stream: bool = False
    tools: list[FunctionTool] = []
    tool_choice: str | FunctionChoice | None = None
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] = []
    truncation: str = "disabled"
    background: bool = False
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    metadata: dict[str, Any] = {}
    seed: int | None = None
    """Extension, as in a chat request."""
    top_k: Annotated[int, Meta(ge=-1)] = 0
    """Extension, as in a chat request."""
    timeout: Annotated[float, Meta(gt=0)] | None = None
    """Extension, as in a chat request."""

    def __post_init__(self) -> None:
        for name in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is not supported, because nothing is stored: send the whole conversation as input")
        if self.background:
            raise ValueError("background is not supported: stream the answer instead")
        if self.truncation not in ("disabled", "auto"):
            raise ValueError(f"truncation is {self.truncation[:100]!r}, but has to be auto or disabled")
        if self.truncation == "auto":
            raise ValueError("truncation 'auto' is not supported: shorten the input")

    @property
    def with_logprobs(self) -> bool:
        """Whether log-probabilities are reported."""
        return self.top_logprobs is not None or "message.output_text.logprobs" in self.include

    def to_chat(self) -> ChatRequest:
        """Translate to a chat request. Raises ValueError."""
        form = self.text.format if self.text is not None else None
        response_format = None
        if form is not None and form.type != "text":
            schema = JsonSchema(name=form.name, schema=form.schema) if form.schema is not None else None
            response_format = ResponseFormat(type=form.type, json_schema=schema)
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            named: str | NamedChoice | None = NamedChoice(function=NamedFunction(name=choice.name))
        else:
            named = choice
        return ChatRequest(
            messages=self._list_messages(),
            model=self.model,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stream=self.stream,
            tools=[
                Tool(function=Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict))
                for tool in self.tools
            ],
            tool_choice=named,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=response_format,
            reasoning_effort=self.reasoning.effort if self.reasoning is not None else None,
            logprobs=self.with_logprobs,
            top_logprobs=self.top_logprobs,
            timeout=self.timeout,
        )

    def _list_messages(self) -> list[Message]:
        messages = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, Message(role="user", content=self.input)]
        calls: list[ToolCall] = []  # calls that follow one another belong to one message
        for item in self.input:
            if item.type == "function_call":
                calls.append(ToolCall(id=item.call_id, function=ToolFunction(name=item.name or "", arguments=item.arguments)))
                continue
            if calls:
                messages.append(Message(role="assistant", tool_calls=calls))
                calls = []
            if item.type == "function_call_output":
                messages.append(Message(role="tool", tool_call_id=item.call_id, content=item.output))
            elif item.type == "message":
                messages.append(Message(role=item.role or "", content=_read_content(item.content)))
        return [*messages, *([Message(role="assistant", tool_calls=calls)] if calls else [])]


def _read_content(content: Any) -> str | list[TextPart] | None:
    if not isinstance(content, list):
        return content  # type: ignore[no-any-return]
    return [TextPart(type=str(part.get("type", "")), text=part.get("text")) for part in content]
