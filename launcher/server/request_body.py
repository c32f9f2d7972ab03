"""Strict decoding of request bodies to the types of `launcher/server/api_requests.py`, in time and memory linear in their size.

The body is first split into fields without copying; each field is then decoded by its own type. Decoding stops at the first error. Unknown
fields are skipped without being decoded.
"""

import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Generic, TypeVar, get_type_hints

import msgspec
from msgspec import UNSET, Raw

from launcher.server.api_requests import MAX_BIASES, MAX_PROMPTS, NEUTRAL_FIELDS, Token
from launcher.server.errors import ServiceError

PlannedRequest = TypeVar("PlannedRequest", bound=msgspec.Struct)

_MAX_NAMED_FIELDS = 10_000
"""A body with more colons may have too many fields to list; only the first unknown one is then reported."""
_SHOWN = 60
"""Maximum characters of a value or name shown in an error message."""
_TYPE_NAMES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_PROMPT_FORMS = "a string, a list of strings, a list of token ids or a list of such lists"


class BodyReader(Generic[PlannedRequest]):
    """Decoder for the request bodies of one route."""

    def __init__(self, kind: type[PlannedRequest], note_unknown: Callable[[str, str], None] | None) -> None:
        """`note_unknown` receives the name of an unknown field and a hint; if None, unknown fields are rejected."""
        self._kind, self._note_unknown = kind, note_unknown
        hints = get_type_hints(kind, include_extras=True)
        self._required = [field.name for field in msgspec.structs.fields(kind) if field.required]
        self._decoders = {name: msgspec.json.Decoder(hints[name]) for name in kind.__struct_fields__}
        self._known = (*kind.__struct_fields__, *(name for name in NEUTRAL_FIELDS if name not in kind.__struct_fields__))
        fields: list[tuple[str, Any, Any]] = [(name, Raw | msgspec.UnsetType, UNSET) for name in self._known]
        self._fields = msgspec.json.Decoder(msgspec.defstruct("Fields", fields, gc=False))
        self._only_known_fields = msgspec.json.Decoder(msgspec.defstruct("KnownFields", fields, gc=False, forbid_unknown_fields=True))

    def read(self, body: bytes) -> PlannedRequest:
        """Decode a request. Raises ServiceError naming the first invalid field."""
        fields = self._split(body)
        for name, hint in self._find_unknown(body):
            if self._note_unknown is None:
                raise _refuse(f"{name!r} is not a field of this request{hint}", name)
            self._note_unknown(name, hint)
        self._check_neutral(fields)
        values = {name: self._decode(name, raw) for name, raw in fields.items() if name in self._decoders}
        missing = next((name for name in self._required if name not in values), None)
        if missing is not None:
            raise _refuse(f"{missing} is missing", missing)
        try:
            return self._kind(**values)
        except ValueError as error:
            raise _refuse(str(error), str(error).partition(" ")[0]) from None

    def _split(self, body: bytes) -> dict[str, bytes]:
        """Return the JSON text of each known field that is not null."""
        try:
            body.decode()  # skipped fields must be valid text, too
            fields = self._fields.decode(body)
        except msgspec.ValidationError as error:
            found = _TYPE_NAMES.get(str(error).rpartition("got `")[2].rstrip("`"), "something else")
            raise _refuse(f"the body is {found}, but a JSON object is needed") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            words = ", or holds a lone surrogate" if re.search(rb"\\u[dD][89a-fA-F]", body) else ""
            raise _refuse(f"the body is not JSON{words}: {error}") from None
        except RecursionError:
            raise _refuse("the body is nested too deeply") from None
        raw = {name: bytes(memoryview(value)) for name in self._known if (value := getattr(fields, name)) is not UNSET}
        return {name: text for name, text in raw.items() if text != b"null"}

    def _find_unknown(self, body: bytes) -> list[tuple[str, str]]:
        """Return the name of each unknown field, with a hint."""
        try:
            self._only_known_fields.decode(body)
            return []
        except msgspec.ValidationError as error:
            names = [str(error).partition("`")[2].rpartition("`")[0]]
        if body.count(b":") <= _MAX_NAMED_FIELDS:
            try:
                names = [name for name in msgspec.json.decode(body, type=dict[str, Raw]) if name not in self._known]
            except msgspec.DecodeError:
                raise _refuse("the name of a field holds a lone surrogate, which is not a character") from None
        near = [(name[:_SHOWN], get_close_matches(name[:_SHOWN], self._decoders, 1)) for name in names]
        return [(name, f"; did you mean {found[0]!r}?" if found else "") for name, found in near]

    def _check_neutral(self, fields: dict[str, bytes]) -> None:
        """Raise ServiceError if an unimplemented field has a value that would have an effect."""
        for name, text in fields.items():
            if name in self._decoders or not NEUTRAL_FIELDS[name]:
                continue
            if len(text) > _SHOWN or msgspec.json.decode(text) not in NEUTRAL_FIELDS[name]:
                raise _refuse(f"{name} is not supported here; leave it out", name)

    def _decode(self, name: str, text: bytes) -> Any:
        decoder = self._decoders[name]
        if name == "prompt":
            decoder = _choose_prompt_decoder(text)
        elif name == "logit_bias" and text.count(b":") > MAX_BIASES:
            raise _refuse(f"logit_bias takes up to {MAX_BIASES} token ids, but has {text.count(b':')}", name)
        try:
            return decoder.decode(text)
        except msgspec.ValidationError as error:
            raise _refuse(_explain(name, text, str(error)), name) from None
        except msgspec.DecodeError:
            raise _refuse(f"{name} holds a lone surrogate, which is not a character", name) from None
        except RecursionError:
            raise _refuse(f"{name} is nested too deeply", name) from None


