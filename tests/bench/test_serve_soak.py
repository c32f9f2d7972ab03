"""serve_soak.py against a server that behaves, and against servers that repeat, lose, leak or leave."""

import asyncio
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import serve_soak
from http_client import Address
from leak_watch import Growth, Sample, compare_tenths, count_descriptors, is_descendant, judge_growth, judge_idle, read_rss_bytes
from malformed_requests import KINDS
from own_server import find_free_port, is_healthy
from serve_soak import main

FAKE = shlex.join([sys.executable, str(Path(__file__).with_name("fake_server.py"))])
QUICK = ["--clients", "8", "--prompts", "4", "--max-tokens", "8", "--silence-seconds", "0.05", "--sample-seconds", "0.02"]
IDLE = {"state": "ready", "running": 0, "waiting": 0, "blocks_used": 0, "restarts": 1}


def soak(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    """The JSON object of a run with the fake server."""
    assert main(["--checkpoint", "none", "--tandem", FAKE, *QUICK, "--idle-seconds", "0.2", *words]) == code
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_every_request_is_answered_though_ranks_are_killed_and_clients_misbehave(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--chaos", "--kill-seconds", "0.1", "--malformed", "--requests", "240", "--idle-seconds", "10"]
    answer = soak(capsys, *words, "--", "--token-seconds", "0.002")
    assert (answer["faults"], answer["first_faults"], answer["requests"]) == (0, [], 240)
    assert answer["kills"] >= 1
    assert 1 <= answer["restarts"] <= answer["kills"]
    assert answer["tokens"] == 216 * 8
    assert answer["malformed"].keys() == {kind.name for kind in KINDS}
    assert {name: set(answer["malformed"][name]) for name in ("bad JSON", "unknown model", "left in the stream")} == {
        "bad JSON": {"400"},
        "unknown model": {"404"},
        "left in the stream": {"left"},
    }
    assert answer["blocks_used_idle"] == 0
    assert {"server"} <= answer["memory"].keys() <= {"server", "rank 0", "rank 1"}


def test_slow_clients_get_every_token(capsys: pytest.CaptureFixture[str]) -> None:
    answer = soak(capsys, "--slow", "--slow-seconds", "0.01", "--requests", "30", "--", "--token-seconds", "0.002")
    assert (answer["faults"], answer["first_faults"], answer["requests"]) == (0, [], 30)


def test_a_freeze_stops_the_server_and_its_ranks_and_continues_them(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    pids = [process.pid for process in processes]
    plan: Any = SimpleNamespace(
        server_pid=pids[0],
        target=SimpleNamespace(address=None),
        options=SimpleNamespace(freeze_seconds=0.2),
        find_ranks=lambda status: {rank: pid for rank, pid in enumerate(pids[1:])},
    )

    async def read_nothing(address: Any) -> None:
        return None

    def read_states() -> list[str]:
        return [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids]

    async def run(tally: serve_soak.Tally) -> list[str]:
        work = asyncio.create_task(serve_soak.freeze(plan, tally))
        await asyncio.sleep(0.1)
        frozen = read_states()
        await work
        return frozen

    monkeypatch.setattr(serve_soak, "read_status", read_nothing)
    tally = serve_soak.Tally()
    try:
        assert asyncio.run(run(tally)) == ["T"] * 3
        assert "T" not in read_states() and tally.freezes == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_time_ends_it_where_no_number_of_requests_does(capsys: pytest.CaptureFixture[str]) -> None:
    answer = soak(capsys, "--minutes", "0.005", "--", "--token-seconds", "0.002")
    assert answer["faults"] == 0
    assert answer["requests"] > 8


def test_what_is_twice_missing_cut_or_failed_is_a_fault_each(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--faults-after", "5", "--duplicate-every", "7", "--drop-every", "11", "--cut-every", "13", "--fail-every", "17"]
    # A busy machine may take long to become idle, which would be one more fault.
    answer = soak(capsys, "--requests", "30", "--idle-seconds", "10", "--", *options, code=1)
    # The first 5 count the tokens of a word and are the undisturbed run, so that number 6 to 35 are compared.
    kinds = [fault.partition("): ")[2] for fault in answer["first_faults"]]
    counts = {start: sum(kind.startswith(start) for kind in kinds) for start in ("twice", "missing", "cut", "500")}
    assert counts == {"twice": 5, "missing": 3, "cut": 2, "500": 2}
    assert answer["faults"] == 12


def test_leaks_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--malformed", "--requests", "100"]
    answer = soak(capsys, *words, "--", "--token-seconds", "0.01", "--leak-left", "--leak-bytes", "2000000", "--leak-files", code=1)
    blocks, memory, files = answer["first_faults"]
    assert "blocks leaked" in blocks
    assert "memory of server grew" in memory
    assert "files or connections are open" in files


def test_restarts_that_are_not_told_are_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--chaos", "--kill-seconds", "0.05", "--requests", "40", "--idle-seconds", "10"]
    answer = soak(capsys, *words, "--", "--token-seconds", "0.01", "--silent-restarts", code=1)
    assert answer["first_faults"] == [f"{answer['kills']} kills, but no restart is reported"]


def test_a_rank_that_outlives_the_server_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    answer = soak(capsys, "--requests", "8", "--", "--leave-ranks", "1", "--rank-seconds", "10", code=1)
    assert answer["first_faults"] == ["rank 0 lives without its server"]


def test_answers_that_are_not_right_for_a_malformed_request_are_refused() -> None:
    by_name = {kind.name: kind for kind in KINDS}
    right = [
        ("bad JSON", "400"),
        ("bad JSON", "422"),
        ("body too large", "closed"),
        ("left in the stream", "left"),
        ("half a header", "408"),
    ]
    wrong = [("bad JSON", "200"), ("bad JSON", "500"), ("bad JSON", "closed"), ("bad JSON", "429"), ("unknown route", "400, cut")]
    wrong += [("left in the stream", "400"), ("half a header", "timeout"), ("half a header", "404")]
    assert [pair for pair in right if not by_name[pair[0]].accepts(pair[1])] == []
    assert [pair for pair in wrong if by_name[pair[0]].accepts(pair[1])] == []


def test_memory_is_compared_between_the_first_and_the_last_tenth() -> None:
    samples = [Sample({"server": 100 + index, **({"rank 0": 50} if index % 2 else {})}) for index in range(40)]
    assert compare_tenths(samples) == {"rank 0": Growth(50, 50), "server": Growth(101.5, 137.5)}
    assert compare_tenths([Sample({"server": 1})]) == {}
    assert judge_growth({"a": Growth(1e9, 1.09e9), "b": Growth(1e6, 30e6)}) == []
    assert judge_growth({"a": Growth(1e9, 1.2e9)}) == ["memory of a grew from 1000 to 1200 MB"]


def test_status_behind_all_requests_has_to_be_idle() -> None:
    assert judge_idle(IDLE, IDLE, kills=0) == []
    assert judge_idle({**IDLE, "restarts": None}, IDLE, kills=1) == []
    assert judge_idle(IDLE, None, kills=0) == ["no answer from /status when all requests were done"]
    assert len(judge_idle(IDLE, {**IDLE, "state": "recovering", "running": 1, "waiting": 2, "blocks_used": 3}, kills=1)) == 5


def test_only_living_processes_that_descend_from_the_server_are_its_ranks() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert is_descendant(child.pid, os.getpid())
        assert not is_descendant(os.getpid(), child.pid)
        assert read_rss_bytes(child.pid)
        assert count_descriptors(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_descendant(child.pid, os.getpid())
    assert read_rss_bytes(child.pid) is None
    assert count_descriptors(child.pid) is None


@pytest.mark.parametrize("words", [["--checkpoint", "none"], ["--url", "http://127.0.0.1:1", "--minutes", "1", "--chaos"]])
def test_a_soak_without_an_end_or_of_an_unknown_process_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)


def test_ranks_of_another_process_are_not_killed(capsys: pytest.CaptureFixture[str]) -> None:
    command = [*shlex.split(FAKE), "serve", "--workers", "1", "--host", "127.0.0.1", "--port"]
    port = find_free_port()
    with subprocess.Popen([*command, str(port)]) as server, subprocess.Popen(["sleep", "60"]) as other:
        address = Address("127.0.0.1", port)
        while not is_healthy(address):
            assert server.poll() is None
        assert main(["--url", f"http://127.0.0.1:{port}", "--server-pid", str(other.pid), "--chaos", "--minutes", "1"]) == 2
        other.kill()
        server.terminate()
    assert "nothing can be killed" in capsys.readouterr().err
