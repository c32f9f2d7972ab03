"""The self-check of a backend: each of its operations on small inputs on the device, compared with the plain operation on the CPU.

Integer linears have to give the CPU's bits. Operations on floats have to come near, and a row has to keep its bits whatever else is in
the batch and however the weight's rows are split.
"""

import itertools
from collections.abc import Callable, Sequence

import torch

from model.backends.int8 import PLAIN, InputSteps, Part, sliced_linear
from model.backends.interface import Backend
from model.backends.paged import StoredLayer, place_rows
from model.backends.registry import find_backend
from model.backends.torch_backends import TorchCpuBackend

_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest accepted difference from the CPU's result, relative to the largest value."""

FLOATS = tuple(_TOLERANCE)
Check = Callable[[Backend, torch.device, Sequence[torch.dtype]], str | None]


def check_backend(device: torch.device, backend: Backend | None = None, dtypes: Sequence[torch.dtype] = FLOATS) -> str | None:
    """Compare every operation of the device's backend with the CPU's; return a sentence that names the first that differs, else None.

    `backend`: default: the one of the device's type. An operation that raises differs. Takes seconds where kernels are
    compiled first.
    """
    found = find_backend(device.type) if backend is None else backend
    for name, check in CHECKS.items():
        try:
            difference = check(found, device, dtypes)
        except (RuntimeError, ValueError, AssertionError, OSError) as error:
            difference = f"it fails: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        if difference is not None:
            return f"the {name} of the {found.name} backend on {device} cannot be used: {difference}"
    return None


def _check_int8_linear(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    for dtype in dtypes:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randint(-128, 128, (48, 200), generator=generator, dtype=torch.int8)
        scale = torch.rand(48, generator=generator) * 0.01 + 0.001
        x = torch.randn((3, 200), generator=generator).to(dtype)
        x[0, 3] = 40
        expected = sliced_linear(x, [Part(0, 200, (weight, scale))], PLAIN)
        kernel = backend.int8_kernel
        found = sliced_linear(x.to(device), [Part(0, 200, kernel.pack(weight.to(device), scale.to(device)))], kernel).cpu()
        if not torch.equal(found, expected):
            return f"{_count_differing(found, expected)} differ from the CPU's with inputs of {_name(dtype)}"
    return None


def _check_whole_linear(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    linears = backend.int8_kernel.linears
    if linears is None:
        return None
    for dtype in dtypes:
        for bits, size in ((8, 200), (8, 64), (4, 64)):
            generator = torch.Generator().manual_seed(5)
            sizes = [min(size, 200 - first) for first in range(0, 200, size)]
            weight = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (48, 200), generator=generator, dtype=torch.int8)
            scale = torch.rand((48, len(sizes)), generator=generator) * 0.01 + 0.001
            x = torch.randn((20, 200), generator=generator).to(dtype)
            columns = [sum(sizes[:group]) for group in range(len(sizes) + 1)]
            parts = [
                Part(first, stop, (weight[:, first:stop], scale[:, group]))
                for group, (first, stop) in enumerate(itertools.pairwise(columns))
            ]
            packed = linears.pack(weight.to(device), scale.to(device), sizes, bits, InputSteps())
            for rows in (1, 20):
                expected, found = (
                    sliced_linear(x[:rows], parts, PLAIN).to(dtype),
                    linears.multiply(x[:rows].to(device), packed, dtype).cpu(),
                )
                if not torch.equal(found, expected):
                    words = f"{bits} bits, {rows} rows and inputs of {_name(dtype)}"
                    return f"{_count_differing(found, expected)} differ from the CPU's with {words}"
    return None


def _check_float_linear(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    for dtype in dtypes:
        generator = torch.Generator().manual_seed(1)
        x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 96), (48, 96)))
        found = backend.float_linear(x.to(device), weight.to(device))
        if reason := _compare(found, (x.double() @ weight.double().T), dtype):
            return reason
        halves = [backend.float_linear(x.to(device), part.to(device)) for part in (weight[:16].clone(), weight[16:].clone())]
        alone = [backend.float_linear(row.to(device), weight.to(device)) for row in torch.split(x, 1)]
        kept = torch.equal(torch.cat(halves, dim=1), found) and torch.equal(torch.cat(alone), found)
        if backend.is_split_invariant(dtype, 1) and not kept:
            return f"bits in {_name(dtype)} depend on the batch or on the split of the weight's rows"
    return None


