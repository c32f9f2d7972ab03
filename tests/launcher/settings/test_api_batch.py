"""The input of `tandem batch`."""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.settings.api_batch import BatchLine, read_batch
from parallel.errors import RequestError

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "é"}}


def write(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_requests_are_read_in_order_and_empty_lines_skipped(tmp_path: Path) -> None:
    other = {**LINE, "custom_id": "b", "url": "/v1/chat/completions"}
    found = read_batch(write(tmp_path, LINE, "", " ", other))
    assert [(line.custom_id, line.url) for line in found] == [("a", "/v1/completions"), ("b", "/v1/chat/completions")]
    assert isinstance(found[0], BatchLine) and json.loads(found[0].body) == {"prompt": "é"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is not a JSON object"),
        ("[" * 100_000, "line 2 is not JSON"),
        ({**LINE, "custom_id": "a"}, "line 2: custom_id 'a' is also that of line 1"),
        ({**LINE, "custom_id": 5}, "line 2: custom_id is '5', but a text is needed"),
        ({**LINE, "custom_id": "b", "method": "GET"}, "line 2: method is 'GET', but has to be 'POST'"),
        ({**LINE, "custom_id": "b", "url": "/v1/embeddings"}, "line 2: url is '/v1/embeddings', but has to be one of /v1/chat/comp"),
        ({**LINE, "custom_id": "b", "body": "x"}, "line 2: body is missing, or not an object"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_batch(write(tmp_path, LINE, line))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no request"):
        read_batch(write(tmp_path, ""))
