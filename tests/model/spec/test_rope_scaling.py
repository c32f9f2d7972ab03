"""Rotary frequencies against transformers' own, and the sections of config.json that describe them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig as TransformersConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model.layers.rotary import Rotary
from model.spec.config import build_config
from model.spec.rope_scaling import attention_factor, compute_frequencies
from parallel.errors import ConfigError

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
}
FACTORS = st.floats(1.0, 64.0)
SECTIONS = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": FACTORS}),
    st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": FACTORS}),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": FACTORS},
        optional={
            "original_max_position_embeddings": st.sampled_from((128, 512, 2048)),
            "beta_fast": st.sampled_from((16.0, 32.0, 48.0)),
            "beta_slow": st.sampled_from((1.0, 2.0)),
            "attention_factor": st.floats(0.5, 2.0),
            "mscale": st.sampled_from((0.707, 1.0)),
            "mscale_all_dim": st.sampled_from((0.707, 1.0)),
            "truncate": st.booleans(),
        },
    ),
)


@settings(max_examples=60, deadline=None)
@given(section=SECTIONS, width=st.sampled_from((8, 64, 128)), theta=st.sampled_from((10000.0, 500000.0)), key=st.booleans())
def test_frequencies_and_factors_are_those_of_transformers(section: dict[str, Any], width: int, theta: float, key: bool) -> None:
    raw = SIZES | {"head_dim": width, "max_position_embeddings": 512, "rope_theta": theta}
    raw["rope_parameters" if key else "rope_scaling"] = section
    reference = LlamaRotaryEmbedding(TransformersConfig(**{key: value for key, value in raw.items() if key != "model_type"}))  # type: ignore[no-untyped-call]
    config = build_config(raw)
    found = compute_frequencies(config.rope_theta, width, config.rope_scaling)
    np.testing.assert_allclose(found, reference.inv_freq.numpy(), rtol=2e-6)
    assert attention_factor(config.rope_scaling) == pytest.approx(reference.attention_scaling)
    cos, _ = Rotary(config).angles([0, 3], torch.device("cpu"))
    expected, _ = reference(torch.zeros(1), torch.tensor([[0, 3]]))
    torch.testing.assert_close(cos[:, 0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta is 10000.0, but .* of rope_parameters is 500000",
        ),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "names rope_type 'yarn' and type 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "but rope_type of rope_param"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
            "of rope_type 'linear', but .* 'default'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "offset": 3}}, "'linear' has the unknown key 'offset'"),
        ({"rope_scaling": {"factor": 3.0}}, "'default' has the unknown key 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "'default' has the unknown key 'full_attention'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not supported; supported: 'default', 'linear'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling lacks factor, which 'yarn' needs"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor of rope_scaling is 0, but a number above 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate of rope_scaling is 1, but true or false"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": "a"}}, "mscale of rope_scaling is 'a', but a number from 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but only 1.0 is supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, but only 1.0 is supported"),
        (
            {"max_position_embeddings": 512, "rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256}},
            "max_position_embeddings is 512, but original_max_position_embeddings of rope_scaling 'dynamic' is 256",
        ),
    ],
)
def test_what_contradicts_itself_or_is_unknown_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(SIZES | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"type": "default", "rope_type": "default"}, "rope_theta": 5e5},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 5e5}},
    ],
)
def test_the_same_in_two_places_is_no_contradiction(changes: dict[str, Any]) -> None:
    config = build_config(SIZES | changes)
    assert (config.rope_theta, config.rope_scaling) == (5e5, None)


def test_keys_that_change_nothing_are_accepted() -> None:
    section = {"type": "yarn", "factor": 2.0, "finetuned": True, "original_max_position_embeddings": 64}
    assert build_config(SIZES | {"rope_scaling": section}).rope_scaling is not None
