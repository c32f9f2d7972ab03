"""What the ranks of a program say to each other before they load a model, and what they do when one has ended."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from launcher.rendezvous.placement import RankPlacement
from launcher.worker.rank_group import ENDED_KEY, RankGroup
from parallel.errors import CheckpointError, ConfigError, RunError

TIMEOUT_SECONDS = 60.0


@pytest.fixture
def store() -> HashStore:
    return HashStore()


def join(store: HashStore, world_size: int) -> list[RankGroup]:
    many: dict[str, Any] = {"nodes": (0,) * world_size, "host_names": ("",) * world_size, "pids": (0,) * world_size}
    seats = [RankPlacement(rank=rank, **many) for rank in range(world_size)]
    return [RankGroup("torchrun", seat, store, TIMEOUT_SECONDS) for seat in seats]


def agree(group: RankGroup, model: str) -> str:
    def build() -> str:
        if not model:
            raise CheckpointError("no weights")
        return model

    return group.agree(build, lambda built: {"model": built})


def agree_together(groups: list[RankGroup], models: list[str]) -> list[object]:
    """The result or the error of each rank."""
    with ThreadPoolExecutor(len(groups)) as pool:
        futures = [pool.submit(agree, group, model) for group, model in zip(groups, models, strict=True)]
    return [future.exception() or future.result() for future in futures]


def test_ranks_with_equal_models_go_on(store: HashStore) -> None:
    assert agree_together(join(store, 3), ["m", "m", "m"]) == ["m", "m", "m"]


def test_a_refused_input_is_told_to_the_others(store: HashStore) -> None:
    refused, other = agree_together(join(store, 2), ["", "m"])
    assert isinstance(refused, CheckpointError)
    assert isinstance(other, ConfigError) and str(other) == "rank 0 cannot load the model: no weights"


@pytest.mark.parametrize(
    ("reason", "message"),
    [("no tokenizer", "rank 2 has ended: no tokenizer"), ("", "rank 2 has ended, but every rank has to make the same calls")],
)
def test_ranks_do_not_wait_for_one_that_has_ended(store: HashStore, reason: str, message: str) -> None:
    groups, started = join(store, 3), time.monotonic()
    store.set(ENDED_KEY, json.dumps([2, reason]))
    errors = agree_together(groups[:2], ["m", "m"])
    assert [(type(error), str(error)) for error in errors] == 2 * [(RunError, message)]
    assert time.monotonic() - started < TIMEOUT_SECONDS / 2


def test_a_rank_that_ends_after_the_agreement_does_not_undo_it(store: HashStore) -> None:
    first, second = join(store, 2)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(agree, second, "m")
        assert agree(first, "m") == "m"
        store.set(ENDED_KEY, json.dumps([0, ""]))
        assert other.result() == "m"
