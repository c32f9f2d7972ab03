"""tandem.StructuredOutputsParams and the dictionaries that stand for it: which limit they name, and what is refused."""

import re
from typing import Any

import pytest

from parallel.errors import RequestError
from tandem import SamplingParams, StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"structured_outputs": StructuredOutputsParams()}, {}),
        ({"structured_outputs": {}}, {}),
        ({"structured_outputs": StructuredOutputsParams(regex="a+")}, {"regex": "a+"}),
        ({"structured_outputs": StructuredOutputsParams(choice=("a", "b"))}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        (
            {"guided_decoding": StructuredOutputsParams(json="{}", disable_any_whitespace=True)},
            {"json": "{}", "disable_any_whitespace": True},
        ),
        ({"guided_decoding": {"grammar": 'start: "x"'}}, {"grammar": 'start: "x"'}),
        ({"guided_decoding": {"json_object": True}}, {"json_object": True}),
    ],
    ids=str,
)
def test_one_limit_is_found(options: dict[str, Any], expected: dict[str, Any]) -> None:
    limit = SamplingParams(**options).read_limit()
    assert {name: value for name, value in limit.items() if value is not False} == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structured_outputs": "a+"}, "structured_outputs is a str, but tandem.StructuredOutputsParams or a dictionary is needed"),
        ({"structured_outputs": {"regexp": "a+"}}, "structured_outputs has the field 'regexp', but tandem supports json, regex, "),
        ({"guided_decoding": {"regex": 5}}, "guided_decoding cannot be used: Expected `str"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "only one of json, json_object, regex, choice and grammar"),
        ({"structured_outputs": {"choice": []}}, "choice holds 0 texts"),
        ({"structured_outputs": StructuredOutputsParams(structural_tag="x")}, "structural_tag is not supported"),
        (
            {"structured_outputs": {"regex": "a"}, "guided_decoding": {"regex": "a"}},
            "structured_outputs and guided_decoding exclude each other",
        ),
    ],
    ids=str,
)
def test_what_names_no_limit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        SamplingParams(**options)
