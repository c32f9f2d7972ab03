"""Options of the command line as keyword arguments: names, types and limits."""

from pathlib import Path
from typing import Any

import pytest

from launcher.settings.options import EngineOptions
from launcher.settings.python_options import read_options
from parallel.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"workers": 3}, "workers", 3),
        ({"tensor_parallel_size": 3}, "workers", 3),
        ({"max_num_seqs": 4}, "max_batch_size", 4),
        ({"timeout": 5}, "timeout_seconds", 5.0),
        ({"timeout_seconds": 5.5}, "timeout_seconds", 5.5),
        ({"from": "hf"}, "format", "hf"),
        ({"log_dir": "logs"}, "log_dir", Path("logs")),
        ({"log_dir": Path("logs")}, "log_dir", Path("logs")),
        ({"prefix_cache": False}, "prefix_cache", False),
        ({"enable_prefix_caching": False}, "prefix_cache", False),
        ({"bind_cores": True}, "bind_cores", "True"),
        ({"dtype": None}, "dtype", None),
        ({"checkpoint": "model"}, "checkpoint", "model"),
    ],
)
def test_an_option_has_the_names_of_its_field_and_flags(given: dict[str, Any], field: str, value: Any) -> None:
    found = getattr(read_options(EngineOptions, given, "LLM"), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"wrkers": 2}, r"LLM has no option 'wrkers'; did you mean workers"),
        ({"shade": 2}, r"LLM has no option 'shade'; the options are .*workers"),
        ({"num_nodes": 2}, r"LLM has no option 'num_nodes'"),  # a field that no engine declares
        ({"workers": 2, "tensor_parallel_size": 2}, r"workers and tensor_parallel_size are two names of one option: give one"),
        ({"workers": "2"}, r"workers is '2', but a whole number is needed"),
        ({"workers": True}, r"workers is True, but a whole number is needed"),
        ({"speculate": 1}, r"speculate is 1, but True or False is needed"),
        ({"dtype": "flaot32"}, r"dtype is 'flaot32', but has to be one of float32, bfloat16, float16; did you mean float32\?"),
        ({"max_num_seqs": 0}, r"max_num_seqs is 0, but has to be at least 1"),
        ({"timeout": 0}, r"timeout is 0.0, but has to be above 0"),
    ],
)
def test_what_an_option_does_not_take_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_options(EngineOptions, given, "LLM")


def test_only_allowed_options_are_known() -> None:
    assert read_options(EngineOptions, {"dtype": "float32"}, "load", allowed=("dtype",)).dtype == "float32"
    with pytest.raises(ConfigError, match="load has no option 'workers'; the options are dtype"):
        read_options(EngineOptions, {"workers": 2}, "load", allowed=("dtype",))
