"""What `tandem bench` decides before anything starts."""

import time

import pytest

from launcher.commands.bench import read_batch_sizes, read_start_seconds
from parallel.errors import ConfigError


@pytest.mark.parametrize(("words", "sizes"), [((), (1, 8)), (("4",), (4,)), (("1,8", "16"), (1, 8, 16)), (("2, 3",), (2, 3))])
def test_batch_sizes_are_a_list_or_several_options(words: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    assert read_batch_sizes(words) == sizes


@pytest.mark.parametrize("word", ["0", "-1", "x", "1,,2", "", "1.5", "²"])
def test_a_batch_size_that_is_no_number_above_0_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="whole numbers above 0"):
        read_batch_sizes((word,))


def test_a_batch_size_that_stands_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="8 twice"):
        read_batch_sizes(("1,8", "8"))


def test_the_start_of_the_process_lies_before_now() -> None:
    assert 0 < time.monotonic() - read_start_seconds() < 3600
