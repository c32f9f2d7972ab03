"""vLLM's `speculative_config`: which of tandem's options it stands for."""

import re
from typing import Any

import pytest

from parallel.errors import ConfigError
from tandem.speculative_config import read_speculative_config


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"speculative_config": None, "dtype": "float32"}, {"dtype": "float32"}),
        ({"speculative_config": {"model": "s", "num_speculative_tokens": 3}}, {"draft_model": "s", "draft_tokens": 3}),
        ({"speculative_config": {"model": "s", "method": "draft_model"}}, {"draft_model": "s", "draft_tokens": None}),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}, {"speculate": True}),
        ({"speculate": False, "draft_model": "s"}, {"speculate": False, "draft_model": "s"}),
    ],
    ids=str,
)
def test_it_stands_for_these_options(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_speculative_config(given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"speculative_config": "s"}, "speculative_config is a str, but a dictionary is needed"),
        ({"speculative_config": {}}, "speculative_config has no model"),
        ({"speculative_config": {"model": "s", "quantization": "awq"}}, "has the key 'quantization', but tandem supports model, "),
        ({"speculative_config": {"model": "s", "method": "eagle"}}, "method is 'eagle', but tandem supports draft_model and ngram"),
        ({"speculative_config": {"model": "s", "method": "ngram"}}, "model is 's', but the method ngram needs no model"),
        ({"speculative_config": {"model": "s"}, "draft_model": "t"}, "speculative_config and draft_model are both given"),
    ],
    ids=str,
)
def test_what_it_cannot_mean_here_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_speculative_config(given)
