"""The process that starts the ranks, begun before this process knows its job: both import at the same time."""

from launcher.supervision.rank_starter import RankStarter

_begun: list[RankStarter] = []
"""At most one."""


def begin_starter(*, preload: bool = True) -> None:
    """Begin the process. It ends with this one if no rank is started."""
    _begun[:] = [RankStarter(preload=preload)]


def take_starter(*, preload: bool = True) -> RankStarter:
    """Return the process that was begun, or another one. The caller closes it."""
    return _begun.pop() if _begun and _begun[0].preload == preload else RankStarter(preload=preload)
