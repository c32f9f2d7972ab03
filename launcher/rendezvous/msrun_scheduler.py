"""The process that msrun calls the scheduler (`MS_ROLE=MS_SCHED`): it serves the ranks' key-value store and ends when they have.

Knows signs of life and farewells; nothing of what ranks do.
"""

import sys
import time

from torch.distributed.distributed_c10d import PrefixStore

from launcher.environment.detection import LaunchEnvironment
from launcher.rendezvous.key_value_store import open_store

BEAT_SECONDS = 1.0
"""How often a rank shows that it lives."""
_SILENCE_SECONDS = 10.0
_POLL_SECONDS = 0.1


def alive_key(rank: int) -> str:
    """Where a rank shows that it lives."""
    return f"alive/{rank}"


def bye_key(rank: int) -> str:
    """Where a rank leaves its exit code when it ends."""
    return f"bye/{rank}"


def serve_ranks(environment: LaunchEnvironment, timeout_seconds: float) -> int:
    """Serve until all ranks have ended; 0 when all ended well, 1 when not, or when not all came. Raises StoreError."""
    address, port, count = environment.master_addr, environment.master_port, environment.worker_num
    assert address is not None and port is not None and count is not None
    raw, _ = open_store(address, port)
    store = PrefixStore("tandem/attempt_0", raw)
    print(f"scheduler: serving {count} ranks at {address}, port {port}", file=sys.stderr, flush=True)
    started = time.monotonic()
    signs: dict[int, tuple[bytes, float]] = {}
    codes: dict[int, int] = {}
    failed_at: float | None = None
    while len(codes) < count:
        now = time.monotonic()
        for rank in range(count):
            if rank not in codes and store.check([bye_key(rank)]):
                codes[rank] = int(store.get(bye_key(rank)))
            elif store.check([alive_key(rank)]):
                sign = store.get(alive_key(rank))
                if rank not in signs or signs[rank][0] != sign:
                    signs[rank] = (sign, now)
                elif rank not in codes and now - signs[rank][1] > _SILENCE_SECONDS:
                    print(f"scheduler: rank {rank} has gone: no sign of life for {_SILENCE_SECONDS:g} s", file=sys.stderr)
                    codes[rank] = 1
        missing = [rank for rank in range(count) if rank not in signs and rank not in codes]
        if missing and now - started > timeout_seconds:
            here = count - len(missing)
            words = f"rank {missing[0]} did not come within {timeout_seconds:g} s (--timeout): {here} of {count} are here"
            print(f"scheduler: {words}", file=sys.stderr)
            return 1
        if any(codes.values()):
            failed_at = failed_at or now
            if now - failed_at > _SILENCE_SECONDS:
                return 1
        time.sleep(_POLL_SECONDS)
    return int(any(codes.values()))
