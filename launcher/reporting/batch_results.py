"""The `--output` file of `tandem batch`: one answer per line in OpenAI's batch format, appended as requests finish."""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.host.atomic_write import atomic_write
from launcher.host.file_errors import as_run_failure
from parallel.errors import RequestError
from parallel.regular_file import MAX_DATA_BYTES, read_bytes

_FIRST_SERVER_ERROR = 500


class BatchResults:
    """The answers of one batch. Methods raise RunError if the file cannot be written."""

    def __init__(self, path: Path, custom_ids: Sequence[str], *, resume: bool) -> None:
        """Read the answers of an interrupted run, or begin an empty file. Raises RequestError for a file of another batch.

        An incomplete last line is dropped, and requests that failed on the server's side are answered again.
        """
        self._path, self._places = path, {custom_id: place for place, custom_id in enumerate(custom_ids)}
        kept = self._read() if resume else {}
        self.done = set(kept)
        """Ids of the requests that are answered."""
        with as_run_failure(path):
            atomic_write(path, "".join(kept.values()))

    def append(self, custom_id: str, status: int, body: Mapping[str, Any]) -> None:
        """Append one answer and flush it to disk."""
        response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
        line = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}
        with as_run_failure(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.add(custom_id)

    def close(self) -> None:
        """Sort the answers by request."""
        with as_run_failure(self._path):
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            places = [self._places[json.loads(line)["custom_id"]] for line in lines]
            if places != sorted(places):
                atomic_write(self._path, "".join(line for _, line in sorted(zip(places, lines, strict=True))))

    def _read(self) -> dict[str, str]:
        try:
            text = read_bytes(self._path, MAX_DATA_BYTES)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RequestError(f"--output {self._path} cannot be read: {error.strerror}") from None
        kept: dict[str, str] = {}
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(keepends=True), 1):
            try:
                answer = json.loads(line)
                custom_id, status = answer["custom_id"], int(answer["response"]["status_code"])
                place = self._places.get(custom_id)
            except (ValueError, KeyError, TypeError):
                place, custom_id, status = None, "", 0
            if place is None:
                raise RequestError(f"{self._path}, line {number} does not belong to this batch; give another --output, or drop --resume")
            if status < _FIRST_SERVER_ERROR:
                kept[custom_id] = line.decode()
        return kept
