"""Load on an OpenAI-compatible server: tokens a second, time to the first token and between tokens, by number of clients.

    python scripts/bench/serve_load.py --url http://127.0.0.1:8000 --clients 1,4,16,64
    python scripts/bench/serve_load.py --checkpoint CHECKPOINT --workers 2 --long-prompt 4096 -- --max-batch-size 16
    python scripts/bench/serve_load.py --checkpoint CHECKPOINT --against http://127.0.0.1:8001 --rounds 3

Any server with /v1/models and /v1/completions will do: tandem's, vLLM's, llama-server. With --checkpoint our own is started for the time
of the test; what stands behind -- goes to `tandem serve`.

Every client sends --requests-per-client streamed requests one after another, temperature 0, no end before --max-tokens, no two prompts
alike. Times count from the attempt that was taken; attempts that were refused (429) are counted, and sent again after Retry-After.
Times between tokens are between pieces of a stream. Only answers that came to their end count as tokens; others are failures, by status.
--against: the same load on another server too, in alternating rounds; medians over the rounds and their ratios.
--long-prompt: short prompts are sent while one of so many tokens is read; their first token against a prefill of 512 tokens alone.
Prints a table; the last line is one JSON object. Exit code 1 when a request failed.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from completion_client import OK, Answer, find_model, measure_tokens_per_word
from http_client import Address
from own_server import add_options, check_options, open_server
from serve_level import Level, Sender, measure_level
from serve_pairs import Pair, measure_pairs, print_pairs
from tandem_bench import BenchError, name_machine

ALONE_TOKENS = 512
"""Of the prefill that a first token during a long one is held against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruption:
    """What a long prompt does to short ones."""

    long_prompt_tokens: int | None
    long_prefill_seconds: float
    short_requests: int
    first_token_seconds: float
    """Median of the short prompts that were sent while the long one was read."""
    first_token_seconds_worst: float
    alone_tokens: int | None
    alone_seconds: float
    """To the first token of ALONE_TOKENS tokens, nothing else running: median of 3."""
    ratio: float
    ratio_worst: float


async def measure_interruption(sender: Sender, long_tokens: int, short_tokens: int) -> Interruption:
    """Short prompts one after another while a long one is read. Raises BenchError."""
    alone = [await sender.send(f"alone {index}", ALONE_TOKENS, 1) for index in range(3)]
    long = asyncio.ensure_future(sender.send("long", long_tokens, 1))
    await asyncio.sleep(0.02)
    shorts: list[Answer] = []
    while not long.done():
        shorts.append(await sender.send(f"short {len(shorts)}", short_tokens, 1))
        if shorts[-1].outcome != OK:
            break
    done = await long
    for answer in (*alone, *shorts, done):
        if answer.outcome != OK or not answer.times:
            raise BenchError(f"a request of --long-prompt failed: {answer.outcome}")
    seconds = [answer.times[0] - answer.started for answer in shorts if answer.started < done.times[0]]
    if not seconds:
        raise BenchError(f"a prompt of {long_tokens} tokens was read before a short one could be sent: take a longer one")
    alone_seconds = statistics.median(answer.times[0] - answer.started for answer in alone)
    return Interruption(
        long_prompt_tokens=done.prompt_tokens,
        long_prefill_seconds=done.times[0] - done.started,
        short_requests=len(seconds),
        first_token_seconds=statistics.median(seconds),
        first_token_seconds_worst=max(seconds),
        alone_tokens=alone[0].prompt_tokens,
        alone_seconds=alone_seconds,
        ratio=statistics.median(seconds) / alone_seconds,
        ratio_worst=max(seconds) / alone_seconds,
    )


def find_speedups(levels: Sequence[Level]) -> dict[int, float]:
    """Number of clients: its tokens a second over those of one client; empty where one client was not measured."""
    one = next((level.tokens_per_second for level in levels if level.clients == 1), 0.0)
    return {level.clients: level.tokens_per_second / one for level in levels} if one else {}


def print_levels(levels: Sequence[Level]) -> None:
    """The table."""
    print(f"{'':>8}{'tokens/s':>10}{'over one':>10}{'requests/s':>12}{'first token, ms':>18}{'between tokens, ms':>24}{'':>9}")
    print(f"{'clients':>8}{'':>10}{'client':>10}{'':>12}{'median':>9}{'95 %':>9}{'median':>8}{'95 %':>8}{'worst':>8}{'refused':>9}")
    speedups = find_speedups(levels)
    for level in levels:
        first = (level.first_token_seconds, level.first_token_seconds_95)
        between = (level.between_tokens_seconds, level.between_tokens_seconds_95, level.between_tokens_seconds_worst)
        ratio = f"{speedups[level.clients]:.2f}" if speedups else "-"
        cells = "".join(f"{_milliseconds(one):>9}" for one in first) + "".join(f"{_milliseconds(one):>8}" for one in between)
        print(
            f"{level.clients:>8}{level.tokens_per_second:>10.1f}{ratio:>10}{level.requests_per_second:>12.2f}{cells}{level.refused:>9}"
            + "".join(f"  {count} failed: {words}" for words, count in level.failures.items())
        )


