"""Output formats of `tandem predict`: streamed text, MindFormers' lines, or JSON."""

import sys
from collections.abc import Callable
from typing import Protocol

from launcher.reporting.results import Record


class ResultPrinter(Protocol):
    """Printer that receives the results one by one, in prompt order."""

    streams: bool
    """Whether it prints a continuation while it is being decoded."""

    def write_part(self, index: int, prompt: str, text: str) -> None:
        """Update the next prompt's continuation, which is `text` so far."""

    def write_result(self, record: Record) -> None:
        """Print the finished result of the next prompt."""


class TextPrinter:
    """Prints prompt and continuation for reading. With several prompts, a header line numbers each."""

    def __init__(self, num_prompts: int, *, streams: bool = True) -> None:
        self.streams, self._num_prompts = streams, num_prompts
        self._shown: int | None = None
        """Number of characters printed of the current continuation; None if its prompt has not been printed."""

    def write_part(self, index: int, prompt: str, text: str) -> None:
        """Print the new part of the text."""
        if self._shown is None:
            if self._num_prompts > 1:
                self._write(f"{chr(10) if index else ''}=== prompt {index + 1} of {self._num_prompts} ===\n")
            self._write(prompt)
            self._shown = 0
        self._write(text[self._shown :])
        self._shown = max(self._shown, len(text))
        sys.stdout.flush()

    def write_result(self, record: Record) -> None:
        """Print the rest of the text."""
        self.write_part(record.index, record.prompt, record.text)
        self._write("\n")
        self._shown = None
        sys.stdout.flush()

    def _write(self, text: str) -> None:
        sys.stdout.write(text)


class LinePrinter:
    """Prints one line per result."""

    streams = False

    def __init__(self, write: Callable[[Record], str]) -> None:
        self._make_line = write

    def write_part(self, index: int, prompt: str, text: str) -> None:
        """Ignored: lines are printed only when complete."""

    def write_result(self, record: Record) -> None:
        """Print the line."""
        print(self._make_line(record), flush=True)


def describe_result(record: Record) -> str:
    """Format as MindFormers' predict does."""
    return f"'text_generation_text': {[record.prompt + record.text]}"


def build_printer(output_format: str, num_prompts: int, *, streams: bool) -> ResultPrinter:
    """Create the printer of a --format. `streams`: whether text may be printed before its prompt is finished."""
    if output_format == "mindformers":
        return LinePrinter(describe_result)
    if output_format == "json":
        return LinePrinter(lambda record: record.to_line().removesuffix("\n"))
    return TextPrinter(num_prompts, streams=streams)
