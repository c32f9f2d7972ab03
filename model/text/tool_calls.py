"""Tool calls and reasoning in a model's text, read as it is generated.

Each family of models writes calls in its own form. `ToolFormat` describes one; `AnswerReader` reads all of them. Depends on text only.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_SEPARATORS = " \t\r\n,;"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How a family of models writes tool calls: a JSON object with name and arguments, between marks."""

    opening: tuple[str, ...] = ()
    """Marks before calls."""
    closing: tuple[str, ...] = ()
    """Marks after calls."""
    is_bare: bool = False
    """Whether JSON at the beginning of an answer is a call."""
    names_first: bool = False
    """Whether a name may stand before the object of arguments: `name{...}` or `name[ARGS]{...}`."""


HERMES, LLAMA3, MISTRAL = "hermes", "llama3_json", "mistral"
FORMATS: Mapping[str, ToolFormat] = {
    HERMES: ToolFormat(opening=("<tool_call>",), closing=("</tool_call>",)),
    LLAMA3: ToolFormat(opening=("<|python_tag|>",), is_bare=True),
    MISTRAL: ToolFormat(opening=("[TOOL_CALLS]",), names_first=True),
}
"""By vLLM's names of its parsers. Qwen 2.5 and 3 write Hermes' form."""
CALL_LIST = ToolFormat(is_bare=True)
"""The form that a grammar enforces: a JSON list of calls."""
_TELLTALES = ((MISTRAL, "[TOOL_CALLS]"), (HERMES, "<tool_call>"), (LLAMA3, "<|python_tag|>"), (LLAMA3, '"parameters": dictionary of'))
_FOREIGN = ("<function=", "<arg_key>", "<\uff5ctool", "<|tool_call_begin|>", "<parameter")
"""Marks of forms that are not read."""

TOOL_PROMPT = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""What Qwen's template tells a model about its tools, for templates that tell it nothing."""


def find_format(template: str) -> str | None:
    """Return the name of the form that a chat template teaches its model; None if it is unknown."""
    if any(mark in template for mark in _FOREIGN):
        return None
    return next((name for name, mark in _TELLTALES if mark in template), None)


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Write a call in Hermes' form."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


class Text(NamedTuple):
    """Text of the answer."""

    text: str


class Reasoning(NamedTuple):
    """Text of the reasoning before the answer."""

    text: str


class CallStart(NamedTuple):
    """The beginning of a call."""

    name: str


class CallArguments(NamedTuple):
    """More of the arguments of the last call, as JSON."""

    text: str


AnswerPart = Text | Reasoning | CallStart | CallArguments


class ReasoningReader:
    """Separates the text in `<think>` at the beginning of an answer from the rest."""

    def __init__(self, *, is_open: bool) -> None:
        """`is_open`: whether the prompt ends inside the reasoning."""
        self._held, self._is_open, self._is_over, self._has_text = "", is_open, False, False
        self._is_between = False
        """Whether only line breaks have come after the reasoning."""

    def push(self, text: str, *, is_end: bool) -> tuple[str, str]:
        """Return (reasoning, rest) of the next text."""
        if self._is_over:
            text = text.lstrip("\n") if self._is_between else text
            self._is_between = self._is_between and not text
            return "", text
        self._held += text
        if not self._is_open:
            begun = self._held.lstrip()
            if begun.startswith("<think>"):
                self._held, self._is_open = begun.removeprefix("<think>"), True
            elif not is_end and "<think>".startswith(begun):
                return "", ""
            else:
                self._is_over = True
                return "", self._held
        if not self._has_text:
            self._held = self._held.lstrip("\n")
        before, mark, after = self._held.partition("</think>")
        if mark:
            self._is_over, after = True, after.lstrip("\n")
            self._is_between = not after
            return before, after
        keep = 0 if is_end else count_begun(before, ("</think>",))
        self._held = before[len(before) - keep :]
        self._has_text = self._has_text or len(before) > keep
        return before[: len(before) - keep], ""