_TEXT, _TEXTS = msgspec.json.Decoder(str), msgspec.json.Decoder(list[str])
_IDS, _LISTS_OF_IDS = msgspec.json.Decoder(list[Token]), msgspec.json.Decoder(list[list[Token]])


def _choose_prompt_decoder(text: bytes) -> msgspec.json.Decoder[Any]:
    """Choose the decoder by the first characters of the prompt. Raises ServiceError for too many prompts, before decoding them."""
    match = re.match(rb'(?:"|\[\s*(["\[\]\d-]))', text)
    if match is None:
        raise _refuse(f"prompt is {_show(text)}, but has to be {_PROMPT_FORMS}", "prompt")
    if match[1] is None:
        return _TEXT
    if match[1] == b'"':
        return _TEXTS
    if match[1] != b"[":
        return _IDS
    count = text.count(b"[") - 1  # lists of integers hold no other brackets
    if count > MAX_PROMPTS:
        raise _refuse(f"prompt holds {count} prompts, but must hold 1 to {MAX_PROMPTS}", "prompt")
    return _LISTS_OF_IDS


def _explain(name: str, text: bytes, error: str) -> str:
    """Turn msgspec's error, such as 'Expected `int`, got `str` - at `$[0].role`', into a sentence."""
    words, _, path = error.partition(" - at `$")
    place = name + re.sub(r"\[(\d+|\.\.\.)\]", r".\1", path.rstrip("`")).replace("....", ".*")
    missing = re.fullmatch(r"Object missing required field `(.*)`", words)
    if missing:
        return f"{place}.{missing[1]} is missing"
    expected = re.fullmatch(r"Expected (.*?)(?:, got `(\w+)`)?", words)
    if expected is None:
        return f"{place}: {words}" if path else f"{place} is {_show(text)}: {words.lower()}"
    needed = re.sub(r"`([^`]*)`", lambda found: _name_types(found[1]), expected[1]).removesuffix(".0")
    got = _TYPE_NAMES.get(expected[2] or "", expected[2])
    found = _show(text) if not path else got
    return f"{place} is {found}, but has to be {needed}" if found else f"{place} has to be {needed}"


def _name_types(types: str) -> str:
    return " or ".join(_TYPE_NAMES.get(one, one) for one in types.split(" | ") if one != "null")


def _show(text: bytes) -> str:
    shown = text[:_SHOWN].decode(errors="replace")
    return shown if len(text) <= _SHOWN else f"{shown}..."


def _refuse(message: str, param: str | None = None) -> ServiceError:
    return ServiceError(400, message, param=param)
