"""The answers of a batch: whole lines, sorted at the end, kept on a resumption."""

import json
from pathlib import Path

import pytest

from launcher.reporting.batch_results import BatchResults
from parallel.errors import RequestError

IDS = ("a", "b", "c", "d")


def read(path: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line["error"] is None and line["id"].startswith("batch_req_") for line in lines)
    return [(line["custom_id"], line["response"]["status_code"]) for line in lines]


def test_answers_are_there_at_once_and_sorted_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    results = BatchResults(path, IDS, resume=False)
    for custom_id in ("c", "a", "d"):
        results.append(custom_id, 200, {"x": "é"})
    assert [custom_id for custom_id, _ in read(path)] == ["c", "a", "d"]
    results.close()
    assert read(path) == [("a", 200), ("c", 200), ("d", 200)] and results.done == {"a", "c", "d"}


def test_a_resumption_keeps_answers_but_not_failures_of_the_server(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    results = BatchResults(path, IDS, resume=True)
    for custom_id, status in (("a", 200), ("b", 500), ("c", 400)):
        results.append(custom_id, status, {})
    with path.open("a") as file:
        file.write('{"custom_id": "d", "respo')
    again = BatchResults(path, IDS, resume=True)
    assert again.done == {"a", "c"} and read(path) == [("a", 200), ("c", 400)]
    assert BatchResults(path, IDS, resume=False).done == set() and path.read_text() == ""


@pytest.mark.parametrize("line", ["{}", "[]", '{"custom_id": "x", "response": {"status_code": 200}}', "text"])
def test_the_answers_of_another_batch_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RequestError, match="line 1 does not belong to this batch"):
        BatchResults(path, IDS, resume=True)
    assert path.read_text() == line + "\n", "nothing is changed"
