"""A server under load while its ranks are killed and its clients misbehave: every answer has to come, unchanged, and nothing may leak.

    python scripts/bench/serve_soak.py --checkpoint CHECKPOINT --workers 2 --chaos --kill-seconds 20 --minutes 60 -- --max-restarts 1000
    python scripts/bench/serve_soak.py --checkpoint CHECKPOINT --clients 64 --requests 1000 --malformed
    python scripts/bench/serve_soak.py --url http://127.0.0.1:8000 --server-pid PID --chaos --malformed --minutes 10

First --prompts prompts are streamed one by one, undisturbed. Then --clients clients stream the same prompts, temperature 0, for
--minutes or until --requests requests are made, and every text has to be the undisturbed one: nothing twice, missing or other.
--chaos: a random rank (pids from GET /status) is killed every --kill-seconds. Refusals for now (429; with --chaos 503, too) are obeyed.
--freeze: every other disturbance stops the server and all its ranks (SIGSTOP) for --freeze-seconds, then continues them (SIGCONT).
--slow: every seventh request reads its stream with a pause after each event.
--malformed: every tenth request is one that no server should take, or a client that leaves: see malformed_requests.py.
At the end the server has to be idle, without blocks of the cache in use; memory of the server and of its ranks must not have grown
between the first and the last tenth of the samples (restarts begin anew, so only ranks at work count), nor its open connections.
A server that was started here has to end after SIGTERM, with all its ranks. For tandem: it needs /status.
Faults are listed; the last line is one JSON object; exit code 1 when there are any.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from completion_client import OK, Answer, build_prompt, build_request, complete, find_difference, find_model, measure_tokens_per_word
from leak_watch import (
    Sample,
    compare_tenths,
    count_descriptors,
    is_descendant,
    judge_growth,
    judge_idle,
    read_rss_bytes,
    read_sample,
    read_status,
)
from malformed_requests import KINDS, Target, send_malformed
from own_server import STOP_SECONDS, Server, add_options, check_options, open_server
from tandem_bench import BenchError, name_machine

SPARE_DESCRIPTORS = 8
"""So many more open files than before the load are no leak."""
_IDLE_SECONDS = 60.0
_SHOWN_FAULTS = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to which server."""

    options: argparse.Namespace
    server: Server
    server_pid: int | None
    target: Target
    prompts: tuple[str, ...]
    retried: tuple[int, ...]

    def build(self, index: int) -> dict[str, Any]:
        """The request of a prompt."""
        return build_request(self.target.model, self.prompts[index % len(self.prompts)], self.target.max_tokens)

    async def complete(self, index: int) -> Answer:
        """Stream a prompt; with --slow, every seventh request is a slow client's."""
        pause = self.options.slow_seconds if self.options.slow and index % 7 == 6 else 0.0
        seconds = self.options.timeout
        return await complete(self.target.address, self.build(index), timeout_seconds=seconds, retried=self.retried, pause_seconds=pause)

    def find_ranks(self, status: dict[str, Any] | None) -> dict[int, int]:
        """Rank to process id of those that live, and are the server's."""
        pids = {one["rank"]: one["pid"] for one in status["ranks"] if one["pid"]} if status else {}
        return {rank: pid for rank, pid in pids.items() if self.server_pid and is_descendant(pid, self.server_pid)}


@dataclass(slots=True)
class Tally:
    """What came of it."""

    faults: list[str] = field(default_factory=list)
    requests: int = 0
    """That were made and ended, well or not."""
    tokens: int = 0
    refusals: Counter[int] = field(default_factory=Counter)
    """Attempts by status that were sent again."""
    malformed: dict[str, Counter[str]] = field(default_factory=dict)
    """Kind to outcome to number."""
    kills: int = 0
    freezes: int = 0
    samples: list[Sample] = field(default_factory=list)


async def run_undisturbed(plan: Plan) -> list[Answer]:
    """The answers that all others have to equal. Raises BenchError."""
    answers = [await plan.complete(index) for index in range(len(plan.prompts))]
    if failed := [answer.outcome for answer in answers if answer.outcome != OK]:
        raise BenchError(f"an undisturbed request failed: {failed[0]}")
    return answers


