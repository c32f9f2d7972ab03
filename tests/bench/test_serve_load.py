"""serve_load.py: figures of answers whose times are known, and the whole program against a server with known delays."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from completion_client import OK, Answer
from own_server import open_server
from serve_level import percentile, summarize
from serve_load import find_speedups, main, parse

FAKE = shlex.join([sys.executable, str(Path(__file__).with_name("fake_server.py"))])


def measure(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    """The JSON object of a run with the fake server."""
    assert main(["--checkpoint", "none", "--tandem", FAKE, *words]) == code
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(20, 0, -1)]
    assert [percentile(values, share) for share in (0.05, 0.5, 0.95, 1.0)] == [1, 10, 19, 20]
    assert percentile([3.0], 0.95) == 3


def test_figures_follow_from_the_times() -> None:
    def answer(started: float, *times: float, outcome: str = OK, refusals: tuple[int, ...] = ()) -> Answer:
        return Answer(outcome=outcome, started=started, ended=9, times=times, completion_tokens=10, prompt_tokens=7, refusals=refusals)

    answers = [answer(0, 1, 1.5, 2.5), answer(1, 4, 4.25, refusals=(429, 429)), answer(0, outcome="500"), answer(0, 1, outcome="cut")]
    level = summarize(4, [*answers, answer(0)], 4.0, 1.0)
    assert (level.clients, level.requests, level.tokens, level.prompt_tokens, level.refused) == (4, 5, 20, 7, 2)
    assert level.failures == {"500": 1, "cut": 1, "nothing came": 1}
    assert (level.tokens_per_second, level.requests_per_second, level.client_cpu_share) == (5, 0.5, 0.25)
    assert (level.first_token_seconds, level.first_token_seconds_95) == (2, 3)
    assert (level.between_tokens_seconds, level.between_tokens_seconds_95, level.between_tokens_seconds_worst) == (0.5, 1, 1)


def test_nothing_that_worked_has_no_times() -> None:
    level = summarize(1, [Answer(outcome="500", started=0, ended=1)], 1.0)
    assert (level.tokens_per_second, level.first_token_seconds, level.between_tokens_seconds) == (0, None, None)
    assert find_speedups([level]) == {}


def test_delays_of_the_server_are_found_again(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--clients", "1,4", "--requests-per-client", "2", "--prompt-tokens", "8", "--max-tokens", "12"]
    answer = measure(capsys, *words, "--", "--first-seconds", "0.02", "--token-seconds", "0.01")
    one, four = answer["levels"]
    assert [(level["clients"], level["requests"], level["tokens"]) for level in (one, four)] == [(1, 2, 24), (4, 8, 96)]
    assert (one["failures"], one["refused"], one["prompt_tokens"]) == ({}, 0, 8)
    # No sleep is shorter than it should be; how much longer it is hangs on the machine.
    assert one["first_token_seconds"] >= 0.02
    assert one["between_tokens_seconds_worst"] >= 0.01
    assert one["seconds"] >= 2 * (0.02 + 11 * 0.01)
    assert one["tokens_per_second"] == pytest.approx(24 / one["seconds"])
    assert answer["speedups"]["4"] == pytest.approx(four["tokens_per_second"] / one["tokens_per_second"])
    assert answer["speedups"]["4"] > 1


def test_refusals_are_obeyed_and_failures_counted(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--clients", "2", "--requests-per-client", "6", "--max-tokens", "4", "--json"]
    options = ["--refuse", "3", "--fail-every", "5", "--cut-every", "7", "--faults-after", "1"]
    answer = measure(capsys, *words, "--", *options, code=1)
    (level,) = answer["levels"]
    # 13 requests are served: the first only counts the tokens of a word.
    assert level["failures"] == {"500": 2, "cut": 1}
    assert (level["refused"], level["requests"], level["tokens"]) == (3, 12, 9 * 4)
    assert answer["speedups"] == {}


def test_short_prompts_wait_behind_a_long_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--clients", "1", "--requests-per-client", "1", "--max-tokens", "2", "--long-prompt", "2000"]
    found = measure(capsys, *words, "--", "--prompt-seconds", "0.0003")["long_prompt"]
    assert (found["long_prompt_tokens"], found["alone_tokens"]) == (2000, 512)
    assert found["short_requests"] >= 1
    assert found["alone_seconds"] >= 512 * 0.0003
    assert found["ratio"] == pytest.approx(found["first_token_seconds"] / found["alone_seconds"])
    assert found["ratio_worst"] > 1


def test_table_names_every_number_of_clients_and_the_json_option_leaves_it_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", "none", "--tandem", FAKE, "--clients", "1,2", "--requests-per-client", "1", "--max-tokens", "2"]
    assert main(words) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:4]] == ["1", "2"]
    assert rows[2][2] == "1.00"
    assert main([*words, "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_key_is_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.write_text("abc\n")
    words = ["--clients", "1", "--requests-per-client", "1", "--max-tokens", "2"]
    measure(capsys, *words, "--api-key-file", str(key), "--", "--key", "abc")
    assert main(["--checkpoint", "none", "--tandem", FAKE, *words, "--", "--key", "abc"]) == 1
    assert "status 401" in capsys.readouterr().err


def test_a_server_that_does_not_start_ends_it_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", "none", "--tandem", FAKE, "--", "--die"]) == 1
    assert "exit code 1: RuntimeError: no such checkpoint" in capsys.readouterr().err
    assert main(["--url", "http://127.0.0.1:1"]) == 1
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--url", "http://a", "--checkpoint", "b"], ["--url", "http://a", "--", "--x"], ["--url", "a"]])
def test_options_that_name_no_server_or_two_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)


def test_another_server_is_measured_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    slow = ["--checkpoint", "none", "--tandem", FAKE, "--", "--token-seconds", "0.02"]
    words = [
        "--checkpoint",
        "none",
        "--tandem",
        FAKE,
        "--clients",
        "1,2",
        "--requests-per-client",
        "2",
        "--max-tokens",
        "8",
        "--rounds",
        "2",
    ]
    with open_server(parse(slow)) as other:
        url = f"http://{other.address.host}:{other.address.port}"
        assert main([*words, "--against", url, "--", "--token-seconds", "0.002"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in table[2:]] == ["1", "2"]
    for pair in json.loads(last)["pairs"]:
        assert len(pair["ours"]) == len(pair["theirs"]) == 2
        assert pair["ratios"]["tokens_per_second"] > 1 > pair["ratios"]["between_tokens_seconds"]
