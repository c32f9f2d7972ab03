"""The file of `--output`: one JSON object a line, appended as prompts are finished, so that a run that is cut short loses no finished one.

Knows records and a file; makes no text of ids, and prints nothing.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from launcher.host.atomic_write import needs_direct_writing, open_direct, write_whole
from launcher.host.file_errors import as_run_failure, describe_os_error
from launcher.host.path_lock import PathInUseError, hold
from model.engine.request import Request
from parallel.errors import RequestError
from parallel.regular_file import MAX_DATA_BYTES, read_bytes


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
    """eos, length or error."""
    logprobs: tuple[float, ...] | None = None
    """Of the new ids, where asked for."""
    error: str | None = None
    """Why it has no further token, where it ended with an error."""

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
        if self.error is not None:
            raw["error"] = self.error
        return json.dumps(raw, ensure_ascii=False, allow_nan=False) + "\n"


class ResultsFile:
    """The file while a run goes on. A run that does not resume starts it anew with its first record, and not before.

    A device, a FIFO or a stream gets each record as it is finished; it has no order to be put into. Methods raise RunError when the
    file cannot be written.
    """

    def __init__(self, path: Path, done: Sequence[Record] = (), *, resume: bool = False) -> None:
        self._path, self._records, self._is_new = path, list(done), not resume
        self._stream: IO[str] | None = None

    def begin(self) -> None:
        """Start the file anew at once: a process that is started again must not take an older run's records for this one's."""
        with as_run_failure(self._path):
            if self._is_new and not needs_direct_writing(self._path):
                write_whole(self._path, "")
                self._is_new = False

    def append(self, record: Record) -> None:
        """Write one record to the disk."""
        with as_run_failure(self._path):
            if self._stream is None and needs_direct_writing(self._path):
                self._stream = open(open_direct(self._path), "w", encoding="utf-8")
            if self._stream is not None:
                self._stream.write(record.to_line())
                self._stream.flush()
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w" if self._is_new else "a", encoding="utf-8") as file:
                file.write(record.to_line())
                file.flush()
                os.fsync(file.fileno())
        self._is_new = False
        self._records.append(record)

    def close(self) -> None:
        """All prompts are finished: put the records into the order of the prompts."""
        with as_run_failure(self._path):
            if self._stream is not None:
                self._stream.close()
                return
            indices = [record.index for record in self._records]
            if indices != sorted(indices):
                self._records.sort(key=lambda record: record.index)
                write_whole(self._path, "".join(record.to_line() for record in self._records))


@contextmanager
def hold_results(path: Path) -> Iterator[None]:
    """Keep other runs from a file of results. Raises RequestError, which names the run that has it."""
    with ExitStack() as stack:
        try:
            if not needs_direct_writing(path):
                stack.enter_context(hold(path))
        except PathInUseError as holder:
            raise RequestError(f"--output {path} is in use by {holder}; give each run another file") from None
        except OSError as error:
            raise RequestError(f"--output cannot be written: {describe_os_error(error, path)}") from None
        yield


def read_results(path: Path, requests: Sequence[Request], prompts: Sequence[str], vocab_size: int) -> list[Record]:
    """The records that an earlier run of these requests has left, in the order of the file; none when it left no file.

    A last line that was being written when the run or its machine went down, which has no end or is no JSON, is cut off; records of
    prompts that ended with an error are taken out, since these prompts run again. Raises RequestError for a record that cannot be of
    these requests.
    """
    try:
        text = read_bytes(path, MAX_DATA_BYTES)
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
    done = [record for record in records.values() if record.finish_reason != "error"]
    try:
        if len(done) < len(records):
            write_whole(path, "".join(record.to_line() for record in done))
        elif len(whole) < len(text):
            os.truncate(path, len(whole))
    except OSError as error:
        raise RequestError(f"--output {path} holds a torn line or errors, and cannot be changed: {error.strerror}") from None
    return done


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
            logprobs=None if logprobs is None else tuple(map(_read_finite, logprobs)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise RequestError(f"{where} is no result of tandem predict; give another --output, or leave out --resume") from None
    fault = _find_fault(record, requests, prompts, vocab_size)
    if fault is not None:
        raise RequestError(f"{where}: {fault}; --resume goes on with the same prompts and options, else leave it out")
    return record


def _read_finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{number} is no JSON")
    return number


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
    if record.finish_reason == "error":
        return None  # it runs again
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
