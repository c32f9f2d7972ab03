"""Progress and results of a run: text as it is decoded, final lines, records and stats.

Results go to standard output, everything else to standard error. Does not depend on the model, only on a tokenizer.
"""

import json
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import structs
from rich.console import Console as Terminal
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from launcher.host.atomic_write import atomic_write
from launcher.job.messages import Event, Failed, Failures, Loading, RankWarning, Result, Stats, Tokens, Working
from launcher.job.observer import RunObserver
from launcher.job.tasks import Decode, Task
from launcher.reporting.printed_results import ResultPrinter, build_printer, describe_result
from launcher.reporting.results import Record, ResultsFile
from model.engine.events import SequenceFailure, TokenEvent
from model.engine.request import Request
from model.text.tokenizer import StreamDecoder, Tokenizer, continuation

LINE_SECONDS, RATE_SECONDS = 1.0, 0.5
"""Minimum seconds between two progress lines, and before a speed is shown."""


class WorkProgress:
    """Progress of a long operation: a bar on a terminal, otherwise at most one line per second and one at the end."""

    def __init__(self, what: str) -> None:
        self._what, self._terminal = what, Terminal(stderr=True)
        self._bar: Progress | None = None
        self._started: float | None = None
        self._told = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Report `done` of `total`. The clock starts at the first call, which may report 0."""
        now = time.perf_counter()
        if self._started is None:
            self._started = self._told = now
        if self._terminal.is_terminal:
            if self._bar is None:
                self._bar = Progress(TextColumn("{task.description}"), BarColumn(), *self._columns(), console=self._terminal)
                self._bar.start()
                self._bar.add_task(self._what)
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif done == total or now - self._told >= LINE_SECONDS:
            self._told = now
            print(
                f"{self._what}: {self._describe(done, total)}{self._describe_rate(done, now - self._started)}", file=sys.stderr, flush=True
            )
        if done == total:
            self.close()

    def _columns(self) -> tuple[ProgressColumn, ...]:
        return MofNCompleteColumn(), TimeElapsedColumn()

    def _describe(self, done: int, total: int) -> str:
        return f"{done} of {total}"

    def _describe_rate(self, done: int, seconds: float) -> str:
        return ""

    def close(self) -> None:
        """Remove the bar; the next call starts over."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._started = None


class ByteProgress(WorkProgress):
    """Progress in bytes, with the speed since the first of them."""

    def _columns(self) -> tuple[ProgressColumn, ...]:
        return DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn()

    def _describe(self, done: int, total: int) -> str:
        return f"{format_bytes(done)} of {format_bytes(total)}"

    def _describe_rate(self, done: int, seconds: float) -> str:
        """Return an empty string until there is enough data for a rate."""
        return f", {format_bytes(done / seconds)}/s" if seconds >= RATE_SECONDS else ""


