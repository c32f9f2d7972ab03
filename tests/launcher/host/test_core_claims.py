"""Cores that runs claim: never the same ones, free again when a run ends in any way, and none where others have chosen."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from launcher.host import core_claims
from launcher.host.core_claims import claim_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A host of eight cores in two nodes, and claims that runs outside this test do not see."""
    online = tmp_path / "online"
    online.write_text("0-7\n")
    monkeypatch.setattr(core_claims, "_ONLINE", online)
    monkeypatch.setattr(core_claims, "_NAME", f"tandem-test-{os.getpid()}")
    monkeypatch.setattr(core_claims, "read_nodes", lambda: {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)})
    monkeypatch.setattr(core_claims, "count_cores", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    yield online


def test_runs_get_different_cores_until_none_are_left_and_give_them_back() -> None:
    with claim_cores(2, 1) as first, claim_cores(2, 2) as second, claim_cores(2, 1) as third, claim_cores(1, 1) as fourth:
        assert first == ((0,), (4,))
        assert second == ((1, 2), (5, 6))
        assert third == ((3,), (7,))
        assert fourth is None
    with claim_cores(8, 1) as whole:
        assert whole is not None and sorted(core for cores in whole for core in cores) == list(range(8))


def test_a_run_that_is_not_bound_keeps_others_from_all_of_its_cores() -> None:
    for options in ((9, 1, True), (1, 9, True), (2, 1, False)):
        with claim_cores(options[0], options[1], may_bind=options[2]) as cores:
            assert cores is None
            with claim_cores(1, 1) as other:
                assert other is None
        with claim_cores(1, 1) as other:
            assert other is not None


@pytest.mark.parametrize("restriction", ["affinity", "quota", "unknown"])
def test_cores_that_something_else_has_chosen_are_left_as_they_are(
    restriction: str, monkeypatch: pytest.MonkeyPatch, eight_cores: Path
) -> None:
    if restriction == "affinity":
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    elif restriction == "quota":
        monkeypatch.setattr(core_claims, "count_cores", lambda: 6)
    else:
        eight_cores.unlink()
    with claim_cores(1, 1) as cores:
        assert cores is None


def test_runs_that_start_together_are_never_bound_to_the_same_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one claims between the first one's look and its claim."""
    plain, held = core_claims._claim, ExitStack()

    def claim(cores: Any, claims: ExitStack) -> str:
        monkeypatch.setattr(core_claims, "_claim", plain)
        other = held.enter_context(claim_cores(2, 4))
        assert other is not None
        return plain(cores, claims)

    monkeypatch.setattr(core_claims, "_claim", claim)
    with held, claim_cores(2, 1) as cores:
        assert cores is None


def test_a_name_of_scattered_cores_names_them_all() -> None:
    with ExitStack() as claims:
        core_claims._claim(range(0, 400, 2), claims)
        assert set(range(0, 400, 2)) <= core_claims._read_claims()
    with ExitStack() as claims:
        core_claims._claim((0, 1, 2, 5, 7, 8), claims)
        assert core_claims._read_claims() == {0, 1, 2, 5, 7, 8}


def _hold(line: Any) -> None:
    with claim_cores(2, 4) as cores:
        line.send(cores)
        signal.pause()


def test_the_claim_of_a_killed_run_is_gone() -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(there,))
    process.start()
    assert here.recv() == ((0, 1, 2, 3), (4, 5, 6, 7))
    with claim_cores(1, 1) as cores:
        assert cores is None
    process.kill()
    process.join()
    with claim_cores(1, 1) as cores:
        assert cores == ((0,),)


def test_claims_that_cannot_be_read_bind_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(core_claims, "_CLAIMS", tmp_path / "none")
    with claim_cores(1, 1) as cores:
        assert cores is None