def print_interruption(one: Interruption) -> None:
    """What a long prompt does, in words."""
    print(
        f"first token while a prompt of {one.long_prompt_tokens or '?'} tokens is read ({one.long_prefill_seconds:.2f} s): "
        f"median {1000 * one.first_token_seconds:.0f} ms, worst {1000 * one.first_token_seconds_worst:.0f} ms of {one.short_requests}"
    )
    print(
        f"prefill of {one.alone_tokens or '?'} tokens alone: {1000 * one.alone_seconds:.0f} ms; "
        f"ratio: median {one.ratio:.2f}, worst {one.ratio_worst:.2f}"
    )


def numbers(words: str) -> list[int]:
    """1,4,16"""
    values = [int(word) for word in words.split(",")]
    if min(values) < 1:
        raise ValueError(words)
    return values


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--model", help="name to ask for (default: the first that the server has)")
    parser.add_argument("--clients", type=numbers, default=[1, 4, 16, 64], help="numbers of clients at once")
    parser.add_argument("--requests-per-client", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--long-prompt", type=int, metavar="TOKENS")
    parser.add_argument("--timeout", type=float, default=600, help="of one request with its refusals, seconds")
    parser.add_argument("--against", metavar="URL", help="of another server that runs: both are measured in alternating rounds")
    parser.add_argument("--rounds", type=int, default=3, help="with --against")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if options.against:
        try:
            Address.parse(options.against)
        except ValueError as error:
            parser.error(str(error))
        if options.long_prompt:
            parser.error("--long-prompt measures one server, without --against")
    if options.rounds < 1:
        parser.error("--rounds has to be above 0")
    if min(options.requests_per_client, options.prompt_tokens, options.max_tokens) < 1:
        parser.error("--requests-per-client, --prompt-tokens and --max-tokens have to be above 0")
    return options


async def open_sender(options: argparse.Namespace, address: Address, model: str | None) -> Sender:
    """What sends to a server. Raises BenchError."""
    name = model or await find_model(address)
    return Sender(address, name, await measure_tokens_per_word(address, name), options.timeout)


async def compare(options: argparse.Namespace, address: Address) -> tuple[str, list[Pair]]:
    """Both servers in turns, and our model's name. Raises BenchError."""
    ours = await open_sender(options, address, options.model)
    theirs = await open_sender(options, Address.parse(options.against), None)

    async def measure_one(sender: Sender, clients: int, label: str) -> Level:
        return await measure_level(sender, clients, options.requests_per_client, options.prompt_tokens, options.max_tokens, label)

    return ours.model, await measure_pairs(ours, theirs, options.clients, options.rounds, measure_one)


async def measure(options: argparse.Namespace, address: Address) -> tuple[str, list[Level], Interruption | None]:
    """Everything, and the model's name. Raises BenchError."""
    sender = await open_sender(options, address, options.model)
    model = sender.model
    levels = []
    for clients in options.clients:
        print(f"clients: {clients}", file=sys.stderr, flush=True)
        levels.append(await measure_level(sender, clients, options.requests_per_client, options.prompt_tokens, options.max_tokens))
    if not options.long_prompt:
        return model, levels, None
    return model, levels, await measure_interruption(sender, options.long_prompt, options.prompt_tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    """Start, measure, print."""
    options = parse(arguments)
    levels: list[Level] = []
    pairs: list[Pair] = []
    interruption = None
    try:
        with open_server(options) as server:
            if options.against:
                model, pairs = asyncio.run(compare(options, server.address))
            else:
                model, levels, interruption = asyncio.run(measure(options, server.address))
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    answer: dict[str, Any] = {"bench": "serve_load", "model": Path(model).name, "machine": name_machine(), "cores": os.cpu_count()}
    answer |= {"date": date.today().isoformat(), "workers": options.workers if options.checkpoint else None}
    answer |= {"prompt_tokens": options.prompt_tokens, "max_tokens": options.max_tokens, "requests_per_client": options.requests_per_client}
    answer |= {"levels": [asdict(level) for level in levels], "speedups": find_speedups(levels)}
    answer |= {"pairs": [pair.describe() for pair in pairs]} if options.against else {}
    answer |= {"long_prompt": asdict(interruption) if interruption else None}
    if not options.json and options.against:
        print_pairs(pairs)
    elif not options.json:
        print_levels(levels)
        if interruption:
            print_interruption(interruption)
    print(json.dumps(answer))
    seen = [*levels, *(level for pair in pairs for level in (*pair.ours, *pair.theirs))]
    return 1 if any(level.failures for level in seen) else 0


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # The server that was started here ends with this program.
    raise SystemExit(main())