def format_bytes(count: float) -> str:
    """Format as `1.23 GB`, `45.6 MB`, `789 kB`."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 0)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} B"


def loading_progress(world_size: int) -> WorkProgress:
    """Create the progress display for loading; with several ranks it shows that of rank 0."""
    return ByteProgress("loading" if world_size == 1 else "loading, rank 0")


class WorkConsole(RunObserver):
    """Observer of a run that yields one result: shows progress and keeps the result."""

    def __init__(self, world_size: int, what: str, redone: str) -> None:
        self._loading, self._working = loading_progress(world_size), WorkProgress(what)
        self.redone = redone
        self.result: dict[str, Any] | None = None
        self.failure: str | None = None
        """Why the ranks ended without a result, if all of them found that there cannot be one."""

    def on_event(self, event: Event) -> None:
        """Take one event of rank 0."""
        match event:
            case Loading():
                self._loading(event.done, event.total)
            case Working():
                self._working(event.done, event.total)
            case RankWarning():
                print(f"warning: {event.message}", file=sys.stderr)
            case Result():
                self.result = event.values
            case Failed():
                self.failure = event.message

    def close(self) -> None:
        """Remove the progress bars."""
        self._loading.close()
        self._working.close()


class RunConsole(RunObserver):
    """Observer of a decoding run. `prompts` holds the texts of the requests, `done` the results of an earlier run.

    Tokens arrive on one thread; another may ask for the remaining work.
    """

    redone = "continue with the same tokens"

    def __init__(
        self,
        world_size: int,
        requests: Sequence[Request],
        prompts: Sequence[str],
        tokenizer: Tokenizer,
        output: ResultsFile | None = None,
        done: Sequence[Record] = (),
        printer: ResultPrinter | None = None,
    ) -> None:
        self._printer = printer or build_printer("mindformers", len(prompts), streams=False)
        self._requests, self._prompts, self._tokenizer, self._output = requests, prompts, tokenizer, output
        self._lock = threading.Lock()
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._logprobs: list[list[float]] = [[] for _ in prompts]
        self._reasons: list[str | None] = [None] * len(prompts)
        self._errors: dict[int, str] = {}
        self._streams = [StreamDecoder(tokenizer, request.prompt_ids) for request in requests]
        self._texts = [""] * len(prompts)
        self._records: dict[int, Record] = {record.index: record for record in done}
        for record in done:
            self._tokens[record.index] = list(record.token_ids)
            self._reasons[record.index], self._texts[record.index] = record.finish_reason, record.text
        self._num_printed = 0
        self._loading = loading_progress(world_size)
        self._terminal = Terminal(stderr=True)
        self._live: Live | None = None
        self._failed_at: float | None = None
        self._recoveries: list[float] = []
        self._log: Path | None = None
        self.stats: Stats | None = None

    @property
    def is_done(self) -> bool:
        """Whether every prompt is finished."""
        return all(self._reasons)

    @property
    def failure(self) -> str | None:
        """Message about prompts that ended with an error; None if there are none."""
        if not self._errors:
            return None
        index = min(self._errors)
        others = f"; so did {len(self._errors) - 1} more of {len(self._prompts)}" if len(self._errors) > 1 else ""
        return f"prompt {index} ended with an error: {self._errors[index]}{others}"

    def print_done(self, *, again: bool = True) -> None:
        """Print the leading prompts finished by an earlier run, unless it has already printed them here (`again` False)."""
        while self._num_printed < len(self._prompts) and self._reasons[self._num_printed]:
            if again:
                self._print_result(self._num_printed)
            self._num_printed += 1
        if self._printer.streams and self._num_printed < len(self._prompts) and self._tokens[self._num_printed]:
            index = self._num_printed
            self._printer.write_part(index, self._prompts[index], self._texts[index])

    def continue_task(self, task: Task) -> Task:
        """Return the remaining work."""
        return self.plan_task()

    def plan_task(self) -> Decode:
        """Return the unfinished prompts, each with its tokens so far."""
        with self._lock:
            return Decode(
                tuple(
                    replace(request, resumed_ids=tuple(tokens), known_reason=reason)
                    for request, tokens, reason in zip(self._requests, self._tokens, self._reasons, strict=True)
                )
            )

    def note_failure(self, cause: str, at_seconds: float) -> None:
        """Handle a rank failure at this time.time(); the run continues."""
        self._failed_at = at_seconds
        self._loading.close()

    def on_event(self, event: Event) -> None:
        """Take one event of rank 0."""
        match event:
            case Loading():
                self._loading(event.done, event.total)
            case Tokens():
                for token in event.tokens:
                    self._take_token(token)
            case Failures():
                for failure in event.failures:
                    self._take_failure(failure)
            case RankWarning():
                print(f"warning: {event.message}", file=sys.stderr)
            case Stats():
                self.stats = event
                self._stop_live()

    def use_log_folder(self, folder: Path) -> None:
        """Add the results to rank 0's log at the end: users of msrun look for them there."""
        self._log = folder / "worker_0.log"

    def close(self) -> None:
        """Remove the progress bars, and add the printed results to the log of rank 0. Call after the ranks have exited."""
        self._loading.close()
        self._stop_live()
        if self._log is not None and self._log.exists():
            printed = [self._records[index] for index in range(self._num_printed) if index in self._records]
            with suppress(OSError), self._log.open("a", encoding="utf-8") as log:  # the results are on standard output too
                log.writelines(f"{describe_result(record)}\n" for record in printed)
            self._log = None

    def write(self, stats: Path | None, restarts: int) -> None:
        """Finish the run: sort the results file, write stats, and print the speed."""
        if self._output is not None:
            self._output.close()
        if (s := self.stats) is None:
            return
        if stats is not None:
            values = {**structs.asdict(s), "restarts": restarts, "recovery_seconds": self._recoveries}
            atomic_write(stats, json.dumps(values, indent=2) + "\n")
        print(
            f"decode {s.decode_tokens_per_second:.1f} tokens/s, prefill {s.prefill_tokens_per_second:.1f} tokens/s, "
            f"loaded in {s.load_seconds:.2f} s; {s.world_size} rank(s) x {s.threads_per_rank} thread(s), {s.kernel}, {s.collectives}",
            file=sys.stderr,
        )

    def save(self, path: Path) -> None:
        """Write the results as MindFormers' predict does: a Python list with one dictionary for each prompt."""
        texts = [{"text_generation_text": [record.prompt + record.text]} for _, record in sorted(self._records.items())]
        atomic_write(path, str(texts))
        print(f"output result is saved at: {path}", file=sys.stderr)

    def _take_token(self, token: TokenEvent) -> None:
        index, position = token.index, token.position
        with self._lock:
            if position < len(self._tokens[index]):
                return  # a duplicate: the last tokens of a failed attempt, repeated by the next
            assert position == len(self._tokens[index]), f"token {position} of prompt {index} came before {len(self._tokens[index])}"
            self._tokens[index].append(token.token_id)
            if token.logprob is not None:
                self._logprobs[index].append(token.logprob)
            self._reasons[index] = token.finish_reason
        if self._failed_at is not None:
            self._recoveries.append(time.time() - self._failed_at)
            self._failed_at = None
        self._texts[index] += self._streams[index].push(token.token_id)
        if token.finish_reason:
            self._records[index] = self._build_record(index, token.finish_reason)
            if self._output is not None:
                self._output.append(self._records[index])
        if self._terminal.is_terminal and not self._printer.streams:
            self._show_live()
        self.print_done()

    def _take_failure(self, failure: SequenceFailure) -> None:
        index, position = failure.index, failure.position
        with self._lock:
            if self._reasons[index]:
                return  # a restarted attempt found the same error
            assert position == len(self._tokens[index]), f"prompt {index} failed at {position} with {len(self._tokens[index])} tokens"
            self._reasons[index], self._errors[index] = "error", failure.message
        if self._output is not None:
            self._output.append(self._build_record(index, "error"))
        self.print_done()

    def _print_result(self, index: int) -> None:
        if index in self._errors:
            return
        if sys.stdout.isatty():
            self._stop_live()  # results must not interleave with live lines
        self._printer.write_result(self._records[index])

    def _build_record(self, index: int, finish_reason: str) -> Record:
        request = self._requests[index]
        return Record(
            index=index,
            prompt=self._prompts[index],
            prompt_token_ids=request.prompt_ids,
            token_ids=tuple(self._tokens[index]),
            text=continuation(self._tokenizer, request.prompt_ids, self._tokens[index]),
            finish_reason=finish_reason,
            logprobs=tuple(self._logprobs[index]) if request.params.logprobs else None,
            error=self._errors.get(index),
        )

    def _show_live(self) -> None:
        if self._live is None:
            self._live = Live(console=self._terminal, refresh_per_second=12, transient=True)
            self._live.start()
        width = max(40, self._terminal.width * max(1, (self._terminal.height - 2) // max(1, len(self._prompts) - self._num_printed)) - 4)
        lines = [Text((prompt + text)[-width:]) for prompt, text in zip(self._prompts, self._texts, strict=True)]
        self._live.update(Text("\n").join(lines[self._num_printed :]))

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