def _check_norm(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    for dtype in dtypes:
        generator = torch.Generator().manual_seed(2)
        hidden, delta = (torch.randn((3, 72), generator=generator).to(dtype) for _ in range(2))
        weight = torch.rand(72, generator=generator).to(dtype)
        expected = TorchCpuBackend().rms_norm(hidden.clone(), delta, weight, 1e-5)
        if reason := _compare(backend.rms_norm(hidden.to(device), delta.to(device), weight.to(device), 1e-5), expected, dtype):
            return reason
    return None


def _check_activation(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    for dtype in dtypes:
        gate_up = torch.randn((3, 80), generator=torch.Generator().manual_seed(3)).to(dtype)
        if reason := _compare(backend.silu_multiply(gate_up.to(device)), TorchCpuBackend().silu_multiply(gate_up), dtype):
            return reason
    return None


def _check_attention(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    for dtype in dtypes:
        generator = torch.Generator().manual_seed(4)
        query, keys, values = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 2, 5, 32), (2, 5, 32), (2, 5, 32)))
        expected = TorchCpuBackend().attend(query, keys, values, None)
        if reason := _compare(backend.attend(query.to(device), keys.to(device), values.to(device), None), expected, dtype):
            return reason
    return None


def _check_paged_attention(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    heads, kv_heads, dim, size = 4, 2, 32, 16
    attention = backend.paged_attention
    if attention is None:
        return None
    tile = attention.tokens_per_tile(heads, kv_heads)
    for dtype in dtypes:
        generator = torch.Generator().manual_seed(6)
        before, blocks = 300, [3, *range(4, 24), 0]
        data = torch.randn((24, 2, kv_heads, size, dim), generator=generator).to(dtype)
        qkv = torch.randn((3, (heads + 2 * kv_heads) * dim), generator=generator).to(dtype)
        angle = torch.rand((3, 1, dim // 2), generator=generator)
        cos, sin = torch.cat((angle.cos(), angle.cos()), dim=2), torch.cat((-angle.sin(), angle.sin()), dim=2)
        split = qkv.float().view(3, heads + 2 * kv_heads, dim)
        turned = (split * cos + split.roll(dim // 2, 2) * sin).to(dtype)
        turned[:, heads + kv_heads :] = split[:, heads + kv_heads :].to(dtype)
        known = torch.cat([data[block] for block in blocks], dim=2)[:, :, :before]
        whole = torch.cat((known, turned[:, heads:].view(3, 2, kv_heads, dim).permute(1, 2, 0, 3)), dim=2)
        expected = []
        for row in range(3):
            keys, values = whole[:, :, : before + row + 1]
            out = TorchCpuBackend().attend(turned[row, :heads].view(kv_heads, heads // kv_heads, 1, dim), keys, values, None)
            expected.append(out.reshape(heads * dim))
        layer = StoredLayer(data.to(device), None, None)
        angles = cos.to(device), sin.to(device)
        found = []
        # The same three tokens as a short decoding step, and as the end of a prefill, whose chunks one program walks.
        for tokens in (1, tile):
            paged = place_rows([(before, 3, blocks)], tile, size, device, splits=tokens == 1)
            found.append(attention.attend(qkv.to(device), heads, kv_heads, angles, layer, paged, None, None))
        if reason := _compare(found[0], torch.stack(expected), dtype):
            return reason
        if not torch.equal(found[0], found[1]):
            return f"bits in {_name(dtype)} differ between decoding and prefill"
    return None


def _check_largest(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    logits = torch.tensor([[1.0, -2.0, 3.0, 3.0, -0.0, 0.0], [-5.0, torch.nan, torch.inf, 0.0, -torch.inf, -1.0]])
    for count, expected in ((1, [[2], [1]]), (3, [[2, 3, 0], [1, 2, 3]]), (6, [[2, 3, 0, 4, 5, 1], [1, 2, 3, 5, 0, 4]])):
        columns = backend.find_largest(logits.to(device), count)[1].tolist()
        if columns != expected:
            return f"it found the columns {columns}, not {expected}"
    return None


CHECKS: dict[str, Check] = {
    "int8 linear": _check_int8_linear,
    "integer linear of whole weights": _check_whole_linear,
    "float linear": _check_float_linear,
    "norm": _check_norm,
    "activation": _check_activation,
    "attention": _check_attention,
    "paged attention": _check_paged_attention,
    "search for the largest values": _check_largest,
}
"""By the name used in messages, in the order in which they run."""


def _compare(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    near, right = found.cpu().double(), expected.double()
    worst, largest = (near - right).abs().max().item(), right.abs().max().item()
    if worst <= _TOLERANCE[dtype] * largest:  # false also for NaN
        return None
    return f"the largest difference from the CPU is {worst:.3g} of {largest:.3g} in {_name(dtype)}"


def _count_differing(found: torch.Tensor, expected: torch.Tensor) -> str:
    return f"{int((found != expected).sum())} of {expected.numel()} results"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
