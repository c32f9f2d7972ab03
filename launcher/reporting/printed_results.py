"""What `tandem predict` prints on standard output: text as it is decoded, MindFormers' lines, or JSON."""

import sys
from collections.abc import Callable
from typing import Protocol

from launcher.reporting.results import Record


class ResultPrinter(Protocol):
    """Gets the results in the order of the prompts, one prompt after the other."""

    streams: bool
    """Whether it wants a continuation while it is decoded."""

    def write_part(self, index: int, prompt: str, text: str) -> None:
        """The continuation of the next prompt is `text` so far."""

    def write_result(self, record: Record) -> None:
        """The next prompt is finished."""


class TextPrinter:
    """Prompt and continuation for people. With several prompts a line before each tells which it is."""

    def __init__(self, num_prompts: int, *, streams: bool = True) -> None:
        self.streams, self._num_prompts = streams, num_prompts
        self._shown: int | None = None
        """Characters of the current continuation that are printed; None: nothing of this prompt is."""

    def write_part(self, index: int, prompt: str, text: str) -> None:
        """Print the new part."""
        if self._shown is None:
            if self._num_prompts > 1:
                self._write(f"{chr(10) if index else ''}=== prompt {index + 1} of {self._num_prompts} ===\n")
            self._write(prompt)
            self._shown = 0
        self._write(text[self._shown :])
        self._shown = max(self._shown, len(text))
        sys.stdout.flush()

    def write_result(self, record: Record) -> None:
        """Print the rest."""
        self.write_part(record.index, record.prompt, record.text)
        self._write("\n")
        self._shown = None
        sys.stdout.flush()

    def _write(self, text: str) -> None:
        sys.stdout.write(text)


class LinePrinter:
    """One line per result."""

    streams = False

    def __init__(self, write: Callable[[Record], str]) -> None:
        self._make_line = write

    def write_part(self, index: int, prompt: str, text: str) -> None:
        """Nothing: a line is whole."""

    def write_result(self, record: Record) -> None:
        """Print the line."""
        print(self._make_line(record), flush=True)


def build_printer(output_format: str, num_prompts: int, *, streams: bool) -> ResultPrinter:
    """The printer of a --format. `streams`: whether text may be printed before its prompt is finished."""
    if output_format == "mindformers":
        return LinePrinter(lambda record: f"'text_generation_text': {[record.prompt + record.text]}")
    if output_format == "json":
        return LinePrinter(lambda record: record.to_line().removesuffix("\n"))
    return TextPrinter(num_prompts, streams=streams)
