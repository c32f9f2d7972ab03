"""Weights that are made up: the same rows whoever asks, of every tensor that a scheme declares; and a checkpoint's first layers."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint.completeness import check_checkpoint
from model.checkpoint.first_layers import FirstLayers, check_num_layers
from model.checkpoint.random_source import RandomSource
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from model.spec.scheme import Scheme, declare_scheme, read_scheme
from parallel.errors import ConfigError
from parallel.file_slices import FileReader

VALUES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20_000,
    "dtype": "bfloat16",
}
SCHEMES = {
    "float": Scheme(),
    "a16w8": Scheme(LinearScheme(), ("lm_head",)),
    "a8w8": Scheme(LinearScheme(packed=False, activation="token"), ("lm_head",)),
    "a16w4": Scheme(LinearScheme(bits=4, group_size=32), ("lm_head",)),
    "zero points": Scheme(LinearScheme(bits=4, group_size=32, symmetric=False), ("lm_head",)),
    "act order": Scheme(LinearScheme(bits=4, group_size=32, act_order=True), ("lm_head",)),
    "static": Scheme(LinearScheme(packed=False, activation="tensor", activation_symmetric=False, smooth=True), ("lm_head",), "channel"),
}


def _open(scheme: Scheme, **values: Any) -> RandomSource:
    return RandomSource(declare_scheme({**VALUES, **values}, scheme), Path("config.json"))


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_the_same_whoever_reads_them(name: str) -> None:
    one, other, reader = _open(SCHEMES[name]), _open(SCHEMES[name]), FileReader()
    check_checkpoint(one, build_config(one.config), read_scheme(one.config))
    for tensor, info in one.tensors.items():
        rows = info.shape[0]
        whole = one.read_rows(reader, tensor, 0, rows)
        assert (whole.shape, whole.dtype) == (info.shape, info.dtype.torch_dtype)
        cuts = sorted({0, rows // 3, rows // 2, rows})
        parts = [other.read_rows(reader, tensor, start, stop) for start, stop in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole), tensor
        assert whole.isfinite().all()
    assert reader.read_bytes == 0


def test_rows_differ_and_have_the_spread_of_weights() -> None:
    weight = _open(SCHEMES["float"]).read_rows(FileReader(), "model.embed_tokens.weight", 0, 20_000).float()
    assert weight.unique(dim=0).shape[0] == 20_000
    assert 0.018 < weight.std() < 0.022
    integers = _open(SCHEMES["a8w8"])
    rows = integers.read_rows(FileReader(), "model.layers.0.mlp.up_proj.weight", 0, 128).float()
    scale = integers.read_rows(FileReader(), "model.layers.0.mlp.up_proj.weight_scale", 0, 128).float()
    assert 0.018 < (rows * scale).std() < 0.022


def test_of_a_checkpoint_the_first_layers_are_seen() -> None:
    whole = _open(SCHEMES["a16w8"])
    cut = FirstLayers(whole, 2)
    check_checkpoint(cut, build_config(cut.config), read_scheme(cut.config))
    assert build_config(cut.config).num_hidden_layers == 2
    assert {name for name in whole.tensors if name not in cut.tensors} == {name for name in whole.tensors if ".layers.2." in name}
    assert json.dumps(whole.config) != json.dumps(cut.config)


@pytest.mark.parametrize("num_layers", [0, 4, -1])
def test_more_layers_than_there_are_cannot_be_seen(num_layers: int) -> None:
    with pytest.raises(ConfigError, match=f"--num-layers is {num_layers}, but the model has 3"):
        check_num_layers(build_config(VALUES), num_layers)
