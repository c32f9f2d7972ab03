"""What the environment variables of launchers say, and who decides how many ranks there are."""

import pytest

from launcher.environment import LaunchEnvironment, decide_world_size, read_environment
from parallel.errors import ConfigError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def without(*names: str) -> dict[str, str]:
    return {name: text for name, text in TORCHRUN.items() if name not in names}


def test_plain_environment_is_no_rank() -> None:
    environment = read_environment({"HOME": "/root", "PATH": "/bin"})
    assert environment == LaunchEnvironment()
    assert environment.launcher == "none" and not environment.is_rank and environment.variables == {}


def test_environment_of_this_process_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MS_WORKER_NUM", "3")
    assert read_environment().worker_num == 3


def test_torchrun_makes_a_rank() -> None:
    environment = read_environment({**TORCHRUN, "HOME": "/root"})
    assert environment.launcher == "torchrun" and environment.is_rank
    assert (environment.rank, environment.world_size) == (5, 8)
    assert (environment.local_rank, environment.local_world_size) == (1, 4)
    assert (environment.master_addr, environment.master_port) == ("node0", 29500)
    assert environment.variables == TORCHRUN


def test_local_world_size_may_be_missing() -> None:
    environment = read_environment(without("LOCAL_WORLD_SIZE"))
    assert environment.rank == 5 and environment.local_world_size is None


def test_address_alone_makes_no_rank() -> None:
    assert not read_environment({"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "2"}).is_rank


def test_empty_variable_says_nothing() -> None:
    assert read_environment({"RANK": "", "WORLD_SIZE": " ", "MS_WORKER_NUM": ""}) == LaunchEnvironment()


def test_worker_num_is_no_rank_but_decides() -> None:
    environment = read_environment({"MS_WORKER_NUM": "4"})
    assert (environment.launcher, environment.worker_num, environment.variables) == ("none", 4, {"MS_WORKER_NUM": "4"})


@pytest.mark.parametrize("mark", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_incomplete_set_names_what_is_missing(mark: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_environment({mark: "1"})
    said, missing = str(refused.value).split(" but lacks ")
    assert f"torchrun's ({mark}=1)" in said
    for name in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - {mark}:
        assert name in missing.split(";")[0].split(", ")


def test_rank_without_world_size_names_world_size_only() -> None:
    with pytest.raises(ConfigError, match="but lacks WORLD_SIZE;"):
        read_environment(without("WORLD_SIZE"))


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("text", ["two", "-1", "1.5", "1_0", "٣"])
def test_variable_that_is_no_number_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_environment({**TORCHRUN, name: text})
    assert str(refused.value).startswith(f"{name} is {text!r}, but a whole number")


def test_worker_num_that_is_no_number_is_named() -> None:
    with pytest.raises(ConfigError, match="MS_WORKER_NUM is 'many', but a whole number"):
        read_environment({"MS_WORKER_NUM": "many"})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("RANK", "8", "RANK is 8, but WORLD_SIZE is 8: 0 to 7 is needed"),
        ("RANK", "12", "RANK is 12, but WORLD_SIZE is 8: 0 to 7 is needed"),
        ("LOCAL_RANK", "4", "LOCAL_RANK is 4, but LOCAL_WORLD_SIZE is 4: 0 to 3 is needed"),
        ("LOCAL_RANK", "9", "LOCAL_RANK is 9, but WORLD_SIZE is 8: 0 to 7 is needed"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is 0, but a whole number of at least 1 is needed"),
        ("MASTER_PORT", "65536", "MASTER_PORT is 65536, but a port of at most 65535 is needed"),
        ("MS_WORKER_NUM", "0", "MS_WORKER_NUM is 0, but a whole number of at least 1 is needed"),
    ],
)
def test_number_out_of_range_names_both(name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_environment({**TORCHRUN, name: text})
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("workers", "worker_num", "model_parallel", "world_size"),
    [(None, None, None, 1), (None, None, 8, 8), (None, 4, 8, 4), (2, 4, 8, 2), (1, None, 8, 1)],
)
def test_option_goes_over_variable_over_yaml(
    workers: int | None, worker_num: int | None, model_parallel: int | None, world_size: int
) -> None:
    assert decide_world_size(workers, LaunchEnvironment(worker_num=worker_num), model_parallel) == world_size


@pytest.mark.parametrize(
    ("workers", "worker_num", "model_parallel", "words"),
    [
        (0, None, None, "--workers is 0"),
        (-2, 4, 8, "--workers is -2"),
        (None, 0, None, "MS_WORKER_NUM is 0"),
        (None, None, 0, "parallel_config.model_parallel is 0"),
    ],
)
def test_fewer_than_one_rank_is_refused(workers: int | None, worker_num: int | None, model_parallel: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{words}, but at least 1 rank is needed"):
        decide_world_size(workers, LaunchEnvironment(worker_num=worker_num), model_parallel)


def test_rank_has_the_world_size_of_its_launcher() -> None:
    environment = read_environment({**TORCHRUN, "MS_WORKER_NUM": "8"})
    assert decide_world_size(None, environment, 2) == 8
    assert decide_world_size(8, environment, None) == 8


def test_option_that_disagrees_with_the_launcher_names_both() -> None:
    with pytest.raises(ConfigError, match="--workers is 2, but torchrun's WORLD_SIZE is 8"):
        decide_world_size(2, read_environment(TORCHRUN), None)


def test_variable_that_disagrees_with_the_launcher_names_both() -> None:
    with pytest.raises(ConfigError, match="MS_WORKER_NUM is 4, but torchrun's WORLD_SIZE is 8"):
        decide_world_size(8, read_environment({**TORCHRUN, "MS_WORKER_NUM": "4"}), None)
