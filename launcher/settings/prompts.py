"""The prompts of `tandem predict`, from options, a file or standard input."""

import json
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel.errors import RequestError
from parallel.regular_file import MAX_DATA_BYTES, read_text

_HOW = "give --prompt TEXT, --prompts-file FILE, or text on standard input"
_NOTICE_SECONDS = 2.0


def read_prompts(prompts: Sequence[str], prompts_file: Path | None, *, may_read_input: bool = True) -> tuple[str, ...]:
    """Read the prompts of --prompt, then those of the file; without either, standard input is one prompt unless it is a terminal.

    Raises RequestError if there is no prompt or a file cannot be read.
    """
    found = list(prompts)
    if prompts_file is not None:
        found += _read_file(prompts_file)
    elif not found:
        if not may_read_input or sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
            raise RequestError(f"no prompt: {_HOW}")
        text = _read_input().removesuffix("\n")
        if not text.strip():
            raise RequestError(f"no prompt: {_HOW}, which is empty")
        found = [text]
    return tuple(found)


def _read_file(path: Path) -> list[str]:
    try:
        lines = (_read_input() if str(path) == "-" else read_text(path, MAX_DATA_BYTES)).splitlines()
    except FileNotFoundError:
        raise RequestError(f"the prompts file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the prompts file {path} cannot be read: {getattr(error, 'strerror', error)}") from None
    found = [_read_prompt(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise RequestError(f"the prompts file {path} holds no prompt: write one per line")
    return found


def _read_prompt(line: str, path: Path, number: int) -> str:
    if path.suffix != ".jsonl":
        return line
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise RequestError(f'{path}, line {number}: a JSON object with "prompt" is needed')
    return prompt


def _read_input() -> str:
    try:
        stream = sys.stdin.buffer
        if not select.select([stream], [], [], _NOTICE_SECONDS)[0]:
            print("reading the prompt from standard input ...", file=sys.stderr, flush=True)
        return stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error}") from None
    except OSError as error:
        raise RequestError(f"standard input cannot be read: {error.strerror}") from None
