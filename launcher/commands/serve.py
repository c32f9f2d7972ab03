"""`tandem serve`: decides everything before any process starts, then runs the HTTP server beside the ranks.

Knows options, and how server and run are started and ended; what is answered: `launcher/server/app.py`.
"""

import asyncio
import socket
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands.run_ranks import Run, build_job, first_said, open_run, read_version, run_job
from launcher.host.cores import share_cores
from launcher.job.job import Job
from launcher.job.memory_forecast import read_available_bytes
from launcher.job.observer import RunObserver
from launcher.job.tasks import Serve
from launcher.rendezvous.key_value_store import is_loopback
from launcher.settings.options import RunOptions
from launcher.supervision.signals import StoppedError
from model.backends.registry import find_backend
from model.planning import RankPlan, Workload, plan_ranks
from model.spec.config import PREFILL_TOKENS, count_blocks
from parallel.errors import ConfigError, RunError

if TYPE_CHECKING:
    from launcher.server.engine_client import ServeFront
    from launcher.server.guard import App

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
DEFAULT_MAX_RESTARTS = 1000
"""A server is to stay up; attempts that do not come to serve end it long before."""
DEFAULT_MAX_WAITING, DEFAULT_REQUEST_SECONDS, DEFAULT_DRAIN_SECONDS, DEFAULT_MAX_BODY_MEGABYTES = 256, 600.0, 30.0, 4.0
DEFAULT_PREFILL_TOKENS = 256
"""A pass with so many is a noticeable pause for answers that run beside it; with fewer, weights would be read for too little."""
_LEAST_PREFILL_TOKENS = 16
_MEMORY_SHARE = 0.5
"""Of what is free beside the weights, for keys and values, where no number of blocks is said."""
_END_SECONDS = 15.0
_MAX_CONNECTIONS = 1024
_EXTRA = "pip install 'tandem-launcher[serve]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(RunOptions):
    """What the command line says; None is not said."""

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    api_key_file: Path | None = None
    insecure: bool = False
    """Whether other hosts may come without a key."""
    served_model_name: str | None = None
    max_waiting: int = DEFAULT_MAX_WAITING
    request_seconds: float = DEFAULT_REQUEST_SECONDS
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    prefill_tokens: int = DEFAULT_PREFILL_TOKENS
    max_body_megabytes: float = DEFAULT_MAX_BODY_MEGABYTES
    allowed_origins: tuple[str, ...] = ()
    """Of pages that browsers let call this server."""


def serve(options: ServeOptions) -> None:
    """Serve until a signal or a failure. Raises InputError before anything starts, RanksFailedError, StoppedError."""
    _check_options(options)
    keys = read_keys(options)
    run = open_run(options)
    max_restarts = first_said(options.max_restarts, run.settings.tandem.max_restarts, DEFAULT_MAX_RESTARTS)
    run = replace(run, options=replace(options, max_restarts=max_restarts))
    try:
        from launcher.server.app import build_app
        from launcher.server.completion import Service
        from launcher.server.engine_client import Served, ServeFront
        from launcher.server.guard import Limits
    except ModuleNotFoundError as error:
        raise ConfigError(f"tandem serve needs {error.name}, which is not installed: {_EXTRA}") from None
    from model.text.chat_template import load_chat_template

    tokenizer = run.read_tokenizer()
    source = run.opened.source
    template, words = load_chat_template(Path(run.settings.vocab_file or source.tokenizer_path() or source.path), tokenizer)
    job = build_job(run, Serve(requests=(), num_blocks=1, prefill_tokens=options.prefill_tokens))
    num_blocks, plans = plan_cache(run, job)
    job = replace(job, task=Serve(requests=(), num_blocks=num_blocks, prefill_tokens=options.prefill_tokens))
    if run.nodes.node_rank or run.environment.rank:
        run_job(run, job, _Follower(options.drain_seconds))  # rank 0, or the first node, answers
        return
    front = ServeFront(
        Served(
            name=options.served_model_name or (source.path.stem if source.path.is_file() else source.path.name),
            version=read_version(),
            config=run.opened.config,
            job=job,
            plans=plans,
            num_blocks=num_blocks,
            max_waiting=options.max_waiting,
            drain_seconds=options.drain_seconds,
        )
    )
    listener = listen(options.host, options.port)
    limits = Limits(
        api_keys=keys,
        checks_host=not keys and is_loopback(options.host),
        max_body_bytes=int(options.max_body_megabytes * 1e6),
    )
    app = build_app(Service(front, tokenizer, template, options.request_seconds), limits, options.allowed_origins)
    server = HttpServer(app, listener, front)
    server.start()
    address = f"http://{options.host if ':' not in options.host else f'[{options.host}]'}:{listener.getsockname()[1]}"
    print(
        f"listening at {address}: model {front.served.name}, {run.world_size} rank(s), {words} chat template", file=sys.stderr, flush=True
    )
    threading.Thread(target=_announce, args=(front, address), daemon=True).start()
    try:
        run_job(run, job, front)
    finally:
        front.close()
        server.end()
    if front.stop_number is not None:
        raise StoppedError(front.stop_number)
    raise RunError("the ranks ended though nobody asked them to; this is a fault of tandem's, see their logs")


class _Follower(RunObserver):
    """Of a node, or of a rank that a launcher started, that does not answer itself: asked to end, it lets the one that does finish."""

    def __init__(self, drain_seconds: float) -> None:
        self._drain_seconds = drain_seconds

    def ask_to_stop(self, number: int) -> float | None:
        """As long as the other may take, and a little more."""
        return self._drain_seconds + _END_SECONDS


