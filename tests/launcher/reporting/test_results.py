"""The file of results: whole lines at any time, in order at the end, and taken up again only by the run that wrote it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.reporting.results import Record, ResultsFile, read_results
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams
from parallel.errors import RequestError

VOCAB_SIZE = 50
PROMPTS = ["tea", "zwei\nZeilen", "茶 \u2028"]
FLOATS = np.frombuffer(np.random.default_rng(0).bytes(4 * 3000), np.float32)
LOGPROBS = tuple(-abs(float(value)) for value in FLOATS[np.isfinite(FLOATS)])


def ask(**options: Any) -> list[Request]:
    params = SamplingParams(**{"max_new_tokens": 3, **options})
    return [Request(index, (1, 10 + index), params) for index in range(len(PROMPTS))]


def record(index: int, **changes: Any) -> Record:
    ended = {"token_ids": (4, 5, 6 + index), "text": f" \r\u2028{index}", "finish_reason": "length"}
    return Record(index=index, prompt=PROMPTS[index], prompt_token_ids=(1, 10 + index), **{**ended, **changes})


def read(path: Path, **options: Any) -> list[Record]:
    return read_results(path, ask(**options), PROMPTS, VOCAB_SIZE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file is going to be, in a folder that is not there yet."""
    return tmp_path / "new" / "results.jsonl"


def test_every_record_is_a_line_on_the_disk_at_once_and_the_end_puts_them_in_order(path: Path) -> None:
    file, order = ResultsFile(path), (2, 0, 1)
    for number, index in enumerate(order, 1):
        file.append(record(index))
        assert path.read_bytes().count(b"\n") == number
        assert read(path) == [record(i) for i in order[:number]]
    file.close()
    assert read(path) == [record(0), record(1), record(2)]
    assert path.read_bytes().splitlines(keepends=True) == [record(i).to_line().encode() for i in range(3)]
    assert list(path.parent.iterdir()) == [path]


def test_every_record_is_handed_to_the_disk_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk: list[str] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: on_disk.append(path.read_text(encoding="utf-8")))
    file = ResultsFile(path)
    file.append(record(1))
    file.append(record(2))
    assert on_disk == [record(1).to_line(), record(1).to_line() + record(2).to_line()]


def test_a_file_goes_on_behind_what_is_there_and_ends_like_an_undisturbed_one(path: Path) -> None:
    ResultsFile(path).append(record(2))
    resumed = ResultsFile(path, read(path), resume=True)
    resumed.begin()
    for index in (1, 0):
        resumed.append(record(index))
    assert [found.index for found in read(path)] == [2, 1, 0]
    resumed.close()
    assert path.read_text() == "".join(record(i).to_line() for i in range(3))


def test_a_run_that_goes_on_where_nothing_was_makes_the_folder(path: Path) -> None:
    ResultsFile(path, read(path), resume=True).append(record(1))
    assert read(path) == [record(1)]


def test_a_run_that_does_not_resume_keeps_the_old_file_until_it_has_something(path: Path) -> None:
    ResultsFile(path).append(record(2))
    new = ResultsFile(path)
    assert read(path) == [record(2)]
    new.append(record(0))
    new.append(record(1))
    assert read(path) == [record(0), record(1)]
    ResultsFile(path).begin()
    assert path.read_bytes() == b"" and read(path) == []


def test_a_file_that_is_in_order_is_not_written_again(path: Path) -> None:
    file = ResultsFile(path)
    file.append(record(0))
    file.append(record(2))
    before = path.stat()
    file.close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_no_file_is_no_results(path: Path) -> None:
    assert read(path) == [] and not path.parent.exists()


@pytest.mark.parametrize(
    "torn", [b"{", record(1).to_line().encode()[:-1], "茶".encode()[:2], bytes(4096), bytes(40) + record(1).to_line().encode()[40:]]
)
def test_a_last_line_that_was_being_written_is_cut_off_the_disk(path: Path, torn: bytes) -> None:
    ResultsFile(path).append(record(2))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert read(path) == [record(2)]
    assert path.read_bytes() == whole
    path.write_bytes(torn)
    assert read(path) == [] and path.read_bytes() == b""


def test_log_probabilities_come_back_bit_for_bit(path: Path) -> None:
    written = record(0, token_ids=(3,) * len(LOGPROBS), logprobs=LOGPROBS)
    ResultsFile(path).append(written)
    (found,) = read(path, max_new_tokens=len(LOGPROBS), logprobs=True)
    assert found == written and found.logprobs is not None
    assert np.array(found.logprobs, np.float32).tobytes() == np.array(LOGPROBS, np.float32).tobytes()
    assert found.to_line() == path.read_text(encoding="utf-8")


def change(**raw: Any) -> Callable[[str], str]:
    return lambda line: json.dumps({**json.loads(line), **raw}) + "\n"