def count_begun(text: str, marks: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` with which a mark begins."""
    longest = min(len(text), max((len(mark) for mark in marks), default=1) - 1)
    return next((size for size in range(longest, 0, -1) if any(mark.startswith(text[-size:]) for mark in marks)), 0)


_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAME = re.compile(r"\s*([\w.\-]+)\s*(?:\[CALL_ID\][\w\-]*)?(?:\[ARGS\])?\s*(?=\{)")
_NAME_BEGUN = re.compile(r"\s*[\w.\-]*\s*(?:\[[A-Z_]*\]?[\w\-]*)*\[?[A-Z_]*\s*")
_KEYS = ("arguments", "parameters")


class ToolCallReader:
    """Separates tool calls from the text of one answer.

    Arguments are returned as they arrive. What turns out not to be a call is returned as text.
    """

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
        self._held = ""
        self._raw = ""
        """Text since the last mark, as long as it may turn out not to be a call."""
        self._in_calls = form.is_bare
        self._arguments: _Balance | None = None
        """Position in the arguments of a call, while they are returned."""
        self._tail: _Balance | None = None
        """Position in the object of a call after its arguments."""
        self.num_calls = 0

    def push(self, text: str, *, is_end: bool) -> list[AnswerPart]:
        """Return the parts that the next text completes."""
        self._held += text
        parts: list[AnswerPart] = []
        while self._advance(parts, is_end=is_end):
            pass
        if is_end and self._arguments is None:
            rest = self._raw + self._held
            if rest and (self._raw.strip(_SEPARATORS + "[") or self._held.strip(_SEPARATORS + "[]") or not self.num_calls):
                parts.append(Text(rest))
            self._held = self._raw = ""
        return parts

    def _advance(self, parts: list[AnswerPart], *, is_end: bool) -> bool:
        """Take one step; returns whether another one may follow."""
        if self._arguments is not None:
            return self._read_arguments(parts)
        if self._tail is not None:
            end = self._tail.find_end(self._held)
            self._held = "" if end is None else self._held[end:]
            if end is None:
                return False
            self._tail = None
            return True
        return self._read_calls(parts, is_end=is_end) if self._in_calls else self._read_text(parts, is_end=is_end)

    def _read_text(self, parts: list[AnswerPart], *, is_end: bool) -> bool:
        found = [(place, mark) for mark in self._form.opening if (place := self._held.find(mark)) >= 0]
        if found:
            place, mark = min(found)
            before = self._held[:place]
            if before and not (self.num_calls and before.isspace()):
                parts.append(Text(before))
            self._raw, self._held, self._in_calls = mark, self._held[place + len(mark) :], True
            return True
        keep = 0 if is_end else count_begun(self._held, self._form.opening)
        if self.num_calls and not is_end and self._held[: len(self._held) - keep].isspace():
            return False  # whitespace between calls
        given = self._held[: len(self._held) - keep]
        if given and not (self.num_calls and given.isspace()):
            parts.append(Text(given))
        self._held = self._held[len(given) :]
        return False

    def _read_calls(self, parts: list[AnswerPart], *, is_end: bool) -> bool:
        marks, rest = (*self._form.opening, *self._form.closing), self._held
        while True:
            rest = rest.lstrip(_SEPARATORS)
            if not rest or (not is_end and any(mark.startswith(rest) and mark != rest for mark in marks)):
                return False
            mark = next((mark for mark in marks if rest.startswith(mark)), None)
            if mark is not None or rest[0] not in "[]":
                break
            rest = rest[1:]
        skipped = self._held[: len(self._held) - len(rest)]
        if mark is not None:
            self._raw = mark if mark in self._form.opening else ""
            self._held, self._in_calls = rest[len(mark) :], mark in self._form.opening
            return True
        if rest.startswith("{"):
            return self._read_object(parts, skipped, rest)
        if self._form.names_first and (found := _NAME.match(rest)):
            parts.append(CallStart(found[1]))
            self._begin_arguments(rest[found.end() :])
            return True
        if self._form.names_first and not is_end and _NAME_BEGUN.fullmatch(rest):
            return False
        # This is not a call. After one, an answer in the bare form has only calls.
        parts.append(Text(self._raw + skipped + rest if not self.num_calls else rest))
        self._raw = self._held = ""
        self._in_calls = False
        return False

    def _read_object(self, parts: list[AnswerPart], skipped: str, rest: str) -> bool:
        if head := _HEAD.match(rest):
            parts.append(CallStart(json.loads(head[1], strict=False)))
            self._begin_arguments(rest[head.end() :])
            self._tail = _Balance(depth=1)
            return True
        end = _Balance().find_end(rest)
        if end is None:
            return False
        call = _read_call(rest[:end])
        if call is None:
            parts.append(Text(self._raw + skipped + rest[:end]))
            self._in_calls = False
        else:
            parts += [CallStart(call[0]), CallArguments(call[1])]
            self.num_calls += 1
        self._raw, self._held = "", rest[end:]
        return True

    def _begin_arguments(self, rest: str) -> None:
        self._held, self._raw, self._arguments = rest, "", _Balance()
        self.num_calls += 1

    def _read_arguments(self, parts: list[AnswerPart]) -> bool:
        assert self._arguments is not None
        end = self._arguments.find_end(self._held)
        given = self._held if end is None else self._held[:end]
        if given:
            parts.append(CallArguments(given))
        self._held = self._held[len(given) :]
        if end is None:
            return False
        self._arguments = None
        return True


class _Balance:
    """Finds the end of a JSON object in text that arrives in parts."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._is_escaped = depth, False, False

    def find_end(self, text: str) -> int | None:
        """Return the position after the object's end; None if it is not in this part. Each part is passed once."""
        for place, letter in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif letter == "\\":
                    self._is_escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None


def _read_call(text: str) -> tuple[str, str] | None:
    """Read a complete call whose keys are in any order; arguments may be JSON in a string. Returns name and arguments."""
    try:
        call = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    if isinstance(call.get("function"), dict):
        call = call["function"]
    arguments: Any = next((call[key] for key in _KEYS if call.get(key) is not None), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    name = call.get("name")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)
