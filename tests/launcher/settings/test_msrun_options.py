"""msrun's options that have no counterpart here: noted, or refused with the way to what they ask for."""

from typing import Any

import pytest

from launcher.settings.msrun_options import check_msrun_options
from launcher.settings.options import RunOptions
from parallel.errors import ConfigError


@pytest.mark.parametrize(
    ("said", "notes"),
    [
        ({}, []),
        ({"join": "True", "rank_table_file": "", "simulation_level": -1, "simulated_rank": -1, "tail_worker_log": "-1"}, []),
        ({"tail_worker_log": "0,2-3"}, []),
        ({"join": "False"}, ["--join False: tandem waits for its ranks"]),
        ({"rank_table_file": "hccl.json", "worker_log_name": "w_{ip}"}, ["hccl.json describes Ascend devices", "w_{ip} is not used"]),
    ],
)
def test_harmless_options_are_noted(said: dict[str, Any], notes: list[str]) -> None:
    found = check_msrun_options(RunOptions(**said))
    assert len(found) == len(notes)
    assert all(words in note for words, note in zip(notes, found, strict=True))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"join": "yes"}, "--join is 'yes', but True or False is needed"),
        ({"simulation_level": 0}, "--sim_level 0 asks for a dry run: use tandem plan"),
        ({"simulation_level": 4}, "--sim_level is 4, but -1 to 3 is needed"),
        ({"simulated_rank": 1}, "--sim_rank_id goes with --sim_level"),
        ({"tail_worker_log": "all"}, "--tail_worker_log is 'all', but -1 (all ranks) or ranks such as 0,2-3 are needed"),
        ({"tail_worker_log": ""}, "--tail_worker_log is ''"),
        ({"tail_worker_log": "1-2-3"}, "--tail_worker_log is '1-2-3'"),
    ],
)
def test_options_that_ask_for_something_else_are_refused(said: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_msrun_options(RunOptions(**said))
    assert words in str(refusal.value)
