"""The engine process of an `LLM`: starts the ranks, supervises them, and exchanges requests and tokens with the program that owns it.

Its own process, so that the program needs neither PyTorch, nor its main thread, nor signal handlers. Exits with the program.
"""

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue

from msgspec import convert, structs

from launcher.commands.job_plan import build_job
from launcher.commands.opened_run import Run, open_run
from launcher.commands.run_ranks import run_job
from launcher.commands.serve import plan_cache
from launcher.host.streams import prepare_streams
from launcher.job.job import Job
from launcher.job.tasks import Serve
from launcher.reporting.console import loading_progress
from launcher.server.engine_messages import (
    CancelSequences,
    Ended,
    Notice,
    Opened,
    Rejected,
    Start,
    Submit,
    decode_instruction,
    encode,
)
from launcher.server.local_engine import LocalEngine
from launcher.server.structured_output import StructuredOutputs
from launcher.settings.options import EngineOptions
from launcher.settings.python_options import read_options
from launcher.supervision.signals import StoppedError
from launcher.supervision.verdict import RanksFailedError
from model.engine.grammar import Grammars
from model.engine.request import Request, check_memory, check_request
from model.engine.sampling_params import SamplingParams
from model.spec.config import PREFILL_TOKENS
from parallel.errors import InputError, RequestError, TandemError

_STOP_SECONDS = 10.0
"""How long the ranks may take to exit after the program has."""


class _Link:
    """Connection to the program. A program that is suspended does not block the ranks."""

    def __init__(self, descriptor: int, program_pid: int) -> None:
        self._connection, self._program = Connection(descriptor), os.pidfd_open(program_pid)
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, daemon=True, name="to the program")
        self._sender.start()

    def tell(self, notice: Notice) -> None:
        """Send a notice; does not wait."""
        self._outbox.put(encode(notice))

    def receive(self) -> bytes | None:
        """Return the next instruction, or None when the program has exited or closed the connection."""
        # A fork of the program may keep the connection open: only the process descriptor tells its exit.
        if self._program in wait([self._connection, self._program]):
            return None
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            return None

    def finish(self) -> None:
        """Send what is left."""
        self._outbox.put(None)
        self._sender.join(_STOP_SECONDS)

    def _send_all(self) -> None:
        with suppress(OSError):
            while (notice := self._outbox.get()) is not None:
                self._connection.send_bytes(notice)


def main() -> None:
    """Run with the arguments DESCRIPTOR PROGRAM_PID, of `launcher/commands/engine_start.py`."""
    prepare_streams()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the program
    try:
        link = _Link(int(sys.argv[1]), int(sys.argv[2]))
    except ProcessLookupError:  # the program has already exited
        return
    try:
        _run(link)
        ended = Ended("run", "the ranks exited without being asked to; this is a bug in tandem, see their logs")
    except InputError as error:
        ended = Ended("input", str(error))
    except RanksFailedError as error:
        ended = Ended("ranks", str(error), error.verdict.to_json(), error.exit_code == 2)
    except TandemError as error:
        ended = Ended("run", str(error))
    except OSError as error:
        ended = Ended("run", f"the engine process cannot run: {error}")
    link.tell(ended)
    link.finish()
    sys.stderr.flush()
    os._exit(0)  # a failed run may leave threads behind for which the interpreter would wait


def _run(link: _Link) -> None:
    raw = link.receive()
    if raw is None:
        raise StoppedError(signal.SIGTERM)
    start = decode_instruction(raw)
    assert isinstance(start, Start)
    run = open_run(read_options(EngineOptions, start.options, "LLM"))
    tokenizer = run.read_tokenizer()
    task = Serve(requests=(), num_blocks=1, prefill_tokens=PREFILL_TOKENS, tokenizer=str(run.tokenizer_path.absolute()))
    job = build_job(run, task, tokenizer=tokenizer)
    num_blocks, _ = plan_cache(run, job)
    job = replace(job, task=structs.replace(task, num_blocks=num_blocks))
    room = min(run.context_tokens, num_blocks * job.block_size + 1)
    settings, tokenizer_path = run.settings, str(run.tokenizer_path.absolute())
    words = settings.add_bos_token, settings.add_eos_token, settings.chat_template
    adapters = {adapter.name: adapter.path for adapter in job.adapters}
    link.tell(Opened(run.opened.source.path.name, run.world_size, room, tokenizer_path, *words, adapters))
    progress = loading_progress(run.world_size)
    is_shown = sys.stderr.isatty()
    engine = _Engine(job.max_batch_size, link.tell, lambda done, total: progress(done, total) if is_shown else None)
    grammars = Grammars(lambda: tokenizer, run.opened.config.vocab_size, job.eos_token_ids)
    builder = _RequestBuilder(run, job, num_blocks, grammars)
    threading.Thread(target=_hear, args=(link, engine, builder), daemon=True, name="from the program").start()
    try:
        run_job(run, job, engine)
    finally:
        progress.close()


class _Engine(LocalEngine):
    def warn(self, message: str) -> None:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def _hear(link: _Link, engine: LocalEngine, builder: "_RequestBuilder") -> None:
    while (raw := link.receive()) is not None:
        match decode_instruction(raw):
            case Submit() as submitted:
                try:
                    engine.submit(builder.build(submitted))
                except InputError as error:
                    link.tell(Rejected(submitted.first, str(error)))
            case CancelSequences() as cancelled:
                engine.cancel(cancelled.indices)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Timer(_STOP_SECONDS, os._exit, (1,)).start()


@dataclass(frozen=True, slots=True)
class _RequestBuilder:
    """Builds the engine's requests of a call."""

    run: Run
    job: Job
    num_blocks: int
    grammars: Grammars

    def build(self, submitted: Submit) -> list[Request]:
        """Check all sequences. Raises RequestError."""
        requests, vocab_size = [], self.run.opened.config.vocab_size
        built: dict[str, str] = {}  # the answers to a prompt share their limit
        for number, one in enumerate(submitted.sequences):
            params = convert(one.params, SamplingParams)
            if one.limit:
                key = json.dumps(one.limit, sort_keys=True)
                if key not in built:
                    built[key] = self._build_grammar(convert(one.limit, StructuredOutputs))
                params = replace(params, grammar=built[key])
            request = Request(one.prompt, tuple(one.prompt_ids), params, adapter=one.adapter)
            check_request(request, self.job.context_tokens, vocab_size)
            check_memory(request, self.num_blocks, self.job.block_size)
            unknown = next((token for token, _ in params.logit_bias if not 0 <= token < vocab_size), None)
            if unknown is not None:
                raise RequestError(f"logit_bias names id {unknown}, but the vocabulary has {vocab_size}")
            requests.append(replace(request, index=submitted.first + number))
        return requests

    def _build_grammar(self, limit: StructuredOutputs) -> str:
        grammar = limit.build()
        try:
            self.grammars.check(grammar)
        except RequestError as error:
            raise RequestError(f"structured_outputs cannot be used: {error}") from None
        return grammar