def read_keys(options: ServeOptions) -> tuple[bytes, ...]:
    """The API keys. Raises ConfigError for a file without any, and where other hosts could come without one."""
    if options.api_key_file is None:
        if not is_loopback(options.host) and not options.insecure:
            raise ConfigError(
                f"--host {options.host} can be reached by other hosts, but there is no API key: give --api-key-file or --insecure"
            )
        return ()
    try:
        text = options.api_key_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {options.api_key_file} cannot be read: {error}") from None
    keys = tuple(line.strip().encode() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {options.api_key_file} holds no key: write one a line")
    if any(character <= 32 or character > 126 for key in keys for character in key):
        raise ConfigError(
            f"--api-key-file {options.api_key_file} holds a key with blanks or characters beyond ASCII, which no header carries"
        )
    return keys


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ConfigError: it is found before any rank starts."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host} is no address of this host: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {host}, port {port}: {error.strerror}; choose another --port or --host") from None
    return listener


def plan_cache(run: Run, job: Job) -> tuple[int, list[RankPlan]]:
    """Blocks of keys and values, and what each rank owns then.

    As --num-blocks or the YAML says; else whole contexts for all sequences that run together, or what half of the free memory of this
    host holds beside the weights. Warns where that is less than one context.
    """
    num_local = run.environment.local_world_size or run.world_size if run.environment.is_rank else run.nodes.local_workers
    opened, backend = run.opened, find_backend(job.device)
    a_context = count_blocks(job.context_tokens, job.block_size)
    workload = Workload(
        own_kernels=backend.kernels is not None,
        dtype=job.dtype,
        kv_cache=job.kv_cache,
        batch_size=job.max_batch_size,
        tokens=job.context_tokens,
        num_threads=job.threads_per_rank or share_cores(num_local),
        block_size=job.block_size,
        num_blocks=job.num_blocks,
    )
    stored = {name: info.dtype_name for name, info in opened.source.tensors.items()}
    plans = plan_ranks(opened.config, opened.scheme, run.world_size, workload, stored)
    num_blocks = job.num_blocks or job.max_batch_size * a_context
    available = read_available_bytes() if backend.in_host_memory else None
    if job.num_blocks is None and available is not None:
        local = sorted(plans, key=lambda plan: plan.peak_bytes)[-num_local:]
        block_bytes = sum(plan.kv_cache_bytes for plan in local) // num_blocks
        free = available - sum(plan.peak_bytes - plan.kv_cache_bytes for plan in local)
        num_blocks = max(1, min(num_blocks, int(_MEMORY_SHARE * free) // block_bytes))
        if num_blocks < a_context:
            words = f"free memory holds {num_blocks * job.block_size} tokens of keys and values, but the context is {job.context_tokens}"
            print(f"warning: {words}: longer requests are refused; see --kv-cache-dtype int8", file=sys.stderr)
        plans = plan_ranks(opened.config, opened.scheme, run.world_size, replace(workload, num_blocks=num_blocks), stored)
    return num_blocks, plans


class HttpServer(threading.Thread):
    """uvicorn on an event loop of its own, in a thread: signals and ranks are the main thread's."""

    def __init__(self, app: "App", listener: socket.socket, front: "ServeFront") -> None:
        super().__init__(daemon=True, name="http")
        import uvicorn

        from launcher.server.guard import MAX_HEADER_BYTES, TimedProtocol

        config = uvicorn.Config(
            app,
            http=TimedProtocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_level="warning",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=3,
        )
        self._server, self._listener, self._front = uvicorn.Server(config), listener, front
        self._running = threading.Event()

    def start(self) -> None:
        """Return when requests are answered."""
        super().start()
        self._running.wait()

    def run(self) -> None:
        """Until `end`."""

        async def work() -> None:
            self._front.loop = asyncio.get_running_loop()
            self._running.set()
            await self._server.serve(sockets=[self._listener])

        asyncio.run(work())

    def end(self) -> None:
        """Let answers that have come to their end go out, then stop."""
        self._server.should_exit = True
        self.join(timeout=10)


def _announce(front: "ServeFront", address: str) -> None:
    front.answered_once.wait()
    print(f"ready: {address}/v1, page at {address}/", file=sys.stderr, flush=True)


def _check_options(options: ServeOptions) -> None:
    checks: tuple[tuple[str, Any, bool, str], ...] = (
        ("--port", options.port, 0 <= options.port <= 65535, "from 0 (any free one) to 65535"),
        ("--max-queue", options.max_waiting, options.max_waiting >= 0, "at least 0"),
        ("--request-timeout", options.request_seconds, options.request_seconds > 0, "above 0"),
        ("--drain", options.drain_seconds, options.drain_seconds >= 0, "at least 0"),
        (
            "--prefill-tokens",
            options.prefill_tokens,
            _LEAST_PREFILL_TOKENS <= options.prefill_tokens <= PREFILL_TOKENS,
            f"from {_LEAST_PREFILL_TOKENS} to {PREFILL_TOKENS}",
        ),
        ("--max-body-mb", options.max_body_megabytes, options.max_body_megabytes > 0, "above 0"),
    )
    for flag, value, holds, needed in checks:
        if not holds:
            raise ConfigError(f"{flag} is {value}, but has to be {needed}")
