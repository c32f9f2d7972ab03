"""Fields of a request that limit the form of its text, and their translation to a grammar: OpenAI's `response_format`, vLLM's
`structured_outputs`, and the older `guided_...` fields."""

import json
from typing import Any

from msgspec import Struct

from model.engine.grammar import grammar_of_choices, grammar_of_regex, grammar_of_schema, grammar_of_text, require_grammars
from parallel.errors import RequestError

_MAX_CHOICES = 1000


class JsonSchema(Struct, frozen=True, kw_only=True):
    """OpenAI's description of a schema."""

    name: str = ""
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True, kw_only=True):
    """OpenAI's `response_format`."""

    type: str
    json_schema: JsonSchema | None = None

    def __post_init__(self) -> None:
        if self.type not in ("text", "json_object", "json_schema"):
            raise ValueError(f"type is {self.type[:100]!r}, but has to be one of text, json_object, json_schema")
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema is None):
            raise ValueError("json_schema.schema is missing")


class StructuredOutputs(Struct, frozen=True, kw_only=True):
    """vLLM's `structured_outputs`."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    def __post_init__(self) -> None:
        if self.structural_tag is not None:
            raise ValueError("structural_tag is not supported; send json, regex, choice or grammar")
        kinds = (self.json, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(kind is not None for kind in kinds) > 1:
            raise ValueError("only one of json, json_object, regex, choice and grammar can be used")
        if self.choice is not None and not 1 <= len(self.choice) <= _MAX_CHOICES:
            raise ValueError(f"choice holds {len(self.choice)} texts, but must hold 1 to {_MAX_CHOICES}")

    @property
    def is_empty(self) -> bool:
        """Whether it limits nothing."""
        return self.json is None and self.regex is None and self.choice is None and self.grammar is None and not self.json_object

    def build(self) -> str:
        """Build the grammar. Raises RequestError, also if the library is missing."""
        if self.is_empty:
            return ""
        require_grammars()
        if self.regex is not None:
            return grammar_of_regex(self.regex)
        if self.choice is not None:
            return grammar_of_choices(self.choice)
        if self.grammar is not None:
            return grammar_of_text(self.grammar)
        return self._build_json({"type": "object"} if self.json is None else self.json)

    def _build_json(self, schema: str | dict[str, Any]) -> str:
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"the JSON schema is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise RequestError("the JSON schema has to be an object")
        if self.disable_additional_properties and "additionalProperties" not in schema:
            schema = {**schema, "additionalProperties": False}
        if self.disable_any_whitespace:
            return grammar_of_schema(schema, {"whitespace_flexible": False})
        return grammar_of_schema(schema, {"whitespace_pattern": self.whitespace_pattern} if self.whitespace_pattern else None)


def combine(
    response_format: ResponseFormat | None,
    outputs: StructuredOutputs | None,
    guided: dict[str, Any],
) -> StructuredOutputs:
    """Return the one limit that a request names. `guided`: values of the `guided_...` fields, without their prefix.

    Raises ValueError if there are several.
    """
    found = [] if outputs is None or outputs.is_empty else [outputs]
    if response_format is not None and response_format.type == "json_object":
        found.append(StructuredOutputs(json_object=True))
    elif response_format is not None and response_format.json_schema is not None:
        schema = response_format.json_schema.schema
        found.append(StructuredOutputs(json=schema if isinstance(schema, dict) else json.dumps(schema)))
    older = StructuredOutputs(**guided)
    if not older.is_empty:
        found.append(older)
    if len(found) > 1:
        raise ValueError("response_format, structured_outputs and the guided_ fields exclude each other")
    return found[0] if found else StructuredOutputs()
