"""Chat templates as programs: Jinja with the environment that transformers 5 provides.

A template is an untrusted program. The sandbox isolates it from Python; protection from endless loops and memory exhaustion requires a
separate process (`launcher/server/template_process.py`).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from parallel.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 8_000_000
"""Maximum length of a rendered text."""
_MAX_MESSAGE = 300
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients pass a message's reasoning; templates read the first, and some the second."""


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, where: str) -> None:
        """`where`: its origin, for messages. Raises CheckpointError when it cannot be compiled."""
        self._where = where
        try:
            self._template = _build_environment().from_string(source)
        except Exception as error:  # besides TemplateError: deep nesting, constants too large to fold
            raise CheckpointError(f"the chat template of {where} is not a valid Jinja template: {_describe(error)}") from None

    def render(self, variables: Mapping[str, Any], max_characters: int = MAX_CHARACTERS) -> str:
        """Render the text. Raises RequestError when the template raises or fails, or when the text exceeds `max_characters`."""
        parts, length = [], 0
        try:
            for part in self._template.generate(**variables):
                length += len(part)
                if length > max_characters:
                    raise RequestError(f"the chat template of {self._where} writes more than {max_characters} characters")
                parts.append(part)
        except RequestError:
            raise
        except Exception as error:  # a program may fail in any way
            raise RequestError(f"the chat template of {self._where} does not take these messages: {_describe(error)}") from None
        return "".join(parts)


def build_variables(
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, Any],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the template's variables as transformers does: fields that are None are omitted, reasoning is set under all of its names.

    `special_tokens`: by role. `more`: variables of this conversation, which override special tokens of the same name.
    """
    chat = [_alias_reasoning({name: value for name, value in message.items() if value is not None}) for message in messages]
    named = {"messages": chat, "tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
    return {**special_tokens, **(more or {}), **named}


def _alias_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[name] for name in _REASONING_FIELDS if name in message), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _build_environment() -> "ImmutableSandboxedEnvironment":
    # Imported here because only a server needs it, and importing takes time.
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationTag(Extension):
        """The tag `{% generation %}`, which marks training targets; here it outputs its body."""

        tags = {"generation"}  # noqa: RUF012 - as in the base class

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Any) -> Any:
            return caller()

    class PlainNamespace(Namespace):
        """A namespace without names that start with an underscore, which give access to Python internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # like Jinja's, so that a template may have an attribute called `self`
            self, values = args[0], dict(*args[1:], **kwargs)
            for name in values:
                _check_name(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=lambda *args, **kwargs: dict(*args, **kwargs),
        namespace=PlainNamespace,
    )
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _describe(error: Exception) -> str:
    """Describe an error in one line."""
    words = "it needs too much memory" if isinstance(error, MemoryError) else " ".join(str(error).split()) or type(error).__name__
    words = words.encode(errors="backslashreplace").decode()
    return words if len(words) <= _MAX_MESSAGE else words[:_MAX_MESSAGE] + "..."
