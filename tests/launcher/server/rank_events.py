"""Events of rank 0 for tests of its parent, with values that no test looks at."""

from launcher.job.messages import RankReport, Report, Serving, Tokens
from model.engine.events import TokenEvent

SERVING = Serving(
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
REPORT = Report(
    ranks=(RankReport(step_seconds=0.5, gather_seconds=0.1, rss_bytes=7),), blocks_used=3, slowest_seconds=0.5, prefill_tokens=40
)


def token(index: int, position: int, token_id: int, reason: str | None = None) -> TokenEvent:
    """One new token."""
    return TokenEvent(index, token_id, None, reason, position)


def tokens(index: int, position: int, token_id: int, reason: str | None = None) -> Tokens:
    """A step that gave one token."""
    return Tokens((token(index, position, token_id, reason),))
