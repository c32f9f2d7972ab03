"""The HTTP side of `tandem serve` with a fake engine in place of ranks: `python fake_engine.py
MAX_CLIENT_REQUESTS [KEY...]`. Prints its port and its limit of connections, serves until killed.

The real application, tokens by a rule: the k-th new token is 97 + k % 26.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launcher.commands.serve import HttpServer, listen
from launcher.job.messages import Add, Cancel, Command, RankReport, Report, Scores, Serving, Tokens
from launcher.server.app import build_app
from launcher.server.chat_rendering import ChatRenderer
from launcher.server.completion import Service
from launcher.server.connection_places import ConnectionPlaces, plan_connections
from launcher.server.engine_client import EngineClient, Served
from launcher.server.guard import Limits
from model.engine.choice import Choice
from model.engine.events import PromptScore, TokenEvent
from model.engine.request import Request
from model.text.tokenizer_settings import read_tokenizer_settings

CONTEXT = 512
TEMPLATE = """\
{%- for m in messages -%}
<{{ m.role }}> {{ m.content }}{% for call in m.tool_calls %} calls {{ call.function.name }}{{ call.function.arguments }}{% endfor %}
{% if m.content == 'divide' %}{{ 1 / 0 }}{% endif %}
{%- endfor -%}
"""


class ByteTokenizer:
    """One token a byte."""

    bos_token_id, eos_token_id, pad_token_id = 256, 257, None
    vocab_size = 258
    special_ids = frozenset((256, 257))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*([256] if add_special_tokens else []), *text.encode()]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


def build_chat(template: str) -> ChatRenderer:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "chat_template.jinja").write_text(template)
        return ChatRenderer(Path(folder), read_tokenizer_settings(Path(folder)))


class FakeEngine:
    """Answers like rank 0."""

    def __init__(self, front: EngineClient) -> None:
        self._front = front
        self._cancelled: set[int] = set()
        front.connect(self.take)
        front.on_event(
            Serving(
                world_size=1,
                threads_per_rank=1,
                device="cpu",
                dtype="float32",
                quantization="none",
                kernel="fake",
                collectives="identity",
                memory_bytes_per_second=1e9,
                hosts=("localhost",),
                pids=(1,),
            )
        )
        threading.Thread(target=self._report, daemon=True).start()

    def take(self, command: Command) -> None:
        if isinstance(command, Add):
            threading.Thread(target=self._decode, args=(command.request,), daemon=True).start()
        elif isinstance(command, Cancel):
            self._cancelled.add(command.index)

    def _decode(self, request: Request) -> None:
        params, index = request.params, request.index
        if params.prompt_logprobs:
            choices = [Choice(token, -2.0, ((65, -0.5),)) for token in request.prompt_ids]
            self._front.on_event(Scores(tuple(PromptScore(index, place, choice) for place, choice in enumerate(choices) if place)))
        for k in range(params.max_new_tokens):
            if index in self._cancelled:
                return
            reason = "length" if k + 1 == params.max_new_tokens else None
            token = 97 + k % 26
            logprob = -1.0 if params.logprobs else None
            top = ((token, -1.0),) * params.top_logprobs
            self._front.on_event(Tokens((TokenEvent(index, token, logprob, reason, k, top),)))

    def _report(self) -> None:
        while True:
            row = RankReport(step_seconds=0.001, gather_seconds=0.0, rss_bytes=1)
            self._front.on_event(Report(ranks=(row,), slowest_seconds=0.001, blocks_used=0, prefill_tokens=0))
            time.sleep(0.2)


def serve(max_client_requests: int, keys: tuple[bytes, ...]) -> None:
    """Print the port, then serve."""
    job: Any = SimpleNamespace(
        world_size=1, max_batch_size=4, context_tokens=CONTEXT, block_size=16, dtype="float32", eos_token_ids=(257,), adapters=()
    )
    config: Any = SimpleNamespace(vocab_size=258, num_hidden_layers=1)
    front = EngineClient(
        Served(name="fake", version="0", config=config, job=job, plans=[], num_blocks=1000, max_waiting=200, drain_seconds=1.0)
    )
    tokenizer = ByteTokenizer()
    service = Service(front, tokenizer, build_chat(TEMPLATE), 5.0)
    limits = Limits(api_keys=keys, checks_host=False, max_body_bytes=4_000_000, max_client_requests=max_client_requests)
    most = plan_connections(None, 1)
    listener = listen("127.0.0.1", 0)
    server = HttpServer(build_app(service, limits), listener, front, ConnectionPlaces(most, most))
    server.start()
    FakeEngine(front)
    print(listener.getsockname()[1], most, flush=True)
    server.join()


if __name__ == "__main__":
    serve(int(sys.argv[1]), tuple(key.encode() for key in sys.argv[2:]))
