"""What a run shows of its tokens: every result once and in order, whatever an attempt says again."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from msgspec import structs

from launcher.job.messages import Failures, Stats, Tokens
from launcher.reporting.console import RunConsole, loading_progress
from launcher.reporting.printed_results import build_printer
from launcher.reporting.results import Record, ResultsFile, read_results
from model.engine.events import SequenceFailure, TokenEvent
from model.engine.request import Request
from model.engine.sampling_params import SamplingParams

PROMPTS = ["ab", "c", "de"]
STATS = Stats(
    world_size=2,
    threads_per_rank=1,
    device="cpu",
    dtype="float32",
    quantization="none",
    kernel="plain",
    collectives="shm",
    load_seconds=0.5,
    prefill_tokens_per_second=9.0,
    decode_tokens_per_second=8.0,
    time_to_first_token_seconds=0.1,
    speculated_tokens=0,
    accepted_tokens=0,
    acceptance_rate=None,
    weight_bytes=[1, 1],
    draft_weight_bytes=[0, 0],
    read_bytes=[1, 1],
    peak_rss_bytes=[1, 1],
    peak_device_bytes=[0, 0],
    adapter_bytes=[0, 0],
    kv_cache_dtype="float32",
    kv_cache_bytes_per_token=[1, 1],
)


class Letters:
    """A tokenizer whose id 1 is a, 2 is b, and 0 is the end."""

    bos_token_id: int | None = None
    eos_token_id: int | None = 0
    pad_token_id: int | None = None
    vocab_size = 27
    special_ids = frozenset((0,))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(96 + i) for i in ids if i)


TOKENIZER = Letters()
REQUESTS = [
    Request(i, tuple(TOKENIZER.encode(prompt)), SamplingParams(max_new_tokens=2, logprobs=True)) for i, prompt in enumerate(PROMPTS)
]
# (prompt, letter, finish reason, position), as two sequences at once would make them: prompt 1 ends first.
TOKENS = [(0, "x", None, 0), (1, "z", "eos", 0), (0, "y", "length", 1), (2, "v", None, 0), (2, "w", "length", 1)]
RESULTS = ["abxy", "cz", "devw"]


def say(console: RunConsole, tokens: Iterable[tuple[int, str, str | None, int]]) -> None:
    for index, letter, reason, position in tokens:
        token_id = ord(letter) - 96
        console.on_event(Tokens((TokenEvent(index, token_id, -token_id / 8, reason, position),)))


def build(path: Path | None = None, done: list[Record] | None = None) -> RunConsole:
    output = None if path is None else ResultsFile(path, done or (), resume=done is not None)
    return RunConsole(2, REQUESTS, PROMPTS, TOKENIZER, output, done or ())


def lines(results: Iterable[str]) -> str:
    return "".join(f"'text_generation_text': [{result!r}]\n" for result in results)


def test_results_come_in_the_order_of_the_prompts_each_as_soon_as_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    console, printed = build(), []
    for token in TOKENS:
        say(console, [token])
        printed.append(capsys.readouterr().out)
        assert console.is_done == (token is TOKENS[-1])
    assert printed == ["", "", lines(RESULTS[:2]), "", lines(RESULTS[2:])]


@pytest.mark.parametrize("cut", range(len(TOKENS) + 1))
def test_what_the_next_attempt_says_again_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int) -> None:
    path = tmp_path / "results.jsonl"
    console = build(path)
    say(console, TOKENS[:cut])
    say(console, TOKENS)
    assert capsys.readouterr().out == lines(RESULTS)
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [1, 0, 2]
    console.write(None, 1)
    found = read_results(path, REQUESTS, PROMPTS, TOKENIZER.vocab_size)
    assert [(r.index, r.prompt + r.text, r.token_ids, r.finish_reason, r.logprobs) for r in found] == [
        (0, "abxy", (24, 25), "length", (-3.0, -3.125)),
        (1, "cz", (26,), "eos", (-3.25,)),
        (2, "devw", (22, 23), "length", (-2.75, -2.875)),
    ]


def test_a_token_that_leaves_one_out_is_no_token_of_this_run() -> None:
    with pytest.raises(AssertionError, match="token 1 of prompt 0 came before 0"):
        say(build(), [TOKENS[2]])


@pytest.mark.parametrize("cut", range(len(TOKENS) + 1))
def test_what_is_left_to_do_holds_every_token_that_came(cut: int) -> None:
    console = build()
    say(console, TOKENS[:cut])
    task = console.plan_task()
    assert [(r.index, r.prompt_ids, r.params) for r in task.requests] == [(r.index, r.prompt_ids, r.params) for r in REQUESTS]
    for request in task.requests:
        mine = [(ord(letter) - 96, reason) for index, letter, reason, _ in TOKENS[:cut] if index == request.index]
        assert request.resumed_ids == tuple(token for token, _ in mine)
        assert request.known_reason == (mine[-1][1] if mine else None)


@pytest.mark.parametrize("again", [True, False])
def test_what_an_earlier_run_has_done_is_printed_in_its_place_or_not_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], again: bool
) -> None:
    path = tmp_path / "results.jsonl"
    say(build(path), TOKENS)
    undisturbed = path.read_text().splitlines(keepends=True)
    path.write_text("".join(undisturbed[:2]))
    capsys.readouterr()
    console = build(path, read_results(path, REQUESTS, PROMPTS, TOKENIZER.vocab_size))
    assert [request.known_reason for request in console.plan_task().requests] == ["length", "eos", None]
    assert [request.resumed_ids for request in console.plan_task().requests] == [(24, 25), (26,), ()]
    console.print_done(again=again)
    assert capsys.readouterr().out == (lines(RESULTS[:2]) if again else "")
    assert not console.is_done
    say(console, TOKENS[3:])
    assert console.is_done and capsys.readouterr().out == lines(RESULTS[2:])
    console.print_done(again=True)
    assert capsys.readouterr().out == ""
    console.write(None, 0)
    assert path.read_text().splitlines(keepends=True) == [undisturbed[1], undisturbed[0], undisturbed[2]]


def test_a_prompt_that_is_done_waits_for_those_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    say(build(path), TOKENS[:2])
    console = build(path, read_results(path, REQUESTS, PROMPTS, TOKENIZER.vocab_size))
    console.print_done()
    assert capsys.readouterr().out == ""
    say(console, [TOKENS[0], *TOKENS[2:]])
    assert capsys.readouterr().out == lines(RESULTS)


def test_the_way_back_is_measured_to_the_first_new_token_of_each_attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console, stats = build(), tmp_path / "stats.json"
    say(console, TOKENS[:2])
    for ago, cut in ((30.0, 2), (50.0, 3)):
        console.note_failure("rank 1 failed", time.time() - ago)
        say(console, TOKENS[:cut])  # nothing new
        say(console, TOKENS[cut : cut + 1])
    say(console, TOKENS[4:])
    console.on_event(STATS)
    console.close()
    console.write(stats, 2)
    written = json.loads(stats.read_text())
    assert list(written) == [*structs.asdict(STATS), "restarts", "recovery_seconds"]
    assert written["restarts"] == 2
    assert written["recovery_seconds"] == [pytest.approx(30, abs=5), pytest.approx(50, abs=5)]
    assert "decode 8.0 tokens/s" in capsys.readouterr().err


def test_no_failure_is_no_way_back(tmp_path: Path) -> None:
    console, stats = build(), tmp_path / "stats.json"
    console.write(stats, 0)
    assert not stats.exists()
    say(console, TOKENS)
    console.on_event(STATS)
    console.write(stats, 0)
    assert json.loads(stats.read_text())["recovery_seconds"] == []


def test_a_prompt_that_ends_with_an_error_is_a_record_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    console = build(path)
    say(console, TOKENS[:1])
    failure = Failures((SequenceFailure(0, 1, "the logits are NaN"),))
    console.on_event(failure)
    console.on_event(failure)  # another attempt finds the same
    assert not console.is_done
    say(console, [TOKENS[1], *TOKENS[3:]])
    assert console.is_done and console.failure == "prompt 0 ended with an error: the logits are NaN"
    console.write(None, 0)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["finish_reason"] for record in records] == ["error", "eos", "length"]
    assert records[0]["error"] == "the logits are NaN" and records[0]["text"] == "x" and "error" not in records[1]
    assert capsys.readouterr().out == lines(RESULTS[1:]), "no line looks like a result of it"
    done = read_results(path, REQUESTS, PROMPTS, 27)
    assert [record.index for record in done] == [1, 2], "it runs again"
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [1, 2]


def test_errors_of_several_prompts_are_one_sentence() -> None:
    console = build()
    for index in (2, 0):
        console.on_event(Failures((SequenceFailure(index, 0, f"cause {index}"),)))
    assert console.failure == "prompt 0 ended with an error: cause 0; so did 1 more of 3"


class Clock:
    """time.perf_counter as a test sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("launcher.reporting.console.time.perf_counter", lambda: self.now)


