"""Server log on standard error: one line per request, and throughput while busy."""

import asyncio
import logging
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.server.engine_client import EngineClient

THROUGHPUT_SECONDS = 10.0
POLLED_PATHS = frozenset({"/health", "/metrics", "/status"})
"""Paths polled by monitoring; logged at debug level."""
_log = logging.getLogger("tandem.server")


def configure_log(level: str) -> None:
    """Log to standard error at `level` and above: error, warning, info or debug."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    _log.handlers, _log.propagate = [handler], False
    _log.setLevel(level.upper())


def log_request(scope: MutableMapping[str, Any], status: int, seconds: float, caller: str | None = None) -> None:
    """Log one completed HTTP request."""
    level = logging.DEBUG if scope["path"] in POLLED_PATHS else logging.INFO
    if _log.isEnabledFor(level):
        client = caller or (scope.get("client") or ("-",))[0]
        # Escape the path so that clients cannot forge log lines.
        path = scope["path"][:200].encode("unicode_escape").decode()
        _log.log(level, '%s "%s %s" %d %.2f s', client, scope["method"], path, status, seconds)


async def log_throughput(front: "EngineClient") -> None:
    """Log throughput every THROUGHPUT_SECONDS while requests run or wait. Runs on the event loop until cancelled."""
    while True:
        await asyncio.sleep(THROUGHPUT_SECONDS)
        if _log.isEnabledFor(logging.INFO):
            found = front.describe()
            if found["running"] or found["waiting"] or found["tokens_per_second"]:
                _log.info(describe_throughput(found))


def describe_throughput(found: dict[str, Any]) -> str:
    """Format a log line from the result of `EngineClient.describe`."""
    return (
        f"decode {found['tokens_per_second']:.1f} tokens/s, prefill {found['prompt_tokens_per_second']:.1f} tokens/s, "
        f"{found['running']} running, {found['waiting']} waiting, KV cache {found['blocks_used'] / max(1, found['blocks_total']):.0%} used"
    )
