"""How busy the processors are with other things, and waiting until they are not.

Programs that spin at barriers (OpenMP) lose most on a busy machine, so a comparison there says little.
Linux only; elsewhere nothing is known.
"""

import time
from pathlib import Path

BUSY = 0.15
"""Share of all processors' time from which a machine counts as busy."""
_LOOK_SECONDS = 0.5


def parse_times(stat: str) -> tuple[int, int]:
    """Ticks that were not idle, and all, of the first line of /proc/stat; time stolen by other guests is not idle."""
    ticks = [int(word) for word in stat.splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def measure_busy_share() -> float:
    """Between two looks half a second apart; 0 where it is not known."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    busy, total = parse_times(stat.read_text())
    time.sleep(_LOOK_SECONDS)
    later_busy, later_total = parse_times(stat.read_text())
    return (later_busy - busy) / max(1, later_total - total)


def wait_until_quiet(seconds: float) -> float:
    """Wait up to `seconds`; the busy share then."""
    deadline = time.monotonic() + seconds
    while (share := measure_busy_share()) >= BUSY and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return share
