"""Shows a run to people and hands on its results: text as it is decoded, the final lines, records and stats.

Turns ids into text; knows nothing of models. Results go to standard output, everything else to standard error.
"""

import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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

from launcher.host.atomic_write import write_whole
from launcher.job.observer import RunObserver
from launcher.job.tasks import Decode, Task
from launcher.reporting.results import Record, ResultsFile
from model.engine.request import Request
from model.text.tokenizer import StreamDecoder, Tokenizer, continuation


class WorkProgress:
    """Long work: a bar on a terminal, a plain line for each tenth elsewhere."""

    def __init__(self, what: str) -> None:
        self._what, self._terminal = what, Terminal(stderr=True)
        self._bar: Progress | None = None
        self._tenths = 0

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` are done."""
        if self._terminal.is_terminal:
            if self._bar is None:
                self._bar = Progress(TextColumn("{task.description}"), BarColumn(), *self._columns(), console=self._terminal)
                self._bar.start()
                self._bar.add_task(self._what)
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif done == total or done * 10 // total > self._tenths:
            self._tenths = done * 10 // max(1, total)
            print(f"{self._what}: {self._describe(done, total)}", file=sys.stderr, flush=True)
        if done == total:
            self.close()

    def _columns(self) -> tuple[ProgressColumn, ...]:
        return MofNCompleteColumn(), TimeElapsedColumn()

    def _describe(self, done: int, total: int) -> str:
        return f"{done} of {total}"

    def close(self) -> None:
        """Take the bar away; the next call begins anew."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._tenths = 0


class ByteProgress(WorkProgress):
    """Long work in bytes: with its speed since the first of them."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self._started = 0.0

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes are done; the clock runs from the first call on, which may say 0."""
        self._started = self._started or time.perf_counter()
        super().__call__(done, total)

    def close(self) -> None:
        """Take the bar away; the next call begins anew."""
        super().close()
        self._started = 0.0

    def _columns(self) -> tuple[ProgressColumn, ...]:
        return DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn()

    def _describe(self, done: int, total: int) -> str:
        seconds = max(1e-9, time.perf_counter() - self._started)
        return f"{done / 1e6:.1f} of {total / 1e6:.1f} MB, {done / 1e9 / seconds:.2f} GB/s"


def loading_progress(world_size: int) -> WorkProgress:
    """Shows how far loading is; of several ranks the first one's part."""
    return ByteProgress("loading" if world_size == 1 else f"loading on {world_size} ranks, the first one's part")


class WorkConsole(RunObserver):
    """Consumes the events of a run that ends in one result: shows progress, keeps the result."""

    def __init__(self, world_size: int, what: str, redone: str) -> None:
        self._loading, self._working = loading_progress(world_size), WorkProgress(what)
        self.redone = redone
        self.result: dict[str, Any] | None = None

    def on_event(self, event: dict[str, Any]) -> None:
        """Take one event of rank 0."""
        kind = event.pop("event")
        if kind == "loading":
            self._loading(event["done"], event["total"])
        elif kind == "progress":
            self._working(event["done"], event["total"])
        elif kind == "warning":
            print(f"warning: {event['message']}", file=sys.stderr)
        elif kind == "result":
            self.result = event

    def close(self) -> None:
        """Take progress bars away."""
        self._loading.close()
        self._working.close()


class RunConsole(RunObserver):
    """Consumes the events of one run that decodes. `prompts`: the texts of the requests. `done`: what an earlier run has finished.

    Tokens come from one thread; another may ask what is left to do.
    """

    redone = "go on with the same tokens"

    def __init__(
        self,
        world_size: int,
        requests: Sequence[Request],
        prompts: Sequence[str],
        tokenizer: Tokenizer,
        output: ResultsFile | None = None,
        done: Sequence[Record] = (),
    ) -> None:
        self._requests, self._prompts, self._tokenizer, self._output = requests, prompts, tokenizer, output
        self._lock = threading.Lock()
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._logprobs: list[list[float]] = [[] for _ in prompts]
        self._reasons: list[str | None] = [None] * len(prompts)
        self._streams = [StreamDecoder(tokenizer, request.prompt_ids) for request in requests]
        self._texts = [""] * len(prompts)
        for record in done:
            self._tokens[record.index] = list(record.token_ids)
            self._reasons[record.index], self._texts[record.index] = record.finish_reason, record.text
        self._num_printed = 0
        self._loading = loading_progress(world_size)
        self._terminal = Terminal(stderr=True)
        self._live: Live | None = None
        self._failed_at: float | None = None
        self._recoveries: list[float] = []
        self.stats: dict[str, Any] | None = None

    @property
    def is_done(self) -> bool:
        """Whether every prompt is finished."""
        return all(self._reasons)

    def print_done(self, *, again: bool = True) -> None:
        """Print the leading prompts that an earlier run has finished; not `again` when that has printed them where this prints."""
        while self._num_printed < len(self._prompts) and self._reasons[self._num_printed]:
            if again:
                self._print_result(self._num_printed)
            self._num_printed += 1

    def continue_task(self, task: Task) -> Task:
        """What is left to do now."""
        return self.plan_task()

    def plan_task(self) -> Decode:
        """What is left to do: every prompt with the tokens that it has."""
        with self._lock:
            return Decode(
                tuple(
                    replace(request, known_ids=tuple(tokens), known_reason=reason)
                    for request, tokens, reason in zip(self._requests, self._tokens, self._reasons, strict=True)
                )
            )

    def note_failure(self, cause: str, at_seconds: float) -> None:
        """A rank failed at this time.time(), and the run goes on."""
        self._failed_at = at_seconds
        self._loading.close()

    def on_event(self, event: dict[str, Any]) -> None:
        """Take one event of rank 0."""
        kind = event.pop("event")
        if kind == "loading":
            self._loading(event["done"], event["total"])
        elif kind == "token":
            self._take_token(**event)
        elif kind == "warning":
            print(f"warning: {event['message']}", file=sys.stderr)
        elif kind == "stats":
            self.stats = event
            self._stop_live()

    def close(self) -> None:
        """Take progress bars away."""
        self._loading.close()
        self._stop_live()

    def write(self, stats: Path | None, restarts: int) -> None:
        """The run has ended: put the results into order, write stats, and tell the speed."""
        if self._output is not None:
            self._output.close()
        if self.stats is None:
            return
        self.stats.update(restarts=restarts, recovery_seconds=self._recoveries)
        if stats is not None:
            write_whole(stats, json.dumps(self.stats, indent=2) + "\n")
        s = self.stats
        print(
            f"decode {s['decode_tokens_per_second']:.1f} tokens/s, prefill {s['prefill_tokens_per_second']:.1f} tokens/s, "
            f"loaded in {s['load_seconds']:.2f} s; {s['world_size']} rank(s) x {s['threads_per_rank']} thread(s), "
            f"{s['kernel']}, {s['collectives']}",
            file=sys.stderr,
        )

    def _take_token(
        self, index: int, token_id: int, logprob: float | None, finish_reason: str | None, position: int, top_logprobs: Any = ()
    ) -> None:
        with self._lock:
            if position < len(self._tokens[index]):
                return  # the last words of an attempt that failed, said again by the next
            assert position == len(self._tokens[index]), f"token {position} of prompt {index} came before {len(self._tokens[index])}"
            self._tokens[index].append(token_id)
            if logprob is not None:
                self._logprobs[index].append(logprob)
            self._reasons[index] = finish_reason
        if self._failed_at is not None:
            self._recoveries.append(time.time() - self._failed_at)
            self._failed_at = None
        self._texts[index] += self._streams[index].push(token_id)
        if finish_reason and self._output is not None:
            self._output.append(self._build_record(index, finish_reason))
        if self._terminal.is_terminal:
            self._show_live()
        self.print_done()

    def _print_result(self, index: int) -> None:
        text = self._prompts[index] + self._continuation(index)
        if sys.stdout.isatty():
            self._stop_live()  # a result must not land among the live lines
        print(f"'text_generation_text': {[text]}", flush=True)

    def _continuation(self, index: int) -> str:
        return continuation(self._tokenizer, self._requests[index].prompt_ids, self._tokens[index])

    def _build_record(self, index: int, finish_reason: str) -> Record:
        request = self._requests[index]
        return Record(
            index=index,
            prompt=self._prompts[index],
            prompt_token_ids=request.prompt_ids,
            token_ids=tuple(self._tokens[index]),
            text=self._continuation(index),
            finish_reason=finish_reason,
            logprobs=tuple(self._logprobs[index]) if request.params.logprobs else None,
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
