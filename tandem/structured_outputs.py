"""`tandem.StructuredOutputsParams`: the form that an answer has to have, with vLLM's names."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from launcher.server.structured_output import StructuredOutputs
from parallel.errors import RequestError


@dataclass(kw_only=True)
class StructuredOutputsParams:
    """One of json, regex, choice, grammar and json_object limits the text of an answer."""

    json: str | dict[str, Any] | None = None
    """JSON schema, as a dictionary or a text."""
    regex: str | None = None
    """Regular expression that matches the whole answer (Rust's syntax, without look-around)."""
    choice: Sequence[str] | None = None
    """Texts, of which the answer is one."""
    grammar: str | None = None
    """Lark or GBNF grammar."""
    json_object: bool | None = None
    """Any JSON object."""
    disable_any_whitespace: bool = False
    """JSON without whitespace between its parts."""
    disable_additional_properties: bool = False
    """JSON objects without properties that the schema does not name."""
    whitespace_pattern: str | None = None
    """Regular expression of the whitespace between the parts of JSON."""
    structural_tag: Any = None
    """Not supported: None only."""


def read_limit(structured_outputs: Any, guided_decoding: Any) -> dict[str, Any]:
    """Return the one limit of two options as fields of StructuredOutputs; empty without one. `guided_decoding` is the older name.

    Raises RequestError for values that cannot be used, and if both are given.
    """
    given = {name: value for name, value in (("structured_outputs", structured_outputs), ("guided_decoding", guided_decoding)) if value}
    if len(given) > 1:
        raise RequestError("structured_outputs and guided_decoding exclude each other: give structured_outputs")
    for name, value in given.items():
        fields = asdict(value) if isinstance(value, StructuredOutputsParams) else value
        if not isinstance(fields, Mapping):
            raise RequestError(f"{name} is a {type(value).__name__}, but tandem.StructuredOutputsParams or a dictionary is needed")
        known = StructuredOutputs.__struct_fields__
        unknown = next((field for field in fields if field not in known), None)
        if unknown is not None:
            raise RequestError(f"{name} has the field {unknown!r}, but tandem supports {', '.join(known)}")
        fields = {field: list(one) if isinstance(one, tuple) else one for field, one in fields.items() if one is not None}
        try:
            limit = msgspec.convert(fields, StructuredOutputs)
        except msgspec.ValidationError as error:
            raise RequestError(f"{name} cannot be used: {error}") from None
        if not limit.is_empty:
            return fields
    return {}
