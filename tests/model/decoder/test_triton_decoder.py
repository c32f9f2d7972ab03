"""The decoder on the Triton backend, in the interpreter: the CPU's tokens, and the same bits for any batch and number of ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.backends.interface import Backend
from model.decoder import llama
from model.decoder.llama import LlamaForCausalLM
from model.layers.batch import Span
from model.layers.cache import KeyValueCache
from model.spec.scheme import Scheme
from tests.model.families import write_model

PROMPT = [(13 * i + 5) % 79 for i in range(9)]
SLOW = tuple(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "qwen3-window"))
"""Limited scores and GELU, experts, norms of heads with a window."""


@pytest.fixture
def find_folder(tiny_llama: Callable[[str], Path], quantize: Callable[..., Scheme], tmp_path: Path) -> Callable[[str], Path]:
    """Folder of one of these models, or of "int8"."""

    def find(name: str) -> Path:
        if name == "int8":
            quantize(tiny_llama("llama3_rope"), tmp_path / "int8", "lm_head")
            return tmp_path / "int8"
        return tiny_llama(name) if name == "llama3_rope" else write_model(tmp_path, name)

    return find


def gather_logits(model: LlamaForCausalLM, spans: list[Span]) -> torch.Tensor:
    return model.collectives.gather_columns(model.logits_local(model(spans)), model.shares.vocab)


def compute(model: LlamaForCausalLM) -> torch.Tensor:
    """Logits of a prompt and four greedy tokens, while another sequence is decoded beside it."""
    store = model.build_store(8, 16)
    caches = [KeyValueCache(store, blocks) for blocks in ([5, 0, 2], [4, 1, 7])]
    parts = [gather_logits(model, [Span(caches[0], PROMPT), Span(caches[1], PROMPT[:5])])]
    for token in (3,):
        new = int(parts[-1][len(PROMPT) - 1 if len(parts) == 1 else 0].argmax())
        parts.append(gather_logits(model, [Span(caches[0], [new]), Span(caches[1], [token])]))
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["int8", "gemma2", *SLOW])
def test_logits_are_near_the_cpus_and_bits_are_those_of_one_rank(
    name: str,
    find_folder: Callable[[str], Path],
    run_ranks: Callable[..., list[Any]],
    triton_backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = find_folder(name)
    (expected,) = run_ranks(folder, 1, compute)
    monkeypatch.setattr(llama, "find_backend", lambda device_type: triton_backend)
    (found,) = run_ranks(folder, 1, compute)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))
    for one in run_ranks(folder, 2, compute):
        assert torch.equal(one, found)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_prefilled_row_has_the_bits_of_a_decoded_one(
    dtype: str,
    find_folder: Callable[[str], Path],
    build_model: Callable[..., LlamaForCausalLM],
    triton_backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What speculation and the restart by prefill rest on."""
    monkeypatch.setattr(llama, "find_backend", lambda device_type: triton_backend)
    model = build_model(find_folder("llama3_rope"), dtype)
    assert model.batch_invariant
    together = gather_logits(model, [Span(model.build_cache(len(PROMPT)), PROMPT)])
    cache = model.build_cache(len(PROMPT))
    one_by_one = torch.cat([gather_logits(model, [Span(cache, [token])]) for token in PROMPT])
    assert torch.equal(one_by_one, together)