REFUSALS: dict[str, tuple[Callable[[str], str], dict[str, Any], str]] = {
    "no JSON": (lambda line: "{'index': 1}\n", {}, "is not a result of tandem predict; give another --output, or drop --resume"),
    "an empty line": (lambda line: "\n", {}, "is not a result of tandem predict"),
    "no object": (lambda line: "[1]\n", {}, "is not a result of tandem predict"),
    "a field less": (lambda line: line.replace('"text"', '"texts"'), {}, "is not a result of tandem predict"),
    "ids that are none": (change(token_ids=["x"]), {}, "is not a result of tandem predict"),
    "one id": (change(token_ids=4), {}, "is not a result of tandem predict"),
    "endless": (change(index=float("inf")), {}, "is not a result of tandem predict"),
    "too long": (change(logprobs=[10**400]), {}, "is not a result of tandem predict"),
    "no UTF-8": (lambda line: line.replace("zwei", "\udcff"), {}, "is not a result of tandem predict"),
    "unknown prompt": (change(index=3), {}, "it is of prompt 3, but there are 3 prompts; --resume requires the same prompts"),
    "negative prompt": (change(index=-1), {}, "it is of prompt -1, but there are 3 prompts"),
    "twice": (lambda line: record(0).to_line(), {}, "prompt 0 occurs twice; --resume needs the file of one run"),
    "other text": (change(prompt="coffee"), {}, "prompt 1 was 'coffee', but is 'zwei\\nZeilen' now; --resume requires"),
    "other tokenizer": (change(prompt_token_ids=[1, 12]), {}, "prompt 1 had the ids [1, 12], but has [1, 11] now"),
    "no token": (change(token_ids=[]), {}, "prompt 1 ended by length after 0 tokens, but 3 are requested now"),
    "no token but an end": (change(token_ids=[], finish_reason="eos"), {}, "prompt 1 ended by eos after 0 tokens, but 3 are requested now"),
    "fewer": (change(token_ids=[4, 5]), {}, "prompt 1 ended by length after 2 tokens, but 3 are requested now"),
    "more": (change(token_ids=[4] * 4, finish_reason="eos"), {}, "prompt 1 ended by eos after 4 tokens, but 3 are requested now"),
    "eos": (change(finish_reason="eos"), {"ignore_eos": True}, "prompt 1 ended by 'eos', which these options do not do"),
    "other end": (change(finish_reason="stop"), {}, "prompt 1 ended by 'stop', which these options do not do"),
    "large id": (change(token_ids=[4, 50, 5]), {}, "prompt 1 has id 50, but the vocabulary has 50"),
    "small id": (change(token_ids=[4, -1, 5]), {}, "prompt 1 has id -1, but the vocabulary has 50"),
    "log-probabilities": (change(logprobs=[-1.0] * 3), {}, "prompt 1 has 3 log-probabilities of 3 tokens, but no are requested now"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_line_that_cannot_be_of_this_run_is_named_and_the_file_left_alone(path: Path, name: str) -> None:
    alter, options, words = REFUSALS[name]
    file = ResultsFile(path)
    file.append(record(0))
    file.append(record(1))
    assert len(read(path, **options)) == 2, "the good file is read"
    text = record(0).to_line() + alter(record(1).to_line()) + record(2).to_line() + '{"torn'
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RequestError) as refused:
        read(path, **options)
    assert str(refused.value).startswith(f"{path}, line 2") and words in str(refused.value)
    assert path.read_bytes() == text.encode(errors="surrogateescape"), "what is refused is not cut"


@pytest.mark.parametrize(("logprobs", "had"), [(None, "no"), ((-1.0, -2.0), "2")])
def test_log_probabilities_that_are_missing_are_refused(path: Path, logprobs: tuple[float, ...] | None, had: str) -> None:
    whole = record(1, logprobs=(-1.0, -2.0, -3.0))
    path.parent.mkdir()
    path.write_text(whole.to_line())
    assert read(path, logprobs=True) == [whole]
    path.write_text(dataclasses.replace(whole, logprobs=logprobs).to_line())
    with pytest.raises(RequestError, match=f"prompt 1 has {had} log-probabilities of 3 tokens, but 3 are requested now"):
        read(path, logprobs=True)


def test_an_output_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read: it is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_no_line_holds_what_is_no_json(path: Path, value: str) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        record(0, logprobs=(-1.0, float(value.replace("Infinity", "inf")), -2.0)).to_line()
    path.parent.mkdir()
    path.write_text(record(0, logprobs=(-1.0, -1.5, -2.0)).to_line().replace("-1.5", value))
    with pytest.raises(RequestError, match="line 1 is not a result of tandem predict"):
        read(path, logprobs=True)
