"""Order of programs in alternating rounds, and ratios between two of them."""

import pytest

from rounds import collect, compare, list_metrics, rotate_order, spread

ROUNDS = [
    {"tandem": {"prefill": 100.0, "decode@1": 20.0, "decode@8": 90.0}, "peer": {"prefill": 50.0, "decode@1": 25.0}},
    {"tandem": {"prefill": 80.0, "decode@1": 10.0, "decode@8": 80.0}, "peer": {"prefill": 20.0, "decode@1": 20.0}},
    {"tandem": {"prefill": 90.0, "decode@1": 30.0, "decode@8": 70.0}},
]


def test_every_program_has_every_place_once_in_as_many_rounds() -> None:
    names = ["a", "b", "c"]
    orders = [rotate_order(names, index) for index in range(3)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert rotate_order(names, 3) == names


def test_ratios_are_taken_within_a_round_and_only_of_what_both_gave() -> None:
    rows = {row["metric"]: row for row in compare(ROUNDS, ["tandem"], ["peer"])}
    assert set(rows) == {"prefill", "decode@1"}
    # The ratio of the medians would be 90 / 35: the machine of round 2 was slower for both.
    assert rows["prefill"]["median"] == pytest.approx(3.0)
    assert (rows["prefill"]["least"], rows["prefill"]["most"], rows["prefill"]["count"]) == (2.0, 4.0, 2)
    assert (rows["decode@1"]["least"], rows["decode@1"]["most"]) == (0.5, 0.8)


def test_a_peer_that_gave_nothing_has_no_ratio() -> None:
    assert compare([{"tandem": {"decode@1": 1.0}}], ["tandem"], ["peer"]) == []
    assert compare([{"tandem": {"decode@1": 1.0}, "peer": {"decode@1": 0.0}}], ["tandem"], ["peer"]) == []


def test_metrics_come_with_prefill_first_and_batches_by_size() -> None:
    assert list_metrics([{"a": {"decode@16": 1.0, "decode@2": 1.0, "prefill": 1.0}}]) == ["prefill", "decode@2", "decode@16"]


def test_spread_tells_median_least_and_most() -> None:
    one = spread(collect(ROUNDS, "tandem", "decode@1"))
    assert (one.median, one.least, one.most, one.count) == (20.0, 10.0, 30.0, 3)
