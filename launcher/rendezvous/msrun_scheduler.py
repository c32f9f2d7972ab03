"""msrun's scheduler process (`MS_ROLE=MS_SCHED`): serves the ranks' key-value store and exits after all ranks have."""

import json
import sys
import time

from launcher.environment.detection import LaunchEnvironment
from launcher.rendezvous.key_value_store import open_store
from parallel.observed_time import ObservedTime
from parallel.torch_internals import PrefixStore

BEAT_SECONDS = 1.0
"""Heartbeat interval of a rank."""
REFUSED_KEY = "refused"
"""Key of the rank that refused its input and the reason, as JSON."""
_SILENCE_SECONDS = 60.0
"""A rank without a heartbeat for this long (or --timeout, if less) is considered dead; links can fail for a while."""
_FAREWELL_SECONDS = 10.0
"""After one rank has failed, how long the others may take to exit. After a refusal, they may still have to join and hear of it."""
_POLL_SECONDS = 0.1


def alive_key(rank: int) -> str:
    """Key of a rank's heartbeat."""
    return f"alive/{rank}"


def bye_key(rank: int) -> str:
    """Key of a rank's exit code."""
    return f"bye/{rank}"


def serve_ranks(environment: LaunchEnvironment, timeout_seconds: float) -> int:
    """Serve until all ranks have exited; returns 0 if all succeeded, 1 if any failed or did not join. Raises StoreError."""
    address, port, count = environment.master_addr, environment.master_port, environment.worker_num
    assert address is not None and port is not None and count is not None
    raw, _ = open_store(address, port)
    store = PrefixStore("tandem/attempt_0", raw)
    print(f"scheduler: serving {count} ranks on {address}, port {port}", file=sys.stderr, flush=True)
    clock, silence_seconds = ObservedTime(), min(_SILENCE_SECONDS, timeout_seconds)
    signs: dict[int, tuple[bytes, float]] = {}
    codes: dict[int, int] = {}
    failed_at: float | None = None
    is_refused = False
    while len(codes) < count:
        now = clock.read()
        for rank in range(count):
            if rank not in codes and store.check([bye_key(rank)]):
                codes[rank] = int(store.get(bye_key(rank)))
            elif store.check([alive_key(rank)]):
                sign = store.get(alive_key(rank))
                if rank not in signs or signs[rank][0] != sign:
                    signs[rank] = (sign, now)
                elif rank not in codes and now - signs[rank][1] > silence_seconds:
                    print(f"scheduler: rank {rank} is dead: no heartbeat for {silence_seconds:g} s", file=sys.stderr)
                    codes[rank] = 1
        missing = [rank for rank in range(count) if rank not in signs and rank not in codes]
        if missing and now > timeout_seconds:
            here = count - len(missing)
            limit = "--timeout" if environment.join_seconds != timeout_seconds else "MS_TOPO_TIMEOUT"
            words = f"rank {missing[0]} did not join within {timeout_seconds:g} s ({limit}): {here} of {count} have joined"
            print(f"scheduler: {words}", file=sys.stderr)
            return 1
        if not is_refused and store.check([REFUSED_KEY]):
            is_refused = True
            rank, reason = json.loads(store.get(REFUSED_KEY))
            print(f"scheduler: rank {rank} refused its input: {reason}", file=sys.stderr, flush=True)
        if any(codes.values()):
            failed_at = now if failed_at is None else failed_at
            if now - failed_at > _FAREWELL_SECONDS and not (is_refused and missing):
                return 1
        time.sleep(_POLL_SECONDS)
    return int(any(codes.values()))
