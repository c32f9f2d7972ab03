"""The input of `tandem batch`: OpenAI's batch format, one request per line. Bodies are validated when their turn comes."""

import json
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import RequestError
from parallel.regular_file import MAX_DATA_BYTES, read_bytes

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request."""

    custom_id: str
    url: str
    body: bytes
    """JSON."""


def read_batch(path: Path) -> list[BatchLine]:
    """Read the requests. Raises RequestError naming the first line that is not one."""
    try:
        text = read_bytes(path, MAX_DATA_BYTES)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    lines: list[BatchLine] = []
    known: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found = _read_line(line, f"{path}, line {number}")
        if found.custom_id in known:
            raise RequestError(f"{path}, line {number}: custom_id {found.custom_id!r} is also that of line {known[found.custom_id]}")
        known[found.custom_id] = number
        lines.append(found)
    if not lines:
        raise RequestError(f"{path} holds no request")
    return lines


def _read_line(line: bytes, where: str) -> BatchLine:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise RequestError(f"{where} is not a JSON object")
    custom_id, method, url, body = (raw.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError(f"{where}: custom_id is {str(custom_id)[:60]!r}, but a text is needed")
    if method != "POST":
        raise RequestError(f"{where}: method is {str(method)[:60]!r}, but has to be 'POST'")
    if url not in URLS:
        raise RequestError(f"{where}: url is {str(url)[:60]!r}, but has to be one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise RequestError(f"{where}: body is missing, or not an object")
    return BatchLine(custom_id, url, json.dumps(body).encode())