async def run_client(plan: Plan, tally: Tally, expected: Sequence[Answer], indices: Iterator[int], deadline: float) -> None:
    """Requests one after another."""
    while time.monotonic() < deadline and not plan.server.has_ended():
        if (index := next(indices, None)) is None:
            return
        if plan.options.malformed and index % 10 == 9:
            kind = KINDS[index // 10 % len(KINDS)]
            outcome = await send_malformed(kind, plan.target, plan.options.timeout, plan.retried)
            tally.malformed.setdefault(kind.name, Counter())[outcome] += 1
            fault = None if kind.accepts(outcome) else outcome
            words = kind.name
        else:
            answer = await plan.complete(index)
            tally.refusals.update(answer.refusals)
            tally.tokens += answer.num_tokens
            fault, words = find_difference(expected[index % len(plan.prompts)], answer), f"prompt {index % len(plan.prompts)}"
        tally.requests += 1
        if fault:
            tally.faults.append(f"request {index} ({words}): {fault}")
            await asyncio.sleep(0.2)  # A server that refuses all is not hammered.


async def freeze(plan: Plan, tally: Tally) -> None:
    """Stop the server and all its ranks for a while, as a container runtime or a batch system suspends a job."""
    ranks = plan.find_ranks(await read_status(plan.target.address))
    pids = [*ranks.values(), *([plan.server_pid] if plan.server_pid else [])]
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(plan.options.freeze_seconds)
    finally:
        for pid in reversed(pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    tally.freezes += 1


async def disturb(plan: Plan, tally: Tally, deadline: float) -> None:
    """Kill a random rank now and then; with --freeze, freeze everything every other time."""
    while time.monotonic() + plan.options.kill_seconds < deadline:
        await asyncio.sleep(plan.options.kill_seconds)
        if plan.options.freeze and (tally.kills + tally.freezes) % 2:
            await freeze(plan, tally)
            continue
        while time.monotonic() < deadline and not (ranks := plan.find_ranks(await read_status(plan.target.address))):
            await asyncio.sleep(0.2)
        if time.monotonic() < deadline:
            with suppress(ProcessLookupError):
                os.kill(random.choice(sorted(ranks.values())), signal.SIGKILL)
                tally.kills += 1


async def watch(plan: Plan, tally: Tally) -> None:
    """Take samples until cancelled, and tell now and then how it goes."""
    for number in itertools.count():
        tally.samples.append(read_sample(plan.server_pid, await read_status(plan.target.address)))
        if number % max(1, round(30 / plan.options.sample_seconds)) == 0 and number:
            print(f"{tally.requests} requests, {tally.kills} kills, {len(tally.faults)} faults", file=sys.stderr, flush=True)
        await asyncio.sleep(plan.options.sample_seconds)


async def wait_until_idle(
    plan: Plan, seconds: float = _IDLE_SECONDS, max_descriptors: float = float("inf")
) -> tuple[dict[str, Any] | None, int | None]:
    """The last /status and number of open files: as soon as nothing runs or waits and nothing is in use, else when time is up."""
    deadline = time.monotonic() + seconds
    while True:
        status = await read_status(plan.target.address)
        descriptors = count_descriptors(plan.server_pid) if plan.server_pid else None
        busy = status is None or status["state"] != "ready" or any(status[name] for name in ("running", "waiting", "blocks_used"))
        busy = busy or (descriptors or 0) > max_descriptors
        # A rank that was killed a moment ago may not have been missed yet.
        busy = busy or (status is not None and plan.options.chaos and len(plan.find_ranks(status)) < len(status["ranks"]))
        if not busy or plan.server.has_ended() or time.monotonic() > deadline:
            return status, descriptors
        await asyncio.sleep(0.1)


@asynccontextmanager
async def accompany(*helpers: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """What goes on beside the block, and ends with it; what one of them raised is raised then."""
    tasks = [asyncio.ensure_future(helper) for helper in helpers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended


async def soak(plan: Plan) -> dict[str, Any]:
    """All of it; what is printed."""
    options, tally = plan.options, Tally()
    expected = await run_undisturbed(plan)
    before, descriptors_before = await wait_until_idle(plan)
    max_descriptors = float("inf") if descriptors_before is None else descriptors_before + SPARE_DESCRIPTORS
    began = time.monotonic()
    deadline = began + 60 * options.minutes if options.minutes else float("inf")
    indices = iter(range(options.requests)) if options.requests else itertools.count()
    async with accompany(watch(plan, tally), *([disturb(plan, tally, deadline)] if options.chaos else [])):
        await asyncio.gather(*(run_client(plan, tally, expected, indices, deadline) for _ in range(options.clients)))
    seconds = time.monotonic() - began
    after, descriptors = await wait_until_idle(plan, options.idle_seconds, max_descriptors)
    growth = compare_tenths(tally.samples)
    if plan.server.process and plan.server.has_ended():
        tally.faults.append(f"the server ended with exit code {plan.server.process.returncode}")
    tally.faults += judge_idle(before, after, tally.kills)
    tally.faults += judge_growth(growth)
    if (descriptors or 0) > max_descriptors:
        tally.faults.append(f"{descriptors} files or connections are open, {descriptors_before} were before")
    faults = [*tally.faults, *await asyncio.to_thread(stop, plan, after)]
    return {
        "requests": tally.requests,
        "tokens": tally.tokens,
        "seconds": seconds,
        "refusals": {str(status): count for status, count in tally.refusals.items()},
        "malformed": {name: dict(outcomes) for name, outcomes in tally.malformed.items()},
        "kills": tally.kills,
        "freezes": tally.freezes,
        "restarts": (after["restarts"] or 0) - (before["restarts"] or 0) if before and after else None,
        "blocks_used_idle": after["blocks_used"] if after else None,
        "memory": {name: asdict(one) for name, one in growth.items()},
        "descriptors": [descriptors_before, descriptors],
        "faults": len(faults),
        "first_faults": faults[:_SHOWN_FAULTS],
    }


def stop(plan: Plan, status: dict[str, Any] | None) -> list[str]:
    """End a server that was started here; faults of its end."""
    if plan.server.process is None:
        return []
    ranks, ended = plan.find_ranks(status), plan.server.has_ended()
    code = plan.server.stop()
    faults = [f"the server did not end within {STOP_SECONDS:g} s after SIGTERM"] if code is None else []
    if code and not ended and code not in (-signal.SIGTERM, 128 + signal.SIGTERM):
        faults.append(f"the server ended with exit code {code} after SIGTERM")
    return faults + [f"rank {rank} lives without its server" for rank, pid in ranks.items() if read_rss_bytes(pid) is not None]


async def run(options: argparse.Namespace, server: Server) -> tuple[str, dict[str, Any]]:
    """Plan and soak; the model's name and what is printed. Raises BenchError."""
    address, pid = server.address, server.process.pid if server.process else options.server_pid
    model = options.model or await find_model(address)
    words = round(options.prompt_tokens / await measure_tokens_per_word(address, model))
    prompts = tuple(build_prompt(f"soak {options.seed} {index}", words) for index in range(options.prompts))
    status = await read_status(address)
    if status is None:
        raise BenchError("GET /status gives nothing: this is for tandem's server")
    context_tokens = options.context_tokens or int(status["context_tokens"])
    target = Target(address, model, context_tokens, options.large_bytes, options.silence_seconds, options.max_tokens)
    plan = Plan(options, server, pid, target, prompts, (429, 503) if options.chaos else (429,))
    if options.chaos and not plan.find_ranks(status):
        raise BenchError(f"no rank of /status is a process on this machine that the server ({pid}) has started: nothing can be killed")
    return model, await soak(plan)


def print_answer(answer: dict[str, Any]) -> None:
    """What was done, and what was wrong."""
    print(
        f"{answer['requests']} requests, {answer['tokens']} tokens in {answer['seconds']:.0f} s; "
        f"{answer['kills']} kills, {answer['freezes']} freezes, {answer['restarts']} restarts; sent again: {answer['refusals'] or 'none'}"
    )
    for name, outcomes in answer["malformed"].items():
        print(f"{name}: " + ", ".join(f"{outcome} ({count})" for outcome, count in outcomes.items()))
    for name, one in answer["memory"].items():
        print(f"memory of {name}: {one['first_bytes'] / 1e6:.0f} MB at first, {one['last_bytes'] / 1e6:.0f} MB at last")
    for fault in answer["first_faults"]:
        print(f"FAULT {fault}")
    print(f"{answer['faults']} faults")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--server-pid", type=int, help="with --url: its process, on this machine")
    parser.add_argument("--model", help="name to ask for (default: the first that the server has)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--chaos", action="store_true", help="kill ranks")
    parser.add_argument("--kill-seconds", type=float, default=20)
    parser.add_argument("--freeze", action="store_true", help="with --chaos: also stop and continue all processes")
    parser.add_argument("--freeze-seconds", type=float, default=15)
    parser.add_argument("--slow", action="store_true", help="some clients read slowly")
    parser.add_argument("--slow-seconds", type=float, default=0.2, help="pause of a slow client after each event")
    parser.add_argument("--malformed", action="store_true")
    parser.add_argument("--prompts", type=int, default=16, help="different ones")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--context-tokens", type=int, default=0, help="a prompt of more is too long (default: as /status says)")
    parser.add_argument("--large-bytes", type=int, default=32 << 20, help="a body of so many is too large")
    parser.add_argument("--silence-seconds", type=float, default=10, help="of a client with half a header")
    parser.add_argument("--sample-seconds", type=float, default=1)
    parser.add_argument("--idle-seconds", type=float, default=_IDLE_SECONDS, help="for the server to be idle at the end")
    parser.add_argument("--timeout", type=float, default=300, help="of one request with its refusals, seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if not (options.minutes or options.requests):
        parser.error("give --minutes or --requests")
    if options.chaos and options.url and not options.server_pid:
        parser.error("--chaos kills only processes of a server that it knows: give --server-pid with --url")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Start, soak, print."""
    options = parse(arguments)
    random.seed(options.seed)
    try:
        with open_server(options) as server:
            model, answer = asyncio.run(run(options, server))
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    print_answer(answer)
    head: dict[str, Any] = {"bench": "serve_soak", "model": Path(model).name, "machine": name_machine(), "cores": os.cpu_count()}
    head |= {"date": date.today().isoformat(), "clients": options.clients, "chaos": options.chaos, "kill_seconds": options.kill_seconds}
    print(json.dumps({**head, **answer}))
    return 1 if answer["faults"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # The server that was started here ends with this program.
    raise SystemExit(main())
