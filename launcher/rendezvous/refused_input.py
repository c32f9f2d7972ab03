"""Refused input under msrun's scheduler: the rank that refuses tells the others, which would wait for it until they time out.

Other launchers end all ranks when one has ended.
"""

import json
from contextlib import suppress

from launcher.environment.detection import LaunchEnvironment
from launcher.rendezvous.key_value_store import connect_store
from launcher.rendezvous.msrun_scheduler import REFUSED_KEY, bye_key
from parallel.errors import InputError, RunError
from parallel.torch_internals import PrefixStore, Store


class RefusedByRankError(InputError):
    """Another rank has refused its input."""


def tell_refusal(environment: LaunchEnvironment, reason: str, timeout_seconds: float) -> None:
    """Report to the scheduler, and through it to the other ranks, that this rank does not join. Gives up after the timeout."""
    assert environment.master_addr is not None and environment.master_port is not None and environment.rank is not None
    with suppress(RuntimeError, RunError):
        raw = connect_store(environment.master_addr, environment.master_port, timeout_seconds)
        store = PrefixStore(f"tandem/attempt_{environment.restart_count}", raw)
        store.set(REFUSED_KEY, json.dumps([environment.rank, reason]))
        store.set(bye_key(environment.rank), "2")


def raise_if_refused(store: Store) -> None:
    """Raise RefusedByRankError if a rank has refused its input."""
    if store.check([REFUSED_KEY]):
        rank, reason = json.loads(store.get(REFUSED_KEY))
        raise RefusedByRankError(f"rank {rank} refused its input: {reason}")
