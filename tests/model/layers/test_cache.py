"""The key-value cache, float and int8: what it holds and gives back, in any blocks, and models that run with one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.decoder.llama import LlamaForCausalLM
from model.layers.batch import Span
from model.layers.cache import KeyValueCache, KeyValueStore
from model.spec.scheme import Scheme, write_scheme
from parallel.errors import ConfigError

LAYERS, HEADS, HEAD_DIM = 2, 3, 16
KINDS = ("token", "channel", "tensor")
IDS = [(13 * i + 5) % 97 for i in range(12)]


def make_states(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [tokens, heads, head_dim]; the heads differ in size."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn((2, tokens, HEADS, HEAD_DIM), generator=generator) * torch.tensor([0.1, 1.0, 30.0]).view(3, 1)
    keys, values = states.to(dtype)
    return keys, values


def make_scale(kind: str, *states: torch.Tensor) -> torch.Tensor | None:
    """Stored scales, float32 [2, heads, 1, head_dim], for keys and values."""
    if kind == "token":
        return None
    absmax = torch.stack([one.float().abs().amax(dim=0) for one in states])
    if kind == "tensor":
        absmax = absmax.amax(dim=(1, 2), keepdim=True).expand_as(absmax)
    return (absmax * 2 / 255).unsqueeze(2)


def build_cache(kind: str | None, capacity: int = 32, dtype: torch.dtype = torch.float32) -> KeyValueCache:
    """In blocks of 16 that lie in no order."""
    blocks = list(range(-(-capacity // 16)))[::-1]
    return KeyValueCache(KeyValueStore(LAYERS, len(blocks), 16, HEADS, HEAD_DIM, dtype, torch.device("cpu"), kind), blocks)


def append(
    cache: KeyValueCache, layer: int, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything, with these behind."""
    cache.append(layer, keys, values, scale)
    return cache.read(layer, scale, cache.length + len(keys))


@pytest.mark.parametrize(("kind", "scales"), [("token", 4 * LAYERS * 2 * HEADS), ("channel", 0), ("tensor", 0)])
def test_a_token_takes_half_of_16_bits_and_its_scales(kind: str, scales: int) -> None:
    half = build_cache(None, dtype=torch.bfloat16).store.bytes_per_token
    assert half == LAYERS * 2 * HEADS * HEAD_DIM * 2
    for dtype in (torch.float32, torch.bfloat16):
        assert build_cache(kind, dtype=dtype).store.bytes_per_token == half // 2 + scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_is_within_half_a_step(kind: str, dtype: torch.dtype) -> None:
    keys, values = make_states(9, dtype)
    scale = make_scale(kind, keys, values)
    found = append(build_cache(kind), 1, keys, values, scale)
    for place, (got, given) in enumerate(zip(found, (keys, values), strict=True)):
        given = given.float().transpose(0, 1)
        assert got.shape == (HEADS, 9, HEAD_DIM) and got.dtype == torch.float32
        step = given.abs().amax(dim=2, keepdim=True) / 127 if scale is None else scale[place]
        # The largest value of a stored scale lies at 127.5 steps and is cut to 127.
        assert ((got - given).abs() <= step * 0.5001).all()
        assert (got - given).abs().max() > 0


def test_every_token_of_every_head_has_a_scale_of_its_own() -> None:
    keys, values = make_states(4)
    keys[2] *= 1000
    found, _ = append(build_cache("token"), 0, keys, values)
    steps = found / (keys.abs().amax(dim=2) / 127).T.unsqueeze(2)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert torch.equal(steps.abs().amax(dim=2).round(), torch.full((HEADS, 4), 127.0))


def test_tokens_of_zeros_come_back_as_zeros() -> None:
    zeros = torch.zeros(2, HEADS, HEAD_DIM)
    keys, values = append(build_cache("token"), 0, zeros, zeros)
    assert torch.equal(keys, torch.zeros(HEADS, 2, HEAD_DIM)) and torch.equal(values, keys)


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_values_beyond_a_stored_scale_are_cut(kind: str) -> None:
    keys, values = make_states(5)
    scale = make_scale(kind, keys, values)
    assert scale is not None
    for got, given, step in zip(append(build_cache(kind), 0, keys, values, scale / 4), (keys, values), scale / 4, strict=True):
        expected = torch.clamp(torch.round(given.transpose(0, 1) / step), -128, 127) * step
        assert torch.equal(got, expected) and (expected.abs() >= 127 * step).any()


@pytest.mark.parametrize("kind", KINDS)
def test_two_pieces_give_the_bits_of_one(kind: str) -> None:
    keys, values = make_states(9)
    scale = make_scale(kind, keys, values)
    whole, pieces = build_cache(kind), build_cache(kind, capacity=9)
    for layer in range(LAYERS):
        expected = append(whole, layer, keys * (layer + 1), values, scale)
        pieces.length = 0
        append(pieces, layer, keys[:4] * (layer + 1), values[:4], scale)
        pieces.length = 4
        found = append(pieces, layer, keys[4:] * (layer + 1), values[4:], scale)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_layers_do_not_touch_each_other() -> None:
    cache, first, second = build_cache("token"), make_states(3, seed=1), make_states(3, seed=2)
    expected = append(cache, 0, *first)
    append(cache, 1, *second)
    cache.length = 3
    again = append(cache, 0, first[0][:1], first[1][:1])
    assert torch.equal(again[0][:, :3], expected[0]) and torch.equal(again[1][:, :3], expected[1])


