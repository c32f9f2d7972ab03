"""MindFormerConfig: attribute access over a YAML, merging and saving; what a context refuses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import ConfigError
from tandem.mindformers import LlamaConfig, MindFormerConfig, Tensor, build_context, build_parallel_config, int32
from tandem.mindformers import initializer as init
from tandem.mindformers.context import check_config, find_context
from tandem.ranks import init as join

KEYS = st.text("abcdefgh_", min_size=1, max_size=6).filter(lambda key: not key.startswith("__"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(allow_nan=False) | st.text("ab:# '\n-", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def test_keys_are_attributes_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "predict.yaml"
    path.write_text("trainer:\n  model_name: llama2_7b\nmodel:\n  model_config:\n    seq_length: 2048\n    theta: None\n")
    config = MindFormerConfig(str(path))
    assert (config.trainer.model_name, config.model.model_config.seq_length) == ("llama2_7b", 2048)
    assert config["model"]["model_config"]["theta"] == "None", "as YAML has it"
    assert config.no_such_key is None and config.model.no_such_key is None
    config.use_parallel = True
    config.parallel_config = {"model_parallel": 4}
    config.parallel_config.model_parallel = 2
    assert config["parallel_config"] == {"model_parallel": 2} and config["use_parallel"] is True
    shared = config.parallel_config
    config.model.model_config.parallel_config = shared
    assert config.model.model_config.parallel_config is shared, "as in MindFormers, the same object"
    del config.use_parallel
    assert "use_parallel" not in config
    with pytest.raises(AttributeError):
        del config.use_parallel


def test_a_later_source_overrides_an_earlier_one(tmp_path: Path) -> None:
    for name, number in (("a.yaml", 1), ("b.yml", 2)):
        (tmp_path / name).write_text(f"seed: {number}\nname_{number}: x\n")
    config = MindFormerConfig(tmp_path / "a.yaml", str(tmp_path / "b.yml"), {"other": {"deep": 1}}, seed=3)
    assert config == {"seed": 3, "name_1": "x", "name_2": "x", "other": {"deep": 1}}
    assert config.other.deep == 1


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_copies_and_plain_dictionaries_hold_the_same(raw: dict[str, Any]) -> None:
    config = MindFormerConfig(raw)
    assert config == raw
    plain = config.to_dict()
    assert plain == raw and type(plain) is dict and all(type(value) is not MindFormerConfig for value in plain.values())
    copied = copy.deepcopy(config)
    assert copied == config and type(copied) is MindFormerConfig
    copied.merge_from_dict({"new.inner.key": 1})
    assert copied.new.inner.key == 1 and "new" not in raw


@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=4))
def test_a_saved_file_reads_back(tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    MindFormerConfig(raw).save(path)
    assert MindFormerConfig(path) == raw == yaml.safe_load(path.read_text())


def test_a_merge_keeps_the_other_keys() -> None:
    config = MindFormerConfig(model={"model_config": {"seq_length": 1, "top_k": 3}})
    config.merge_from_dict({"model.model_config": {"seq_length": 2}, "model.arch.type": "LlamaForCausalLM", "seed": 0})
    assert config == {"model": {"model_config": {"seq_length": 2, "top_k": 3}, "arch": {"type": "LlamaForCausalLM"}}, "seed": 0}


def test_what_is_no_yaml_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a path that ends in \.yaml or \.yml"):
        MindFormerConfig("llama2_7b")
    with pytest.raises(ConfigError, match="does not exist"):
        MindFormerConfig(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be written as YAML"):
        MindFormerConfig(a=object()).save(tmp_path / "a.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_context_checks_the_keys_and_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "predict.yaml"
    path.write_text("seed: 0\nrun_mode: predict\nmodel:\n  model_config:\n    hidden_sise: 64\n")
    config = MindFormerConfig(path)
    with pytest.raises(ConfigError, match=r"predict\.yaml: model\.model_config\.hidden_sise is not a known key; did you mean"):
        build_context(config)
    assert find_context() is not config
    del config.model.model_config.hidden_sise
    assert build_parallel_config(build_context(config)) is config is find_context()
    assert join().world_size == 1
    assert check_config(config).seed == 0


def test_a_process_that_no_launcher_started_is_not_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the processes that MS_WORKER_NUM counts would load the whole model."""
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    monkeypatch.setattr("tandem.mindformers.context.find_group", lambda: None)
    with pytest.raises(ConfigError, match=r"MS_WORKER_NUM is 2, but no launcher made this process a rank"):
        build_context(MindFormerConfig())


def test_a_tensor_of_a_shape_is_filled_when_it_is_read() -> None:
    huge = Tensor(shape=(1 << 20, 1 << 20), dtype=int32, init=init.One())
    assert huge.shape == (1 << 20, 1 << 20) and len(huge) == 1 << 20
    small = Tensor(shape=(2, 3), dtype=int32, init=init.One())
    assert small.asnumpy().tolist() == [[1, 1, 1], [1, 1, 1]] and small.asnumpy().dtype == int32
    assert Tensor([[1, 2]], int32)[0].tolist() == [1, 2]
    assert Tensor(shape=2, dtype=int32, init=init.Zero()).asnumpy().tolist() == [0, 0]


def test_a_llama_config_has_mindformers_default_length() -> None:
    assert LlamaConfig(hidden_size=64).seq_length == 2048
    assert LlamaConfig(**MindFormerConfig(seq_length=8)).seq_length == 8