def test_progress_without_a_terminal_is_a_line_a_second_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, progress = Clock(monkeypatch), loading_progress(2)
    for seconds, done in ((0.0, 0), (0.2, 10_000_000), (0.9, 20_000_000), (1.1, 110_000_000), (1.9, 150_000_000), (2.2, 1_100_000_000)):
        clock.now = 100.0 + seconds
        progress(done, 1_100_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "loading, rank 0: 110.0 MB of 1.10 GB, 100.0 MB/s",
        "loading, rank 0: 1.10 GB of 1.10 GB, 500.0 MB/s",
    ]


def test_no_speed_is_told_of_work_that_was_too_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock, progress = Clock(monkeypatch), loading_progress(1)
    progress(0, 5000)
    clock.now += 0.4
    progress(5000, 5000)
    assert capsys.readouterr().err == "loading: 5 kB of 5 kB\n"


def build_text(prompts: list[str]) -> RunConsole:
    requests = [Request(i, tuple(TOKENIZER.encode(prompt)), SamplingParams(max_new_tokens=2)) for i, prompt in enumerate(prompts)]
    return RunConsole(1, requests, prompts, TOKENIZER, printer=build_printer("text", len(prompts), streams=True))


def test_text_is_printed_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    console, printed = build_text(["ab"]), []
    for token in TOKENS[0], TOKENS[2]:
        say(console, [token])
        printed.append(capsys.readouterr().out)
    assert printed == ["abx", "y\n"]


def test_texts_of_several_prompts_are_never_interleaved(capsys: pytest.CaptureFixture[str]) -> None:
    console, printed = build_text(PROMPTS), []
    for token in [TOKENS[3], *TOKENS[:3], TOKENS[4]]:
        say(console, [token])
        printed.append(capsys.readouterr().out)
    head = "=== prompt {} of 3 ===\n"
    assert printed == [
        "",
        f"{head.format(1)}abx",
        "",
        f"y\n\n{head.format(2)}cz\n\n{head.format(3)}dev",
        "w\n",
    ]


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole(1, REQUESTS, PROMPTS, TOKENIZER, printer=build_printer("json", 3, streams=True))
    say(console, TOKENS)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(record["index"], record["prompt"] + record["text"]) for record in found] == list(enumerate(RESULTS))
