"""`tandem serve`: resolves all settings before any process starts, then runs the HTTP server next to the ranks.

Depends on options and on starting and stopping server and ranks; the routes are in `launcher/server/app.py`.
"""

import asyncio
import logging
import socket
import sys
import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from msgspec import structs

from launcher.commands.job_plan import build_job
from launcher.commands.opened_run import Run, open_run
from launcher.commands.run_ranks import run_job
from launcher.host.cores import share_cores
from launcher.host.loopback import is_loopback
from launcher.host.program_version import read_version
from launcher.job.job import Job
from launcher.job.memory_forecast import read_available_bytes
from launcher.job.observer import RunObserver
from launcher.job.tasks import Serve
from launcher.server.listening import listen, read_keys
from launcher.server.request_log import configure_log, log_throughput
from launcher.settings.decode_options import ApiOptions, ServeOptions
from launcher.settings.precedence import first_not_none
from launcher.supervision.signals import StoppedError
from model.backends.device_types import is_host_memory
from model.kernels.library import find_kernels
from model.planning import RankPlan, Workload
from model.spec.config import count_blocks
from model.text.tokenizer import Tokenizer
from parallel.errors import ConfigError, RunError

if TYPE_CHECKING:
    from launcher.server.connection_places import ConnectionPlaces
    from launcher.server.engine_client import EngineClient
    from launcher.server.guard import App

DEFAULT_MAX_RESTARTS = 1000
"""A server should stay up; repeated failed starts end it long before this limit."""
_MEMORY_SHARE = 0.5
"""Share of the memory left after loading the weights that the KV cache uses by default."""
_END_SECONDS = 15.0
_BACKLOG = 1024
"""Maximum number of connections that the kernel queues until they are accepted."""


