"""A server for tests of the page: it serves the page, and answers what a test says. No model, no engine."""

import json
import queue
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from launcher.server.page_files import CONTENT_SECURITY_POLICY, read_page_files


def make_rank(rank: int, world_size: int) -> dict[str, Any]:
    """One of `world_size` ranks of /status; no two numbers are the same."""

    def owned(full: int) -> list[int]:
        return [full * rank // world_size, full * (rank + 1) // world_size]

    return {
        "rank": rank,
        "host": "node-a",
        "pid": 4000 + rank,
        "heads": owned(64),
        "kv_heads": owned(64),
        "hidden_rows": owned(8192),
        "intermediate_rows": owned(28672),
        "vocab_rows": owned(32000),
        "weight_bytes": 84_000_000 + 1_000_000 * rank,
        "kv_cache_bytes": 11_000_000 + 1_000_000 * rank,
        "rss_bytes": 338_000_000 + 1_000_000 * rank,
        "step_seconds": 0.0071 + 0.0001 * rank,
        "gather_seconds": 0.0012 + 0.0001 * rank,
        "bytes_per_second": 12.1e9 + 1e8 * rank,
        "memory_bytes_per_second": 17.6e9,
    }


def make_status(world_size: int = 2, **changes: Any) -> dict[str, Any]:
    """What /status says of a server that is ready."""
    status = {
        "model": "smollm2",
        "version": "0.1.0",
        "state": "ready",
        "uptime_seconds": 3723.4,
        "world_size": world_size,
        "num_layers": 30,
        "dtype": "bfloat16",
        "quantization": "A16W8",
        "kernel": "native-int8",
        "collectives": "shm",
        "context_tokens": 8192,
        "threads_per_rank": 1,
        "loading": None,
        "running": 3,
        "max_running": 16,
        "waiting": 7,
        "max_waiting": 256,
        "blocks_used": 412,
        "blocks_total": 1000,
        "block_size": 16,
        "tokens_per_second": 35.2,
        "prompt_tokens_per_second": 181.4,
        "time_to_first_token_seconds": 0.123,
        "requests_total": 17,
        "tokens_total": 9041,
        "restarts": 0,
        "last_failure": None,
        "system_prompt": "You are helpful.",
        "ranks": [make_rank(rank, world_size) for rank in range(world_size)],
    }
    return status | changes


@dataclass
class FakeServer:
    """Serves the page. Its fields say what it answers; `pieces` is what it streams: text, a delta, None at the
    end of an answer, an error's dict to break it off."""

    status: dict[str, Any] = field(default_factory=make_status)
    refusal: tuple[int, str] | None = None
    key: str | None = None
    gone: bool = False
    pieces: "queue.Queue[str | dict[str, Any] | None]" = field(default_factory=queue.Queue)
    asked: list[dict[str, Any]] = field(default_factory=list)
    num_status: int = 0
    aborted: threading.Event = field(default_factory=threading.Event)

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        if self.gone:
            return
        path = handler.path
        page = read_page_files().get(path)
        if page is not None:
            _send(handler, 200, page.content_type, page.content, ("Content-Security-Policy", CONTENT_SECURITY_POLICY))
        elif self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
            _send_json(handler, 401, {"error": {"message": "The API key is missing or wrong.", "code": "invalid_api_key"}})
        elif path == "/status":
            self.num_status += 1
            _send_json(handler, 200, self.status)
        elif path == "/v1/chat/completions" and self.refusal is not None:
            _send_json(handler, self.refusal[0], {"error": {"message": self.refusal[1]}}, ("Retry-After", "3"))
        elif path == "/v1/chat/completions":
            self.asked.append(json.loads(body))
            self._stream(handler)
        else:
            _send_json(handler, 404, {"error": {"message": f"There is no {path}."}})

    def _stream(self, handler: BaseHTTPRequestHandler) -> None:
        def send(event: dict[str, Any]) -> None:
            handler.wfile.write(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())

        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        try:
            send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
            num_pieces = 0
            while (piece := self._next(handler)) is not None:
                if isinstance(piece, dict) and "error" in piece:
                    return send(piece)
                num_pieces += 1
                delta = piece if isinstance(piece, dict) else {"content": piece}
                send({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            send({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            send({"choices": [], "usage": {"prompt_tokens": 21, "completion_tokens": num_pieces, "total_tokens": 21 + num_pieces}})
            handler.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.aborted.set()

    def _next(self, handler: BaseHTTPRequestHandler) -> str | dict[str, Any] | None:
        while True:
            try:
                return self.pieces.get(timeout=0.05)
            except queue.Empty:
                handler.wfile.write(b": wait\n\n")


def _send(handler: BaseHTTPRequestHandler, code: int, content_type: str, content: bytes, *headers: tuple[str, str]) -> None:
    handler.send_response(code)
    for name, value in (("Content-Type", content_type), ("Content-Length", str(len(content))), *headers):
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


def _send_json(handler: BaseHTTPRequestHandler, code: int, value: object, *headers: tuple[str, str]) -> None:
    _send(handler, code, "application/json", json.dumps(value).encode(), *headers)


def start_server(fake: FakeServer) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.answer(self, b"")

        def do_POST(self) -> None:
            fake.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server
