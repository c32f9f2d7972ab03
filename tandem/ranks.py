"""`tandem.init()`: makes this process one of the ranks that its environment describes."""

import atexit
import json
import os
import sys
from contextlib import suppress

from launcher.environment.detection import LaunchEnvironment, read_environment
from launcher.rendezvous.launched_store import LaunchedStore
from launcher.rendezvous.msrun_scheduler import serve_ranks
from launcher.rendezvous.placement import find_alone, meet
from launcher.rendezvous.run_identity import describe_program
from launcher.supervision.rank_watch import read_state
from launcher.worker.rank_group import ENDED_KEY, RankGroup, describe_end, find_group, set_group

DEFAULT_TIMEOUT_SECONDS = 300.0


def init(*, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> RankGroup:
    """Join the ranks of the environment and return their group; `rank` and `world_size` are among its attributes.

    The environment is that of torchrun, msrun, srun, mpirun or `tandem run`; without a launcher this process is the only rank. Further
    calls return the same group. `timeout_seconds` limits the wait for a rank that makes no progress, or does not join (under msrun:
    MS_TOPO_TIMEOUT). In msrun's scheduler process it serves the ranks and then exits.

    Raises ConfigError for contradictory variables, RunError if a rank does not join, DifferentRunError for another version of the program.
    """
    group = find_group()
    if group is None:
        group = _join(read_environment(), timeout_seconds)
        set_group(group)
    return group


def _join(environment: LaunchEnvironment, timeout_seconds: float) -> RankGroup:
    join_seconds = environment.join_seconds or timeout_seconds
    if environment.is_scheduler:
        sys.exit(serve_ranks(environment, join_seconds))
    world_size = environment.world_size if environment.is_rank else 1
    if world_size is None or world_size == 1:
        return RankGroup(environment.launcher, find_alone(), None, timeout_seconds)
    rank, address = environment.rank, environment.master_addr
    assert rank is not None and address is not None
    launched = LaunchedStore(environment, join_seconds)
    seat = meet(launched.store, rank, world_size, address, describe_program(), join_seconds)
    own_pid = os.getpid()

    def is_over(other: int) -> bool:
        return other in seat.local_ranks and read_state(seat.pids[other]) in ("", "Z", "X")

    def leave() -> None:
        if os.getpid() == own_pid:  # not in a fork
            reason = describe_end()
            with suppress(RuntimeError):  # the store's host may have ended
                launched.store.compare_set(ENDED_KEY, "", json.dumps([rank, reason]))
            launched.announce_exit(int(bool(reason)), waits=True, is_over=is_over)

    atexit.register(leave)
    return RankGroup(environment.launcher, seat, launched.store, timeout_seconds)
