"""The schemes that config.json can declare, and integers packed into words."""

import re
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from hypothesis import given, settings
from hypothesis import strategies as st

from model.spec.linear_scheme import LinearGroup, LinearScheme
from model.spec.packing import pack_integers, unpack_integers
from model.spec.scheme import Scheme, read_scheme, write_scheme
from parallel.errors import ConfigError

SCHEMES = [
    Scheme(LinearScheme()),
    Scheme(LinearScheme(bits=4, group_size=64), ("lm_head",)),
    Scheme(LinearScheme(bits=4, group_size=128, symmetric=False)),
    Scheme(LinearScheme(bits=8, group_size=32)),
    Scheme(LinearScheme(packed=False, activation="token"), ("lm_head",), "tensor"),
    Scheme(LinearScheme(packed=False, activation="tensor", activation_symmetric=False)),
    Scheme(None, (), "token"),
]
OWN_SCHEMES = [
    Scheme(LinearScheme(bits=4, group_size=128, act_order=True, smooth=True)),
    Scheme(LinearScheme(packed=False, activation="tensor", activation_symmetric=False, smooth=True), ("lm_head",)),
    Scheme(LinearScheme(smooth=True), ("lm_head",), "channel"),
]


@pytest.mark.parametrize("scheme", [*SCHEMES, *OWN_SCHEMES], ids=lambda scheme: scheme.name)
def test_a_written_scheme_reads_back(scheme: Scheme) -> None:
    assert read_scheme({"quantization_config": write_scheme(scheme)}) == scheme


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_compressed_tensors_accepts_what_is_written(scheme: Scheme) -> None:
    QuantizationConfig.model_validate({key: value for key, value in write_scheme(scheme).items() if key != "quant_method"})


@pytest.mark.parametrize("scheme", OWN_SCHEMES, ids=lambda scheme: scheme.name)
def test_formats_of_our_own_are_not_taken_for_compressed_tensors(scheme: Scheme) -> None:
    with pytest.raises(ValueError, match="smooth-"):
        QuantizationConfig.model_validate({key: value for key, value in write_scheme(scheme).items() if key != "quant_method"})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 32, 45])
def test_integers_are_packed_as_compressed_tensors_packs_them(bits: int, columns: int) -> None:
    low = -(1 << (bits - 1))
    values = torch.randint(low, -low, (5, columns), generator=torch.Generator().manual_seed(columns), dtype=torch.int8)
    packed = pack_integers(values, bits)
    assert torch.equal(unpack_from_int32(packed, bits, values.shape), values)
    assert torch.equal(unpack_integers(pack_to_int32(values, bits), bits, columns), values)
    assert torch.equal(unpack_integers(packed, bits, columns), values)


def test_ignore_takes_full_names_and_patterns() -> None:
    scheme = Scheme(LinearScheme(), ("lm_head", "re:.*layers.[02].*down_proj"))
    names = ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj")
    assert [scheme.is_quantized(name) for name in names] == [False, False, True, True]


TARGETS = ("Linear", "re:.*self_attn.*", "re:.*down_proj$", "re:model.layers.0.*", "model.layers.1.mlp.down_proj", "lm_head.x")
LINEARS = (LinearScheme(), LinearScheme(bits=4, group_size=32), LinearScheme(bits=4, group_size=16, symmetric=False))
GROUPS = st.lists(
    st.builds(LinearGroup, st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3, unique=True).map(tuple), st.sampled_from(LINEARS)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(groups=GROUPS, layer=st.integers(0, 2), part=st.sampled_from(("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj")))
def test_groups_are_matched_as_compressed_tensors_matches_them(groups: list[LinearGroup], layer: int, part: str) -> None:
    scheme = Scheme(groups[0].linear, (), None, groups[0].targets, tuple(groups[1:]))
    name, by_target = f"model.layers.{layer}.{part}", {target: group.linear for group in groups for target in group.targets}
    matched = match_targets(name, torch.nn.Linear(1, 1), by_target)
    assert scheme.find_linear(name) == (by_target[matched[0]] if matched else None)
    assert read_scheme({"quantization_config": write_scheme(scheme)}) == scheme


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq' is not supported"),
        ({"quant_method": "gptq"}, "only the tensors tell what quant_method 'gptq' quantizes: give the checkpoint"),
        ({"config_groups": {}}, "neither config_groups nor kv_cache_scheme"),
        ({"config_groups": {"a": {}, "b": {}}}, "targets None are not supported"),
        ({"format": "marlin-24"}, "format 'marlin-24' is not supported; there are pack-quantized, int-quantized"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "type of kv_cache_scheme is 'float', but only 'int'"),
    ],
)
def test_a_scheme_that_is_not_supported_is_refused(changes: dict[str, Any], words: str) -> None:
    written = {**write_scheme(Scheme(LinearScheme(), ("lm_head",))), **changes}
    written["config_groups"].get("group_0", {}).pop("format", None)  # what stands in a group goes over the general one
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_scheme({"quantization_config": written})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_bits", 3, "weights of 3 bits are not supported; there are 4 and 8"),
        ("strategy", "block", "strategy of weights is 'block', but only 'channel' or 'group'"),
        ("type", "float", "type of weights is 'float', but only 'int'"),
        ("symmetric", False, "8-bit weights with zero points"),
    ],
)
def test_weights_that_cannot_be_multiplied_are_refused(key: str, value: object, words: str) -> None:
    written = write_scheme(Scheme(LinearScheme()))
    written["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_scheme({"quantization_config": written})


def test_dynamic_activations_with_zero_points_are_refused() -> None:
    written = write_scheme(Scheme(LinearScheme(packed=False, activation="token")))
    written["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    with pytest.raises(ConfigError, match=r"dynamic int8 activations with zero points are not supported; symmetric ones are"):
        read_scheme({"quantization_config": written})