def serve(options: ServeOptions) -> None:
    """Serve until a signal or a failure. Raises InputError before anything starts, RanksFailedError, StoppedError."""
    keys = read_keys(options.host, options.api_key_file, insecure=options.insecure)
    run = open_run(options)
    max_restarts = first_not_none(options.max_restarts, run.settings.tandem.max_restarts, DEFAULT_MAX_RESTARTS)
    run = replace(run, options=replace(options, max_restarts=max_restarts))
    from launcher.server.app import build_app
    from launcher.server.chat_rendering import ChatRenderer
    from launcher.server.completion import Service
    from launcher.server.connection_places import ConnectionPlaces, plan_connections
    from launcher.server.guard import Limits

    tokenizer = run.read_tokenizer()
    front = plan_engine(run, options, tokenizer, max_waiting=options.max_waiting, drain_seconds=options.drain_seconds)
    job = front.served.job
    if run.nodes.node_rank or run.environment.rank:
        run_job(run, job, Follower(options.drain_seconds))  # rank 0, or the first node, runs the HTTP server
        return
    max_connections = plan_connections(options.max_connections, 1 if run.environment.is_rank else run.nodes.local_workers)
    places = ConnectionPlaces(max_connections, options.max_client_connections or max(1, max_connections // 2))
    configure_log(options.log_level)
    listener = listen(options.host, options.port)
    chat = ChatRenderer(run.tokenizer_path, tokenizer.settings)
    if chat.reason is not None:
        print(f"warning: chat is disabled: {chat.reason}", file=sys.stderr, flush=True)
    limits = Limits(
        api_keys=keys,
        checks_host=not keys and is_loopback(options.host),
        max_body_bytes=int(options.max_body_megabytes * 1e6),
        max_client_requests=options.max_client_requests,
    )
    service = Service(
        front,
        tokenizer,
        chat,
        options.request_seconds,
        strict_fields=options.strict_fields,
        tool_call_parser=options.tool_call_parser,
    )
    server = HttpServer(build_app(service, limits, options.allowed_origins), listener, front, places)
    server.start()
    address = f"http://{options.host if ':' not in options.host else f'[{options.host}]'}:{listener.getsockname()[1]}"
    print(
        f"listening on {address}: model {front.served.name}, {_name_adapters(front.served.adapters)}{run.world_size} rank(s), "
        f"{chat.words} chat template",
        file=sys.stderr,
        flush=True,
    )
    threading.Thread(target=_announce, args=(front, address), daemon=True).start()
    try:
        run_job(run, job, front)
    finally:
        front.close()
        service.close()
        server.end()
    if front.stop_number is not None:
        raise StoppedError(front.stop_number)
    raise RunError("the ranks exited without being asked to; this is a bug in tandem, see their logs")


def _name_adapters(names: tuple[str, ...]) -> str:
    return f"adapter(s) {', '.join(names)}, " if names else ""


def plan_engine(run: Run, options: ApiOptions, tokenizer: Tokenizer, *, max_waiting: int, drain_seconds: float) -> "EngineClient":
    """Plan the job of a server and return its parent side. Raises InputError."""
    from launcher.server.engine_client import EngineClient, Served

    task = Serve(requests=(), num_blocks=1, prefill_tokens=options.prefill_tokens, tokenizer=str(run.tokenizer_path.absolute()))
    job = build_job(run, task, tokenizer=tokenizer)
    num_blocks, plans = plan_cache(run, job)
    source = run.opened.source
    name = options.served_model_name or options.model_id or (source.path.stem if source.path.is_file() else source.path.name)
    if name in run.adapters:
        raise ConfigError(f"--lora names an adapter {name!r}, but the model has this name: give another one, or --served-model-name")
    return EngineClient(
        Served(
            name=name,
            version=read_version(),
            config=run.opened.config,
            job=replace(job, task=structs.replace(task, num_blocks=num_blocks)),
            plans=plans,
            num_blocks=num_blocks,
            max_waiting=max_waiting,
            drain_seconds=drain_seconds,
        )
    )


class Follower(RunObserver):
    """Observer on a node, or launcher-started rank, without the HTTP server: on shutdown it waits for the one that has it to drain."""

    def __init__(self, drain_seconds: float) -> None:
        self._drain_seconds = drain_seconds

    def ask_to_stop(self, number: int) -> float | None:
        """Return the drain time of the HTTP server plus a margin."""
        return self._drain_seconds + _END_SECONDS


def plan_cache(run: Run, job: Job) -> tuple[int, list[RankPlan]]:
    """Return the number of KV cache blocks, and what each rank then owns.

    Taken from --num-blocks or the YAML; otherwise full contexts for all concurrent sequences, limited to half of the host's memory left
    after loading the weights. Warns if that is less than one context.
    """
    num_local, in_host_memory = run.num_local_ranks, is_host_memory(job.device)
    a_context = count_blocks(job.context_tokens, job.block_size)
    workload = Workload(
        own_kernels=in_host_memory and find_kernels() is not None,
        dtype=job.dtype,
        kv_cache=job.kv_cache,
        batch_size=job.max_batch_size,
        tokens=job.context_tokens,
        num_threads=job.threads_per_rank or share_cores(num_local),
        block_size=job.block_size,
        num_blocks=job.block_limit,
    )
    plans = run.plan_ranks(job, workload)
    num_blocks = job.num_blocks or min(job.max_batch_size * a_context, job.fitting_blocks or sys.maxsize)
    available = read_available_bytes() if in_host_memory else None
    if job.num_blocks is None and available is not None:
        local = sorted(plans, key=lambda plan: plan.peak_bytes)[-num_local:]
        block_bytes = sum(plan.kv_cache_bytes for plan in local) // num_blocks
        free = available - sum(plan.peak_bytes - plan.kv_cache_bytes for plan in local)
        num_blocks = max(1, min(num_blocks, int(_MEMORY_SHARE * free) // block_bytes))
        if num_blocks < a_context:
            words = f"free memory holds {num_blocks * job.block_size} tokens of KV cache, but the context is {job.context_tokens}"
            print(f"warning: {words}: longer requests are rejected; see --kv-cache-dtype int8", file=sys.stderr)
        plans = run.plan_ranks(job, replace(workload, num_blocks=num_blocks))
    return num_blocks, plans


class HttpServer(threading.Thread):
    """uvicorn on its own event loop in a thread; the main thread handles signals and ranks."""

    def __init__(self, app: "App", listener: socket.socket, front: "EngineClient", places: "ConnectionPlaces") -> None:
        super().__init__(daemon=True, name="http")
        import uvicorn

        from launcher.server.bounded_log import BoundedRecords
        from launcher.server.connection_places import ACCEPTED_AT_ONCE
        from launcher.server.guard import MAX_HEADER_BYTES, GuardedProtocol

        config = uvicorn.Config(
            app,
            http=cast(Any, partial(GuardedProtocol, places)),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_level="warning",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            backlog=ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=3,
        )
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).addFilter(BoundedRecords())
        self._server, self._listener, self._front = uvicorn.Server(config), listener, front
        self._running = threading.Event()
        self._error: OSError | None = None

    def start(self) -> None:
        """Start and wait until requests are served. Raises RunError if the server cannot start."""
        super().start()
        self._running.wait()
        if self._error is not None:
            raise RunError(f"the HTTP server cannot start: {self._error}")

    def run(self) -> None:
        """Run until `end`."""

        async def work() -> None:
            self._front.loop = asyncio.get_running_loop()
            serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.01)
            self._listener.listen(_BACKLOG)  # the event loop has set the backlog to what it accepts per iteration
            self._running.set()
            throughput = asyncio.create_task(log_throughput(self._front))
            await serving
            throughput.cancel()

        try:
            asyncio.run(work())
        except OSError as error:
            self._error = error
        finally:
            self._running.set()

    def end(self) -> None:
        """Let finished answers be sent, then stop."""
        self._server.should_exit = True
        self.join(timeout=10)


def _announce(front: "EngineClient", address: str) -> None:
    front.answered_once.wait()
    print(f"ready: {address}/v1, page at {address}/", file=sys.stderr, flush=True)
