"""The kernels for accelerators in Triton's interpreter, each against the plain operation: bit for bit where sums are of integers."""

from typing import Any

import pytest
import torch

from model.backends.int8 import PLAIN, InputSteps, Int8Kernel
from model.backends.interface import Backend
from model.backends.self_check import check_backend
from model.backends.torch_backends import TorchCpuBackend
from model.layers.attention import Attention
from model.layers.batch import Batch, Span
from model.layers.cache import KeyValueCache, KeyValueStore
from model.layers.rotary import Rotary
from model.spec.config import build_config
from tests.model.layers.test_quantized_linear import SCHEMES, build, make_inputs, make_stored

DTYPES = (torch.float32, torch.float16)
"""The interpreter computes bfloat16 wrongly; `scripts/bench/device_check.py` covers it on a GPU."""
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3}


def list_kernels(backend: Backend) -> tuple[Int8Kernel, Int8Kernel]:
    return PLAIN, backend.int8_kernel


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_linears_have_the_bits_of_the_plain_ones(triton_backend: Backend, name: str, dtype: torch.dtype) -> None:
    stored = make_stored(name, 72)
    plain, own = (build(name, stored, kernel=kernel) for kernel in list_kernels(triton_backend))
    for rows in (1, 5):
        x = make_inputs(rows).to(dtype)
        assert torch.equal(own(x), plain(x))


def test_the_self_check_finds_nothing(triton_backend: Backend) -> None:
    assert check_backend(torch.device("cpu"), triton_backend, DTYPES) is None


@pytest.mark.parametrize("operation", ["float_linear", "rms_norm", "silu_multiply", "attend_paged", "find_largest"])
def test_the_self_check_names_an_operation_that_differs(triton_backend: Backend, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = (triton_backend.paged_attention, "attend") if operation == "attend_paged" else (triton_backend, operation)
    right = getattr(owner, name)

    def differ(*args: Any) -> Any:
        result = right(*args)
        return (result[0], result[1].flip(1)) if isinstance(result, tuple) else result * 1.01

    monkeypatch.setattr(owner, name, differ)
    names = {
        "float_linear": "float linear", "rms_norm": "norm", "silu_multiply": "activation", "attend_paged": "paged attention",
        "find_largest": "search for the largest values",
    }  # fmt: skip
    words = check_backend(torch.device("cpu"), triton_backend, DTYPES)
    assert words is not None and words.startswith(f"the {names[operation]} of the triton backend on cpu cannot be used: ")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_made_by_a_norm_are_those_of_its_result(triton_backend: Backend, dtype: torch.dtype) -> None:
    linears = triton_backend.int8_kernel.linears
    assert linears is not None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (32, 96), generator=generator, dtype=torch.int8)
    packed = linears.pack(weight, torch.rand((32, 1), generator=generator), [96], 8, InputSteps())
    x = triton_backend.rms_norm(make_inputs(3, 96).to(dtype), None, torch.rand(96, generator=generator).to(dtype), 1e-5)
    assert linears._sliced[0] is x
    assert torch.equal(linears.multiply(x, packed, dtype), linears.multiply(x.clone(), packed, dtype))


@pytest.mark.parametrize("split", [2, 4])
def test_split_sums_of_extremes_have_the_bits_of_whole_ones(triton_backend: Backend, split: int) -> None:
    from model.backends.triton_kernels.int8_linear import multiply_int8

    q = torch.full((2, 3, 512), 127, dtype=torch.int8)
    q[1, :, ::3] = -127
    weight = torch.full((40, 512), -128, dtype=torch.int8)
    weight[1] = torch.arange(512).remainder(255).sub(127)
    scale, row_scale = torch.rand((40, 1), generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0.3, 1e-9])
    sums = (q.long() @ weight.long().T).float() * scale[:, 0]
    expected = (sums[1] / 254 + sums[0]) * row_scale[:, None]
    for parts in (1, split):
        assert torch.equal(multiply_int8(q, row_scale, weight, scale, None, torch.float32, split=parts), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_with_a_value_that_is_not_finite_gives_nan_and_spares_the_others(triton_backend: Backend, value: float) -> None:
    stored, x = make_stored("a16w8", 32), make_inputs(3)
    x[1, 7] = value
    plain, own = (build("a16w8", stored, kernel=kernel) for kernel in list_kernels(triton_backend))
    found = own(x)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], plain(x)[[0, 2]])


CACHES = {"none": None, "token": "token", "channel": "channel"}


def attend(backend: Backend, cache: str | None, steps: list[list[int]], window: int | None, softcap: float | None) -> list[torch.Tensor]:
    """Attend in passes; each gives the new tokens of three sequences in one store, of which the first has 250 tokens already."""
    heads, kv_heads, dim = 6, 2, 24
    config = build_config(
        {"model_type": "llama", "hidden_size": 144, "intermediate_size": 16, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
         "head_dim": dim, "num_hidden_layers": 1, "vocab_size": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 512}
    )  # fmt: skip
    generator, rotary = torch.Generator().manual_seed(3), Rotary(config)
    store = KeyValueStore(1, 24, 16, kv_heads, dim, torch.float32, torch.device("cpu"), cache)
    store.data.copy_(torch.randint(-99, 100, store.data.shape, generator=generator) / (1 if cache else 50))
    if store.scales is not None:
        store.scales.copy_(torch.rand(store.scales.shape, generator=generator) / 50)
    scales = torch.rand((2, kv_heads, 1, dim), generator=generator) / 30 + 0.01 if cache == "channel" else None
    blocks = [[*range(17, 0, -1)], [19, 18], [21, 20]]
    caches = [KeyValueCache(store, one) for one in blocks]
    caches[0].length = 250
    found = []
    for counts in steps:
        spans = [Span(one, [0] * count) for one, count in zip(caches, counts, strict=True) if count]
        batch = Batch(spans, rotary, torch.device("cpu"))
        qkv = torch.randn((sum(counts), (heads + 2 * kv_heads) * dim), generator=generator)
        found.append(Attention(1, backend)(qkv, heads, kv_heads, 0, batch, scales, window, softcap))
        batch.advance()
    return found


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, 3.0)])
@pytest.mark.parametrize("cache", CACHES)
def test_paged_attention_is_near_attention_over_single_caches(
    triton_backend: Backend, cache: str, window: int | None, softcap: float | None
) -> None:
    """A prefill of two sequences beside a decoding one of two chunks, and a step of all three."""
    steps = [[9, 11, 1], [1, 1, 1]]
    found = attend(triton_backend, CACHES[cache], steps, window, softcap)
    expected = attend(TorchCpuBackend(), CACHES[cache], steps, window, softcap)
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5)
