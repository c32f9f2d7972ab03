"""Messages and tools of a chat request: fields, types, and their form for chat templates."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TOOLS = 128
TOOL_CHOICES = ("none", "auto", "required")


class TextPart(Struct, frozen=True, kw_only=True):
    """One part of a message's content."""

    type: str
    text: str | None = None

    def __post_init__(self) -> None:
        if self.type not in ("text", "input_text", "output_text"):
            raise ValueError(f"type is {self.type[:100]!r}, but only parts of type 'text' are supported")
        if self.text is None:
            raise ValueError("text is missing")


class ToolFunction(Struct, frozen=True, kw_only=True):
    """The function of a tool call in the message history."""

    name: str
    arguments: str | dict[str, Any] = "{}"
    """OpenAI sends JSON in a string; some clients send the object itself."""

    @property
    def values(self) -> dict[str, Any]:
        """The arguments as an object, which templates expect. Raises ValueError."""
        if isinstance(self.arguments, dict):
            return self.arguments
        try:
            values = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ValueError(f"the arguments of a call of {self.name[:100]!r} are not a JSON object")
        return values


class ToolCall(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool call made by the assistant earlier in the conversation."""

    function: ToolFunction
    id: str | None = None
    type: str = "function"

    def __post_init__(self) -> None:
        self.function.values  # noqa: B018 - raises ValueError

    def to_template(self) -> dict[str, Any]:
        """Convert to the form that chat templates expect."""
        call = {"type": self.type, "function": {"name": self.function.name, "arguments": self.function.values}}
        return call if self.id is None else {"id": self.id, **call}


class Message(Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    reasoning_content: str | None = None
    """Reasoning of an earlier answer, for templates that show it."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role is {self.role[:100]!r}, but has to be one of {', '.join(ROLES)}")
        if self.function_call is not None:
            raise ValueError("function_call is not supported: send tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to the role assistant, not to {self.role}")

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text or "" for part in self.content or [])

    def to_template(self) -> dict[str, Any]:
        """Convert to the form that chat templates expect."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.to_template() for call in self.tool_calls]
        optional = ("name", "tool_call_id", "reasoning_content")
        return message | {key: value for key in optional if (value := getattr(self, key)) is not None}


class Function(Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the arguments; any object by default."""
        return self.parameters or {"type": "object", "properties": {}}

    def to_template(self) -> dict[str, Any]:
        """Convert to the form that chat templates expect, without the fields that were not sent."""
        named = (("description", self.description), ("parameters", self.parameters), ("strict", self.strict))
        return {"name": self.name, **{key: value for key, value in named if value is not None}}


class Tool(Struct, frozen=True, kw_only=True):
    """One tool."""

    function: Function
    type: str = "function"

    def __post_init__(self) -> None:
        if self.type != "function":
            raise ValueError(f"type is {self.type[:100]!r}, but only tools of type 'function' are supported")

    def to_template(self) -> dict[str, Any]:
        """Convert to the form that chat templates expect."""
        return {"type": "function", "function": self.function.to_template()}


class NamedFunction(Struct, frozen=True, kw_only=True):
    """The name in a tool choice."""

    name: str


class NamedChoice(Struct, frozen=True, kw_only=True):
    """A tool choice that names a function."""

    function: NamedFunction
    type: str = "function"


def check_tools(tools: Sequence[Tool], choice: str | NamedChoice | None) -> None:
    """Raise ValueError unless tools and tool choice fit together."""
    names = [tool.function.name for tool in tools]
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"tools holds {len(tools)} tools, but the maximum is {MAX_TOOLS}")
    if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
        raise ValueError(f"tools names the function {twice[:100]!r} twice")
    if isinstance(choice, NamedChoice):
        if choice.function.name not in names:
            raise ValueError(f"tool_choice names {choice.function.name[:100]!r}, which is not among the tools")
    elif choice is not None and choice not in TOOL_CHOICES:
        raise ValueError(f"tool_choice is {choice[:100]!r}, but has to be one of {', '.join(TOOL_CHOICES)} or name a function")
    elif choice == "required" and not tools:
        raise ValueError("tool_choice 'required' needs tools")


def schema_of_calls(tools: Sequence[Tool], *, parallel: bool) -> dict[str, Any]:
    """Return the JSON schema of a list of calls, as vLLM asks for with tool_choice 'required'."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "parameters": {"$ref": f"#/$defs/{number}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    # Each schema keeps its own definitions: its references are extended by its place.
    schemas = {str(number): _move(tool.function.schema, f"#/$defs/{number}") for number, tool in enumerate(tools)}
    return {"type": "array", "minItems": 1, **({} if parallel else {"maxItems": 1}), "items": {"anyOf": calls}, "$defs": schemas}


def _move(schema: Any, place: str) -> Any:
    if isinstance(schema, dict):
        moved = {key: _move(value, place) for key, value in schema.items()}
        reference = schema.get("$ref")
        return moved if not isinstance(reference, str) or not reference.startswith("#") else {**moved, "$ref": place + reference[1:]}
    return [_move(one, place) for one in schema] if isinstance(schema, list) else schema
