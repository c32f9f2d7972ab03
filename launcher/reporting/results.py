"""The file of `--output`: one JSON object a line, appended as prompts are finished, so that a run that is cut short loses no finished one.

Knows records and a file; makes no text of ids, and prints nothing.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.host.atomic_write import write_whole
from model.engine.request import Request
from parallel.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What became of one prompt."""

    index: int
    """Number of the prompt."""
    prompt: str
    """Its text."""
    prompt_token_ids: tuple[int, ...]
    """Its ids."""
    token_ids: tuple[int, ...]
    """The new ids."""
    text: str
    """The continuation."""
    finish_reason: str
    """eos or length."""
    logprobs: tuple[float, ...] | None = None
    """Of the new ids, where asked for."""

    def to_line(self) -> str:
        """The line of the file, with its end."""
        raw: dict[str, Any] = {
            "index": self.index,
            "prompt": self.prompt,
            "prompt_token_ids": self.prompt_token_ids,
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
        }
        if self.logprobs is not None:
            raw["logprobs"] = self.logprobs
        return json.dumps(raw, ensure_ascii=False) + "\n"


class ResultsFile:
    """The file while a run goes on. A run that does not resume starts it anew with its first record, and not before."""

    def __init__(self, path: Path, done: Sequence[Record] = (), *, resume: bool = False) -> None:
        self._path, self._records, self._is_new = path, list(done), not resume

    def begin(self) -> None:
        """Start the file anew at once: a process that is started again must not take an older run's records for this one's."""
        if self._is_new:
            write_whole(self._path, "")
            self._is_new = False

    def append(self, record: Record) -> None:
        """Write one record to the disk."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w" if self._is_new else "a", encoding="utf-8") as file:
            file.write(record.to_line())
            file.flush()
            os.fsync(file.fileno())
        self._is_new = False
        self._records.append(record)

    def close(self) -> None:
        """All prompts are finished: put the records into the order of the prompts."""
        indices = [record.index for record in self._records]
        if indices != sorted(indices):
            self._records.sort(key=lambda record: record.index)
            write_whole(self._path, "".join(record.to_line() for record in self._records))


def read_results(path: Path, requests: Sequence[Request], prompts: Sequence[str], vocab_size: int) -> list[Record]:
    """The records that an earlier run of these requests has left, in the order of the file; none when it left no file.

    A last line that was being written when the run or its machine went down, which has no end or is no JSON, is cut off. Raises
    RequestError for a record that cannot be of these requests.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RequestError(f"--output {path} cannot be read: {error.strerror}") from None
    whole = text[: text.rfind(b"\n") + 1]
    lines = whole.splitlines(keepends=True)
    if lines and not _is_json(lines[-1]):
        whole = whole.removesuffix(lines.pop())
    records: dict[int, Record] = {}
    for number, line in enumerate(lines, 1):
        record = _read_record(line, f"{path}, line {number}", requests, prompts, vocab_size)
        if record.index in records:
            raise RequestError(f"{path}, line {number}: prompt {record.index} is there twice; --resume needs the file of one run")
        records[record.index] = record
    if len(whole) < len(text):
        try:
            os.truncate(path, len(whole))
        except OSError as error:
            raise RequestError(f"the last line of --output {path} is torn, and cannot be cut off: {error.strerror}") from None
    return list(records.values())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _read_record(line: bytes, where: str, requests: Sequence[Request], prompts: Sequence[str], vocab_size: int) -> Record:
    try:
        raw = json.loads(line)
        logprobs = raw.get("logprobs")
        record = Record(
            index=int(raw["index"]),
            prompt=str(raw["prompt"]),
            prompt_token_ids=tuple(map(int, raw["prompt_token_ids"])),
            token_ids=tuple(map(int, raw["token_ids"])),
            text=str(raw["text"]),
            finish_reason=str(raw["finish_reason"]),
            logprobs=None if logprobs is None else tuple(map(float, logprobs)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise RequestError(f"{where} is no result of tandem predict; give another --output, or leave out --resume") from None
    fault = _find_fault(record, requests, prompts, vocab_size)
    if fault is not None:
        raise RequestError(f"{where}: {fault}; --resume goes on with the same prompts and options, else leave it out")
    return record


def _find_fault(record: Record, requests: Sequence[Request], prompts: Sequence[str], vocab_size: int) -> str | None:
    """Why a record cannot be of these requests; None when it can."""
    if not 0 <= record.index < len(requests):
        return f"it is of prompt {record.index}, but there are {len(requests)} prompts"
    request, count = requests[record.index], len(record.token_ids)
    params = request.params
    if record.prompt != prompts[record.index]:
        return f"prompt {record.index} was {record.prompt!r}, but is {prompts[record.index]!r} now"
    if record.prompt_token_ids != request.prompt_ids:
        return f"prompt {record.index} had the ids {list(record.prompt_token_ids)}, but has {list(request.prompt_ids)} now"
    if not 1 <= count <= params.max_new_tokens or (record.finish_reason == "length" and count != params.max_new_tokens):
        return f"prompt {record.index} ended by {record.finish_reason} after {count} tokens, but {params.max_new_tokens} are asked for now"
    if record.finish_reason not in ("eos", "length") or (record.finish_reason == "eos" and params.ignore_eos):
        return f"prompt {record.index} ended by {record.finish_reason!r}, which these options do not do"
    unknown = next((token for token in record.token_ids if not 0 <= token < vocab_size), None)
    if unknown is not None:
        return f"prompt {record.index} has id {unknown}, but the vocabulary has {vocab_size}"
    if (record.logprobs is not None) != params.logprobs or (record.logprobs is not None and len(record.logprobs) != count):
        had = "no" if record.logprobs is None else len(record.logprobs)
        wanted = count if params.logprobs else "no"
        return f"prompt {record.index} has {had} log-probabilities of {count} tokens, but {wanted} are asked for now"
    return None
