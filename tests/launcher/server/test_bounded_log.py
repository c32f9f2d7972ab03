"""Reports whose number a client cannot drive."""

import logging

import pytest

from launcher.server.bounded_log import BoundedLog, BoundedRecords, OnceLog


def test_one_line_a_second_for_each_kind_with_a_count() -> None:
    written: list[str] = []
    now = 0.0
    log = BoundedLog(written.append, lambda: now)
    for now in (0.0, 0.1, 0.2, 0.9):
        log.report("a", f"a at {now}")
    log.report("b", "b")
    now = 1.0
    log.report("a", "a again")
    now = 5.0
    log.report("a", "a later")
    assert written == ["a at 0.0", "b", "a again (3 more of this kind since the last report)", "a later"]


def test_kinds_beyond_a_number_share_one_interval() -> None:
    written: list[str] = []
    log = BoundedLog(written.append, lambda: 0.0)
    for number in range(10_000):
        log.report(f"kind {number}", "x")
    assert len(written) == 101


def test_a_librarys_records_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    logger = logging.getLogger("test_bounded_log")
    logger.addFilter(BoundedRecords(lambda: now))
    for number in range(5):
        logger.warning("trouble %d", number)
    now = 2.0
    logger.warning("trouble %d", 5)
    assert caplog.messages == ["trouble 0", "trouble 5 (4 more of this kind since the last report)"]


def test_each_name_is_reported_once_up_to_a_number_of_names() -> None:
    written: list[str] = []
    log = OnceLog(written.append)
    for number in (*range(5), *range(5), *range(10_000)):
        log.report(str(number), f"name {number}")
    assert written == [*(f"name {number}" for number in range(100)), "further reports of this kind are suppressed"]
