"""Every family against transformers, and the same bits for every number of ranks and dtype."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from model.checkpoint.formats import open_checkpoint
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import load_model
from model.layers.batch import Span
from model.planning import Workload, plan_ranks
from model.spec import families
from model.spec.config import build_config
from model.spec.families import list_architectures
from model.spec.scheme import Scheme, read_scheme
from parallel.collectives import IdentityCollectives
from tests.model.families import MODELS, write_model

RANKS = (2, 3)
PROMPT = [(13 * i + 5) % 79 for i in range(41)]


def gather_logits(model: LlamaForCausalLM, spans: list[Span]) -> torch.Tensor:
    return model.collectives.gather_columns(model.logits_local(model(spans)), model.shares.vocab)


def compute_logits(model: LlamaForCausalLM) -> torch.Tensor:
    """Logits of two ragged prompts together, then of three decode steps of both, then of a few tokens of one: [tokens, vocab]."""
    caches, prompts = [model.build_cache(60) for _ in range(2)], (PROMPT[:5], PROMPT[5:])
    steps = [[Span(cache, prompt) for cache, prompt in zip(caches, prompts, strict=True)]]
    steps += [[Span(cache, [token]) for cache in caches] for token in (11, 0, 71)]
    steps += [[Span(caches[0], [13])], [Span(caches[1], [14, 15, 16])]]
    return torch.cat([gather_logits(model, spans) for spans in steps])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = write_model(tmp_path_factory.mktemp(name), name)
        return made[name]

    return find


def test_every_family_has_a_model_here() -> None:
    assert {kind for kind, _ in MODELS.values()} | {"llama"} == set(list_architectures())


def test_a_family_is_a_short_file_of_its_own() -> None:
    for family in list_architectures().values():
        file = Path(families.__file__).with_name(f"{family.model_type}.py")
        assert len(file.read_text(encoding="utf-8").splitlines()) < 100, file


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    name: str, folder: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]
) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32, attn_implementation="eager")
    model = build_model(folder(name))
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    assert expected.std() > 0.3
    together = gather_logits(model, [Span(model.build_cache(len(PROMPT)), PROMPT)])
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
    cache = model.build_cache(len(PROMPT))
    one_by_one = torch.cat([gather_logits(model, [Span(cache, [token])]) for token in PROMPT])
    torch.testing.assert_close(one_by_one, expected, rtol=1e-4, atol=1e-4)
    if model.batch_invariant:
        assert torch.equal(one_by_one, together)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([PROMPT])
    tokens = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
    cache, found, new = model.build_cache(len(PROMPT) + 20), list(PROMPT), list(PROMPT)
    for _ in range(20):
        new = [int(gather_logits(model, [Span(cache, new)])[-1].argmax())]
        found += new
    assert found == tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_number_of_ranks_gives_the_bits_of_one(
    name: str, dtype: str, folder: Callable[[str], Path], run_ranks: Callable[..., list[Any]]
) -> None:
    (expected,) = run_ranks(folder(name), 1, compute_logits, dtype=dtype)
    for world_size in RANKS:
        for found in run_ranks(folder(name), world_size, compute_logits, dtype=dtype):
            assert torch.equal(found, expected), world_size


@pytest.mark.parametrize("name", MODELS)
def test_int8_gives_the_bits_of_one_rank(
    name: str, tmp_path: Path, folder: Callable[[str], Path], run_ranks: Callable[..., list[Any]], quantize: Callable[..., Scheme]
) -> None:
    quantize(folder(name), tmp_path / "int8")
    (exact,) = run_ranks(folder(name), 1, compute_logits)
    (expected,) = run_ranks(tmp_path / "int8", 1, compute_logits)
    assert 0 < (expected - exact).norm() / exact.norm() < 0.1
    for world_size in RANKS:
        for found in run_ranks(tmp_path / "int8", world_size, compute_logits):
            assert torch.equal(found, expected), world_size


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_has_the_bytes_of_a_loaded_rank(
    name: str, int8: bool, tmp_path: Path, folder: Callable[[str], Path], quantize: Callable[..., Scheme]
) -> None:
    path = folder(name)
    if int8:
        quantize(path, tmp_path / "int8", "lm_head")
        path = tmp_path / "int8"
    source = open_checkpoint(path)
    config, scheme = build_config(source.config), read_scheme(source.config)
    stored = {name: info.form for name, info in source.tensors.items()}
    for rank, plan in enumerate(plan_ranks(config, scheme, 3, Workload(dtype="float32", tokens=64), stored)):
        collectives = IdentityCollectives()
        collectives.rank, collectives.world_size = rank, 3
        model = LlamaForCausalLM(config, scheme, collectives, dtype="float32", device=torch.device("cpu"))
        assert load_model(model, source) == plan.file_bytes
        assert model.weight_bytes == plan.weight_bytes
        assert model.build_store(1, 16).bytes_per_token * 64 == plan.kv_cache_bytes
