"""Stands for `tandem serve`: streams words that follow from the prompt, with delays and faults as the options say; ranks only sleep."""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

MAX_BODY_BYTES = 1 << 20
CONTEXT_TOKENS = 2048


class FakeServer:
    """All of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.prefill = asyncio.Lock()
        self.ready = asyncio.Event()
        self.ready.set()
        self.served = self.refused = self.running = self.blocks = self.restarts = 0
        self.leaked: list[bytearray] = []
        self.ranks = [self.start_rank() for _ in range(options.workers)]

    def start_rank(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["sleep", str(self.options.rank_seconds)])

    async def watch(self) -> None:
        """Ranks that die come again."""
        while True:
            await asyncio.sleep(0.01)
            dead = [index for index, rank in enumerate(self.ranks) if rank.poll() is not None]
            if dead:
                self.ready.clear()
                await asyncio.sleep(0.05)
                self.restarts += not self.options.silent_restarts
                for index in dead:
                    self.ranks[index] = self.start_rank()
                self.ready.set()

    def is_turn(self, every: int) -> bool:
        return bool(every) and self.served > self.options.faults_after and self.served % every == 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
            size = int(headers.get("content-length", 0))
            if size > MAX_BODY_BYTES:
                self.reply(writer, 413, {"error": {"message": "too large"}})
            elif self.options.key and path != "/health" and headers.get("authorization") != f"bearer {self.options.key}":
                self.reply(writer, 401, {"error": {"code": "invalid_api_key"}})
            elif method == "POST" and path == "/v1/completions":
                await self.complete(await reader.readexactly(size), writer)
            else:
                routes: dict[str, dict[str, Any]] = {
                    "/health": {"status": "ok"},
                    "/v1/models": {"data": [{"id": "fake"}]},
                    "/status": self.tell_status(),
                }
                found = routes.get(path) if method == "GET" else None
                self.reply(writer, 200 if found else 404, found or {"error": {}})
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    def reply(self, writer: asyncio.StreamWriter, status: int, answer: dict[str, Any], *more: str) -> None:
        body = json.dumps(answer).encode()
        lines = [f"HTTP/1.1 {status} -", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    def tell_status(self) -> dict[str, Any]:
        ranks = [{"rank": index, "pid": rank.pid} for index, rank in enumerate(self.ranks)]
        status = {"state": "ready" if self.ready.is_set() else "recovering", "running": self.running, "waiting": 0, "ranks": ranks}
        return {**status, "blocks_used": self.blocks, "context_tokens": CONTEXT_TOKENS, "restarts": self.restarts}

    async def complete(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            request = json.loads(body)
            prompt, count = request["prompt"].split(), int(request["max_tokens"])
        except (ValueError, AttributeError):
            return self.reply(writer, 400, {"error": {"message": "not a request"}})
        if request["model"] != "fake":
            return self.reply(writer, 404, {"error": {"message": "no such model"}})
        if len(prompt) + count > CONTEXT_TOKENS:
            return self.reply(writer, 400, {"error": {"message": "too long"}})
        if self.options.refuse > self.refused and self.served > self.options.faults_after:
            self.refused += 1
            return self.reply(writer, 429, {"error": {"message": "full"}}, "Retry-After: 0.05")
        self.served += 1
        if self.is_turn(self.options.fail_every):
            return self.reply(writer, 500, {"error": {"message": "failed"}})
        self.leaked.append(bytearray(b"x" * self.options.leak_bytes))
        if self.options.leak_files:
            os.dup(0)
        self.running += 1
        self.blocks += 1
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            async for event in self.stream(prompt, count):
                data = f"data: {event}\n\n".encode()
                writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            self.blocks -= 1
        except ConnectionError:
            self.blocks -= not self.options.leak_left
        finally:
            self.running -= 1

    async def stream(self, prompt: list[str], count: int) -> AsyncIterator[str]:
        duplicate, drop, cut = (
            self.is_turn(every) for every in (self.options.duplicate_every, self.options.drop_every, self.options.cut_every)
        )
        async with self.prefill:
            await asyncio.sleep(self.options.first_seconds + len(prompt) * self.options.prompt_seconds)
        chance = random.Random(" ".join(prompt))
        for index in range(count):
            await asyncio.sleep(self.options.token_seconds if index else 0)
            await self.ready.wait()
            choice = {"text": f" {chance.randrange(10**6)}", "finish_reason": None}
            event = json.dumps({"choices": [choice]})
            if cut and index == count // 2:
                raise ConnectionError
            if not (drop and index == count // 2):
                yield event
            if duplicate and index == count // 2:
                yield event
        yield json.dumps({"choices": [{"text": "", "finish_reason": "length"}]})
        yield json.dumps({"choices": [], "usage": {"prompt_tokens": len(prompt), "completion_tokens": count}})
        yield "[DONE]"


async def serve(options: argparse.Namespace) -> None:
    """Until SIGTERM."""
    fake, end = FakeServer(options), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    watching = asyncio.ensure_future(fake.watch())
    server = await asyncio.start_server(fake.answer, options.host, options.port)
    await end.wait()
    server.close()
    watching.cancel()
    for rank in fake.ranks[options.leave_ranks :]:
        rank.kill()


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    assert sys.argv.pop(1) == "serve"
    for name in ("checkpoint", "host", "api-key-file", "key"):
        parser.add_argument(f"--{name}")
    for name in ("workers", "port", "refuse", "faults-after", "fail-every", "duplicate-every", "drop-every", "cut-every"):
        parser.add_argument(f"--{name}", type=int, default=0)
    for name in ("leak-bytes", "leave-ranks"):
        parser.add_argument(f"--{name}", type=int, default=0)
    for name in ("leak-left", "leak-files", "silent-restarts", "die"):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("first-seconds", "token-seconds", "prompt-seconds"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--rank-seconds", type=int, default=60)
    options = parser.parse_args()
    if options.die:
        sys.exit("RuntimeError: no such checkpoint")
    asyncio.run(serve(options))


if __name__ == "__main__":
    main()
