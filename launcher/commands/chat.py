"""`tandem chat`: a conversation in the terminal, or line by line from standard input.

The ranks serve as in `tandem serve`; this process reads messages and prints answers as they are decoded.
"""

import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from msgspec import structs

from launcher.commands.conversation import Conversation
from launcher.commands.job_plan import build_job
from launcher.commands.opened_run import Run, open_run
from launcher.commands.predict import plan_params
from launcher.commands.run_ranks import run_job
from launcher.commands.serve import plan_cache
from launcher.job.tasks import Serve
from launcher.server.chat_front import ChatEngineClient
from launcher.server.chat_rendering import ChatRenderer
from launcher.settings.decode_options import ChatOptions
from model.engine.request import Request, check_request
from model.spec.config import PREFILL_TOKENS
from model.text.tokenizer import StreamDecoder, Tokenizer
from parallel.errors import CheckpointError, RequestError, RunError

_PROMPT = ">>> "
_HELP = "/reset starts over, /exit or Ctrl-D quits, Ctrl-C stops an answer"
_INTERRUPTS_SECONDS = 2.0
"""Two interrupts at the prompt within this time exit."""


def chat(options: ChatOptions) -> None:
    """Run a conversation until the end of input. Raises InputError before anything starts, RanksFailedError, StoppedError."""
    run = open_run(options)
    tokenizer = run.read_tokenizer()
    renderer = ChatRenderer(run.tokenizer_path, tokenizer.settings)
    if renderer.reason is not None:
        raise CheckpointError(f"tandem chat needs a chat template, but {renderer.reason}; tandem predict needs none")
    try:
        _chat(options, run, tokenizer, renderer)
    finally:
        renderer.close()


def _chat(options: ChatOptions, run: Run, tokenizer: Tokenizer, renderer: ChatRenderer) -> None:
    source = run.opened.source
    task = Serve(requests=(), num_blocks=1, prefill_tokens=PREFILL_TOKENS)
    job = build_job(run, task, tokenizer=tokenizer)
    num_blocks, _ = plan_cache(run, job)
    job = replace(job, task=structs.replace(task, num_blocks=num_blocks))
    room = min(run.context_tokens, num_blocks * job.block_size + 1)
    conversation = Conversation(renderer.render, tokenizer, room, options.system)
    conversation.plan("Hello")  # fail early if the system message is too long or the template rejects it
    plan_params(options, run.settings, 1)
    loop = ChatLoop(run, options, conversation, tokenizer, f"{options.model_id or source.path.name}, {renderer.words} chat template")
    with _restored_terminal():
        try:
            loop.start()
            run_job(run, job, loop.front)
        finally:
            loop.front.close()
    loop.join()
    if loop.error is not None:
        raise loop.error


class ChatLoop(threading.Thread):
    """Reads messages and prints answers in a second thread; the main thread watches the ranks and receives signals."""

    def __init__(self, run: Run, options: ChatOptions, conversation: Conversation, tokenizer: Tokenizer, title: str) -> None:
        super().__init__(daemon=True, name="chat")
        self.front = ChatEngineClient(run.world_size, self._heed_interrupt)
        self.error: Exception | None = None
        self._run, self._options, self._conversation, self._tokenizer, self._title = run, options, conversation, tokenizer, title
        self._is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._interrupted_at = 0.0
        self._num_answers = 0

    def run(self) -> None:
        """Run until the end of input."""
        try:
            self.front.ready.wait()
            if self._is_terminal:
                with suppress(ImportError):
                    import readline  # noqa: F401  # enables line editing and history for input()
                print(f"{self._title}; {_HELP}", file=sys.stderr, flush=True)
            while (text := self._read_message()) is not None:
                self._take(text)
        except Exception as error:  # re-raised by the main thread
            self.error = error
        finally:
            self.front.end()

    def _read_message(self) -> str | None:
        """Return the next line, or None at the end of input."""
        try:
            line = input(_PROMPT) if self._is_terminal else sys.stdin.readline()
        except EOFError:
            print()
            return None
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not UTF-8 text: {error}") from None
        self._interrupted_at = 0.0
        if not self._is_terminal and not line:
            return None
        word = line.strip()
        return None if word in ("/exit", "/quit", "/bye") else word

    def _take(self, text: str) -> None:
        if not text:
            return
        if text == "/reset":
            self._conversation.reset()
            print("the conversation starts over", file=sys.stderr, flush=True)
        elif text.startswith("/") and text[1:].isalpha():
            print(_HELP if text == "/help" else f"unknown command {text}: {_HELP}", file=sys.stderr, flush=True)
        else:
            try:
                self._answer(text)
            except (RequestError, RunError) as error:
                print(f"tandem: {error}", file=sys.stderr, flush=True)

    def _answer(self, text: str) -> None:
        turn = self._conversation.plan(text)
        if turn.num_dropped:
            print(f"the first {turn.num_dropped} messages no longer fit the context and were dropped", file=sys.stderr, flush=True)
        new_tokens = min(self._options.max_new_tokens or turn.room, turn.room)
        params = plan_params(self._options, self._run.settings, new_tokens)
        params = replace(params, seed=(params.seed + self._num_answers) % 2**32)
        self._num_answers += 1
        check_request(Request(0, turn.prompt_ids, params), self._run.context_tokens, self._run.opened.config.vocab_size)
        decoder, pieces, times = StreamDecoder(self._tokenizer, turn.prompt_ids), [], [time.perf_counter()]
        reason = None
        try:
            for token in self.front.answer(lambda index: Request(index, turn.prompt_ids, params, adapter=self._options.adapter)):
                times.append(time.perf_counter())
                pieces.append(decoder.push(token.token_id))
                self._write(pieces[-1])
                reason = token.finish_reason
        finally:
            pieces.append(decoder.finish())
            self._write(f"{pieces[-1]}\n")
        self._conversation.add(text, "".join(pieces), turn.num_dropped)
        self._tell_end(reason, len(times) - 1, new_tokens == turn.room, times[-1] - times[min(1, len(times) - 1)])

    def _tell_end(self, reason: str | None, num_tokens: int, fills_context: bool, seconds: float) -> None:
        if reason is None:
            print("(stopped)", file=sys.stderr, flush=True)
        elif reason == "length":
            limit = "the context is full" if fills_context else "--max-new-tokens is reached"
            print(f"(cut: {limit})", file=sys.stderr, flush=True)
        if self._is_terminal and num_tokens > 1 and seconds > 0:
            print(f"({num_tokens} tokens, {(num_tokens - 1) / seconds:.1f} tokens/s)", file=sys.stderr, flush=True)

    def _heed_interrupt(self) -> bool:
        """Handle SIGINT; runs in a signal handler while a message is read."""
        now = time.monotonic()
        again = now - self._interrupted_at < _INTERRUPTS_SECONDS
        self._interrupted_at = now
        if again or not self._is_terminal:
            return False
        print(f"\n({_HELP}; Ctrl-C again quits)\n{_PROMPT}", end="", file=sys.stderr, flush=True)
        return True

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def _restored_terminal() -> Iterator[None]:
    """Restore the terminal settings, which line editing changes, even if the run fails."""
    before = None
    with suppress(termios.error, OSError, ValueError, AttributeError):
        before = termios.tcgetattr(sys.stdin.fileno())
    try:
        yield
    finally:
        if before is not None:
            with suppress(termios.error, OSError):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
