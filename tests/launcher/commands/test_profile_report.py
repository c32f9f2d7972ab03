"""Spans of two made-up ranks: what their time goes to, who waited for whom, and the trace of them."""

import io

from launcher.commands.profile_report import build_trace, cut_spans, find_waits, print_profile

NAMES = [
    "gather_columns",
    "barrier",
    "decode",
    "layers.0.qkv_proj",
    "layers.0.o_proj",
    "lm_head",
    "layers.0.down_proj.linears.0",
    "layers.0.down_proj",
]
FAST = [[3, 1000, 100], [0, 1150, 80], [4, 1230, 50], [0, 1280, 10], [6, 1300, 20], [7, 1295, 30], [5, 1400, 90], [2, 1000, 500]]
SLOW = [[3, 1000, 150], [0, 1200, 30], [4, 1230, 50], [0, 1280, 10], [6, 1300, 20], [7, 1295, 30], [5, 1400, 90], [2, 1000, 500]]
PROFILE = {"names": NAMES, "ranks": [FAST, SLOW]}


def test_every_moment_of_a_step_goes_to_one_operation() -> None:
    pieces = cut_spans(NAMES, FAST)
    assert sum(piece.duration for piece in pieces) == 500
    assert [(piece.layer, piece.operation, piece.duration) for piece in pieces] == [
        (0, "qkv_proj", 100),
        (0, "attention", 50),
        (0, "gather_columns after attention", 80),
        (0, "o_proj", 50),
        (0, "gather_columns after o_proj", 10),
        (0, "other", 5),
        (0, "down_proj", 5),
        (0, "down_proj", 20),
        (0, "down_proj", 5),
        (0, "other", 75),
        (None, "lm_head", 90),
        (None, "other", 10),
    ]


def test_spans_outside_of_steps_are_left_out() -> None:
    assert cut_spans(NAMES, [[1, 100, 50], [3, 200, 50]]) == []


def test_who_comes_first_waits_for_the_last() -> None:
    assert find_waits(NAMES, [FAST, SLOW]) == [{1: 50, 3: 0}, {1: 0, 3: 0}]


def test_other_numbers_of_gathers_tell_nothing_of_waiting() -> None:
    assert find_waits(NAMES, [FAST, SLOW[2:]]) == [{}, {}]


def test_the_trace_has_a_process_for_each_rank_in_microseconds() -> None:
    events = build_trace(PROFILE)["traceEvents"]
    assert [(e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M"] == [(0, "rank 0"), (1, "rank 1")]
    first = next(e for e in events if e["ph"] == "X" and e["name"] == "gather_columns")
    assert first == {
        "ph": "X",
        "name": "gather_columns",
        "cat": "collective",
        "pid": 0,
        "tid": 0,
        "ts": 1.15,
        "dur": 0.08,
        "args": {"waiting_us": 0.05},
    }


def test_the_tables_hold_the_whole_time() -> None:
    file = io.StringIO()
    print_profile(PROFILE, file)
    operations, layers = (part.split("┡")[1] for part in file.getvalue().split("┏")[1:])
    assert "attention" in operations and "layer 0" in layers and "outside" in layers
    assert operations.count("100.0%") == layers.count("100.0%") == 1
