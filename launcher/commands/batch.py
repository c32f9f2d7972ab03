"""`tandem batch`: answers a file of requests with the ranks and request handling of `tandem serve`, without HTTP."""

import asyncio
import json
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.commands.opened_run import open_run
from launcher.commands.preparation import writes_results
from launcher.commands.run_ranks import run_job
from launcher.commands.serve import DEFAULT_MAX_RESTARTS, Follower, plan_engine
from launcher.host.output_paths import check_output_file
from launcher.reporting.batch_results import BatchResults
from launcher.reporting.results import hold_results
from launcher.settings.api_batch import BatchLine, read_batch
from launcher.settings.decode_options import BatchOptions
from launcher.settings.options import MAX_SECONDS
from launcher.settings.precedence import first_not_none
from launcher.supervision.signals import StoppedError
from parallel.errors import RequestError, RunError

if TYPE_CHECKING:
    from launcher.server.completion import Service

_DRAIN_SECONDS = 30.0
_NOTICE_SECONDS = 10.0
_LOST_CODES = ("draining", "ended", "busy", "queue_full")
"""Errors of requests that were not answered because the run ended; they are answered by the next one."""


def batch(options: BatchOptions) -> None:
    """Run the command. Raises InputError before anything starts, RanksFailedError, StoppedError."""
    assert options.input is not None and options.output is not None
    is_writer = writes_results(options)
    if is_writer:
        check_output_file("--output", options.output)
    run = open_run(options)
    max_restarts = first_not_none(options.max_restarts, run.settings.tandem.max_restarts, DEFAULT_MAX_RESTARTS)
    run = replace(run, options=replace(options, max_restarts=max_restarts))
    from launcher.server.chat_rendering import ChatRenderer
    from launcher.server.completion import Service

    tokenizer = run.read_tokenizer()
    front = plan_engine(run, options, tokenizer, max_waiting=1_000_000, drain_seconds=_DRAIN_SECONDS)
    job = front.served.job
    if not is_writer:
        run_job(run, job, Follower(_DRAIN_SECONDS))
        return
    lines = read_batch(options.input)
    with ExitStack() as stack:
        stack.enter_context(hold_results(options.output))
        # A rank restarted by a launcher continues where the previous attempt stopped.
        resume = options.resume or run.environment.restart_count > 0
        results = BatchResults(options.output, [line.custom_id for line in lines], resume=resume)
        waiting = [line for line in lines if line.custom_id not in results.done]
        if not waiting and run.nodes.num_nodes == 1 and not run.environment.is_rank:
            print(f"nothing to do: all {len(lines)} requests are answered in {options.output}", file=sys.stderr)
            return
        service = Service(
            front,
            tokenizer,
            ChatRenderer(run.tokenizer_path, tokenizer.settings),
            MAX_SECONDS,
            strict_fields=options.strict_fields,
            tool_call_parser=options.tool_call_parser,
        )
        loop = BatchLoop(service, waiting, results, len(lines))
        loop.start()
        try:
            run_job(run, job, front)
        finally:
            front.close()
            loop.join()
            service.close()
            results.close()
    if loop.error is not None:
        raise loop.error
    if front.stop_number is not None:
        raise StoppedError(front.stop_number)
    if len(results.done) < len(lines):
        raise RunError("the ranks exited before all requests were answered; this is a bug in tandem, see their logs")
    print(f"{len(lines)} requests are answered in {options.output}", file=sys.stderr)


class BatchLoop(threading.Thread):
    """Answers the requests on an event loop in a second thread; the main thread watches the ranks and receives signals."""

    def __init__(self, service: "Service", lines: list[BatchLine], results: BatchResults, total: int) -> None:
        super().__init__(daemon=True, name="batch")
        self._service, self._front, self._lines, self._results, self._total = service, service.front, lines, results, total
        self._told_at = time.monotonic()
        self._is_ready = threading.Event()
        self.error: Exception | None = None

    def start(self) -> None:
        """Start and wait until the event loop runs."""
        super().start()
        self._is_ready.wait()

    def run(self) -> None:
        """Run until all requests are answered, or the run ends."""
        try:
            asyncio.run(self._work())
        except Exception as error:  # re-raised by the main thread
            self.error = error
            self._is_ready.set()

    async def _work(self) -> None:
        self._front.loop = asyncio.get_running_loop()
        self._is_ready.set()
        # Enough requests to keep the batch full while others are planned.
        places = asyncio.Semaphore(2 * self._front.dispatcher.max_running)
        tasks: set[asyncio.Task[None]] = set()
        try:
            for line in self._lines:
                await places.acquire()
                if self._front.dispatcher.is_draining or self.error is not None:
                    break
                task = asyncio.create_task(self._answer(line))
                tasks.add(task)
                task.add_done_callback(lambda _: places.release())
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
        finally:
            await self._front.finish()

    async def _answer(self, line: BatchLine) -> None:
        from launcher.server.errors import ServiceError

        try:
            try:
                status, body = 200, await self._complete(line)
            except RequestError as error:
                raise ServiceError(400, str(error)) from None
        except ServiceError as error:
            if error.code in _LOST_CODES:
                return
            status, body = error.status, json.dumps(error.to_json()).encode()
        try:
            self._results.append(line.custom_id, status, json.loads(body))
        except RunError as error:
            self.error = error
            return
        if time.monotonic() > self._told_at + _NOTICE_SECONDS:
            self._told_at = time.monotonic()
            print(f"{len(self._results.done)} of {self._total} requests are answered", file=sys.stderr, flush=True)

    async def _complete(self, line: BatchLine) -> bytes:
        from launcher.server.completion_writer import AnswerWriter, CompletionWriter
        from launcher.server.errors import ServiceError
        from launcher.server.responses_writer import ResponsesWriter

        service = self._service
        writer: AnswerWriter = CompletionWriter(service.tokenizer)
        if line.url == "/v1/responses":
            request, asked = await service.plan_response(line.body)
            writer = ResponsesWriter(request, service.tokenizer)
        elif line.url == "/v1/completions":
            asked = await service.plan_completion(line.body)
        else:
            asked = await service.plan_chat(line.body)
        if asked.is_stream:
            raise ServiceError(400, "stream is not available in a batch", param="stream")
        return await service.complete(asked, writer, "batch")
