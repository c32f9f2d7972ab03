"""A clock that stands still while its reader does not run."""

import pytest

from parallel import observed_time
from parallel.observed_time import ObservedTime


def test_short_gaps_count_and_of_a_long_one_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(observed_time.time, "monotonic", lambda: now[0])
    clock = ObservedTime()
    for _ in range(20):
        now[0] += 0.25
        clock.read()
    assert clock.read() == 5.0
    now[0] += 3600  # frozen
    assert clock.read() == 6.0
    now[0] += 0.5
    assert clock.read() == 6.5
