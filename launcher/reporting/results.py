"""The `--output` file: one JSON object per line, appended as prompts finish, so that an interrupted run loses no finished prompt."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from launcher.host.atomic_write import atomic_write, needs_direct_writing, open_direct
from launcher.host.file_errors import as_run_failure, describe_os_error
from launcher.host.path_lock import PathInUseError, hold
from model.engine.request import Request
from parallel.errors import RequestError
from parallel.regular_file import MAX_DATA_BYTES, read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The result of one prompt."""

    index: int
    """Index of the prompt."""
    prompt: str
    """Text of the prompt."""
    prompt_token_ids: tuple[int, ...]
    """Token ids of the prompt."""
    token_ids: tuple[int, ...]
    """The new token ids."""
    text: str
    """Text of the continuation."""
    finish_reason: str
    """"eos", "length" or "error"."""
    logprobs: tuple[float, ...] | None = None
    """Log-probabilities of the new tokens, if requested."""
    error: str | None = None
    """Error message, if the prompt ended with an error."""

    def to_line(self) -> str:
        """Format as a line of the file, including the newline."""
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
    """The results file of a running job. Unless it resumes, the first record truncates the file, and nothing before it does.

    Records written to a device, FIFO or stream appear as prompts finish and are not sorted. Methods raise RunError if the file cannot be
    written.
    """

    def __init__(self, path: Path, done: Sequence[Record] = (), *, resume: bool = False) -> None:
        self._path, self._records, self._is_new = path, list(done), not resume
        self._stream: IO[str] | None = None

    def begin(self) -> None:
        """Truncate the file now, so that a restarted process does not mistake an older run's records for its own."""
        with as_run_failure(self._path):
            if self._is_new and not needs_direct_writing(self._path):
                atomic_write(self._path, "")
                self._is_new = False

    def append(self, record: Record) -> None:
        """Append one record and flush it to disk."""
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
        """Finish: sort the records by prompt."""
        with as_run_failure(self._path):
            if self._stream is not None:
                self._stream.close()
                return
            indices = [record.index for record in self._records]
            if indices != sorted(indices):
                self._records.sort(key=lambda record: record.index)
                atomic_write(self._path, "".join(record.to_line() for record in self._records))


@contextmanager
def hold_results(path: Path) -> Iterator[None]:
    """Lock a results file against other runs. Raises RequestError naming the run that holds it."""
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
    """Read the records that an earlier run of these requests wrote, in file order; none if there is no file.

    Truncates an incomplete last line, left when the run or its machine went down, and removes the records of failed prompts, which run
    again. Raises RequestError for a record that does not match these requests.
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
            raise RequestError(f"{path}, line {number}: prompt {record.index} occurs twice; --resume needs the file of one run")
        records[record.index] = record
    done = [record for record in records.values() if record.finish_reason != "error"]
    try:
        if len(done) < len(records):
            atomic_write(path, "".join(record.to_line() for record in done))
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
        raise RequestError(f"{where} is not a result of tandem predict; give another --output, or drop --resume") from None
    fault = _find_fault(record, requests, prompts, vocab_size)
    if fault is not None:
        raise RequestError(f"{where}: {fault}; --resume requires the same prompts and options; otherwise drop it")
    return record


def _read_finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{number} is not valid JSON")
    return number


def _find_fault(record: Record, requests: Sequence[Request], prompts: Sequence[str], vocab_size: int) -> str | None:
    """Return why a record does not match these requests, or None if it does."""
    if not 0 <= record.index < len(requests):
        return f"it is of prompt {record.index}, but there are {len(requests)} prompts"
    request, count = requests[record.index], len(record.token_ids)
    params = request.params
    if record.prompt != prompts[record.index]:
        return f"prompt {record.index} was {record.prompt!r}, but is {prompts[record.index]!r} now"
    if record.prompt_token_ids != request.prompt_ids:
        return f"prompt {record.index} had the ids {list(record.prompt_token_ids)}, but has {list(request.prompt_ids)} now"
    if record.finish_reason == "error":
        return None  # runs again
    if not 1 <= count <= params.max_new_tokens or (record.finish_reason == "length" and count != params.max_new_tokens):
        return f"prompt {record.index} ended by {record.finish_reason} after {count} tokens, but {params.max_new_tokens} are requested now"
    if record.finish_reason not in ("eos", "length") or (record.finish_reason == "eos" and params.ignore_eos):
        return f"prompt {record.index} ended by {record.finish_reason!r}, which these options do not do"
    unknown = next((token for token in record.token_ids if not 0 <= token < vocab_size), None)
    if unknown is not None:
        return f"prompt {record.index} has id {unknown}, but the vocabulary has {vocab_size}"
    if (record.logprobs is not None) != params.logprobs or (record.logprobs is not None and len(record.logprobs) != count):
        had = "no" if record.logprobs is None else len(record.logprobs)
        wanted = count if params.logprobs else "no"
        return f"prompt {record.index} has {had} log-probabilities of {count} tokens, but {wanted} are requested now"
    return None
