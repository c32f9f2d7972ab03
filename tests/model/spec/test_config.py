"""What config.json leaves open, and what the sizes it gives are held against."""

from typing import Any

import pytest

from model.spec.config import build_config
from model.spec.rope_scaling import RopeScaling
from parallel.errors import ConfigError

SIZES = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}


def test_null_is_the_same_as_a_key_that_is_not_there() -> None:
    keys = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "torch_dtype")
    config = build_config(SIZES | dict.fromkeys((*keys, "max_position_embeddings")))
    assert config == build_config(SIZES)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta, config.dtype) == (4, 12, 10000.0, "float32")
    with pytest.raises(ConfigError, match=r"^one\.json lacks hidden_size, vocab_size$"):
        build_config(SIZES | {"hidden_size": None, "vocab_size": None}, "one.json")


@pytest.mark.parametrize(("pad", "expected"), [(None, None), (-1, None), (32, None), (128256, None), (0, 0), (31, 31)])
def test_a_pad_id_without_a_row_in_the_vocabulary_is_none(pad: int | None, expected: int | None) -> None:
    assert build_config(SIZES | {"pad_token_id": pad}).pad_token_id == expected


@pytest.mark.parametrize(("eos", "expected"), [(None, ()), (2, (2,)), ([2, 5], (2, 5)), ([], ())])
def test_end_ids_are_none_one_or_several(eos: Any, expected: tuple[int, ...]) -> None:
    assert build_config(SIZES | {"eos_token_id": eos}).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 11}, "head_dim is 11, but an even number is needed"),
        ({"num_attention_heads": 5}, "hidden_size 48 does not divide by num_attention_heads 5; give head_dim"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads"),
        ({"hidden_size": 0}, "hidden_size is 0, but a whole number from 1 to 1048576 is needed"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: {message}"):
        build_config(SIZES | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 63}, "sliding_window is 63, but max_position_embeddings is 64: attention over a window is not supported"),
        ({"sliding_window": "64"}, "sliding_window is '64', but max_position_embeddings is 64"),
        ({"attention_chunk_size": 16}, "attention_chunk_size is 16, but max_position_embeddings is 64"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*, but only 'full_attention' is supported"),
        ({"is_causal": False}, "is_causal is False, but only True is supported"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config is .*, but only null is supported"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights is 'other.safetensors', but only null is supported"),
    ],
)
def test_what_transformers_reads_for_models_of_every_kind_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: {message}"):
        build_config(SIZES | {"max_position_embeddings": 64} | changes)


@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": None}, {"sliding_window": 64}, {"sliding_window": 8, "layer_types": ["full_attention"]}, {"is_causal": True}],
    ids=str,
)
def test_a_window_that_no_sequence_leaves_changes_nothing(changes: dict[str, Any]) -> None:
    plain = SIZES | {"max_position_embeddings": 64}
    assert build_config(plain | changes) == build_config(plain)


def test_llama3_scaling_is_read_from_either_key_of_transformers() -> None:
    values = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for key, kind in (("rope_scaling", "type"), ("rope_scaling", "rope_type"), ("rope_parameters", "rope_type")):
        assert build_config(SIZES | {key: values | {kind: "llama3"}}).rope_scaling == RopeScaling(**values)  # type: ignore[arg-type]