@pytest.mark.parametrize("for_kernels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_blocks_in_any_order_and_layout_give_the_bits_of_one_block(
    kind: str | None, block_size: int, dtype: torch.dtype, *, for_kernels: bool
) -> None:
    keys, values = make_states(70, dtype)
    scale = make_scale(kind, keys, values) if kind else None
    store = KeyValueStore(LAYERS, 9, block_size, HEADS, HEAD_DIM, dtype, torch.device("cpu"), kind, for_kernels=for_kernels)
    one = KeyValueStore(LAYERS, 1, 80, HEADS, HEAD_DIM, dtype, torch.device("cpu"), kind)
    cache, whole = KeyValueCache(store, [7, 2, 8, 0, 5]), KeyValueCache(one, [0])
    for start, stop in ((0, 5), (5, 6), (6, 40), (40, 70)):
        assert cache.length == whole.length == start
        for layer in range(LAYERS):
            expected = append(whole, layer, keys[start:stop] + layer, values[start:stop], scale)
            found = append(cache, layer, keys[start:stop] + layer, values[start:stop], scale)
            for got, wanted in zip(found, expected, strict=True):
                assert torch.equal(got, wanted) and got.is_contiguous() and got.shape == (HEADS, stop, HEAD_DIM)
                assert got.dtype == (torch.float32 if kind else dtype)
        cache.length = whole.length = stop
    if kind is None:
        assert torch.equal(cache.read(1, None, 70)[0], (keys + 1).transpose(0, 1))


def test_a_length_that_is_set_back_forgets_what_came_behind() -> None:
    cache, (keys, values) = build_cache("token"), make_states(9)
    cache.append(0, keys, values)
    cache.length = 4
    found = append(cache, 0, -keys[4:6], values[4:6])
    assert torch.equal(found[0], append(build_cache("token"), 0, torch.cat((keys[:4], -keys[4:6])), values[:6])[0])


@pytest.mark.parametrize(
    ("block_size", "num_blocks", "words"),
    [
        (8, 4, "block_size is 8, but .* a multiple of 16"),
        (24, 4, "block_size is 24"),
        (0, 4, "block_size is 0"),
        (16, 0, "num_blocks is 0"),
    ],
)
def test_a_store_that_cannot_be_is_refused(block_size: int, num_blocks: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        KeyValueStore(1, num_blocks, block_size, HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))


def test_a_cache_of_a_model_holds_what_was_asked_for_in_one_block(
    tiny_llama: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]
) -> None:
    cache = build_model(tiny_llama("nine_heads")).build_cache(33)
    assert (cache.blocks, cache.store.block_size, cache.store.num_blocks) == ([0], 48, 1)
    assert cache.store.data.shape == (2, 1, 2, 3, 48, 16)


def compute_logits(model: LlamaForCausalLM) -> torch.Tensor:
    """Logits of a prompt in two pieces and token by token, two sequences beside each other."""
    caches = [model.build_cache(20), model.build_cache(30)]
    steps = [[Span(caches[0], IDS[:5]), Span(caches[1], IDS)], [Span(caches[0], IDS[5:9])]]
    steps += [[Span(cache, [token]) for cache in caches] for token in IDS[9:]]
    return torch.cat([model.collectives.gather_columns(model.logits_local(model(spans)), model.shares.vocab) for spans in steps])


@pytest.fixture(scope="module")
def with_cache(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Folder of a tiny model whose config.json declares an int8 cache, with scales that hold what occurs."""

    def write(name: str, kind: str) -> Path:
        source, folder = tiny_llama(name), tmp_path_factory.mktemp(f"{name}-{kind}")
        config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
        config["quantization_config"] = write_scheme(Scheme(kv_cache=kind))
        rows = config["num_key_value_heads"] * config["head_dim"] if kind == "channel" else 1
        for layer in range(2 if kind != "token" else 0):
            for place, scale in enumerate(("k_scale", "v_scale")):
                sizes = 1 + torch.rand(rows, generator=torch.Generator().manual_seed(10 * layer + place))
                tensors[f"model.layers.{layer}.self_attn.{scale}"] = (sizes * (10 if place == 0 else 5) / 127).half()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors")
        return folder

    return write


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "ranks"), [("nine_heads", (1, 2, 3, 5)), ("tied", (1, 3, 8))])
def test_a_model_gives_the_same_bits_for_every_number_of_ranks_and_stays_near_the_float_cache(
    name: str,
    ranks: tuple[int, ...],
    kind: str,
    with_cache: Callable[[str, str], Path],
    tiny_llama: Callable[[str], Path],
    run_ranks: Callable[..., list[Any]],
) -> None:
    folder = with_cache(name, kind)
    (expected,) = run_ranks(folder, 1, compute_logits)
    for world_size in ranks:
        for found in run_ranks(folder, world_size, compute_logits):
            assert torch.equal(found, expected), world_size
    (exact,) = run_ranks(tiny_llama(name), 1, compute_logits)
    assert 0 < (expected - exact).norm() / exact.norm() < (0.05 if kind == "token" else 0.12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_the_same_bits_for_one_rank_and_two(
    dtype: str, with_cache: Callable[[str, str], Path], run_ranks: Callable[..., list[Any]]
) -> None:
    folder = with_cache("nine_heads", "token")
    (expected,) = run_ranks(folder, 1, compute_logits, dtype=dtype)
    for found in run_ranks(folder, 2, compute_logits, dtype=dtype):
        assert torch.equal(found, expected)


def test_a_model_with_a_token_scheme_needs_no_stored_scales(
    with_cache: Callable[[str, str], Path], build_model: Callable[..., LlamaForCausalLM]
) -> None:
    model = build_model(with_cache("nine_heads", "token"))
    assert model.scheme == Scheme(kv_cache="token") and model.scheme.name == "c8"
    assert model.build_cache(10).store.bytes_per_token == 2 * 2 * 3 * (16 + 4)
