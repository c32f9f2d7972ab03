"""The forward pass against transformers, and the same bits for every number of ranks, every type and every thread count."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model.checkpoint.formats import open_checkpoint
from model.checkpoint.rank_files import rank_file_name
from model.decoder.llama import LlamaForCausalLM
from model.decoder.loading import load_model
from model.export.rank_files import write_rank_files
from model.layers.batch import Span
from model.spec.config import build_config
from model.spec.scheme import Scheme, read_scheme
from parallel.collectives import IdentityCollectives
from parallel.errors import LayoutError

MODELS = ("nine_heads", "tied", "llama3_rope")
RANKS = {"nine_heads": (2, 3, 4, 9), "tied": (2, 3, 4, 8), "llama3_rope": (2, 3, 4)}
DTYPES = ("float32", "bfloat16", "float16")
PROMPTS = ([5, 60, 7, 33, 2], [9, 8, 7, 6, 5, 4, 3, 41, 42, 43, 44])


def compute_logits(model: LlamaForCausalLM) -> torch.Tensor:
    """Logits of two ragged prompts, then of three decode steps of both, then of one sequence alone: [tokens, vocab]."""
    caches = [model.build_cache(40) for _ in PROMPTS]
    steps = [[Span(cache, prompt) for cache, prompt in zip(caches, PROMPTS, strict=True)]]
    steps += [[Span(cache, [token]) for cache in caches] for token in (11, 0, 71)]
    steps += [[Span(caches[0], [13])], [Span(caches[1], [14, 15, 16])]]
    return torch.cat([gather_logits(model, spans) for spans in steps])


def compute_long_logits(model: LlamaForCausalLM) -> torch.Tensor:
    """Logits of a prompt that is long enough for several threads to share the attention."""
    return gather_logits(model, [Span(model.build_cache(90), [(7 * i) % 80 for i in range(90)])])


def gather_logits(model: LlamaForCausalLM, spans: list[Span]) -> torch.Tensor:
    return model.collectives.gather_columns(model.logits_local(model(spans)), model.shares.vocab)


@pytest.fixture(scope="module")
def references(tiny_llama: Callable[[str], Path]) -> dict[str, transformers.LlamaForCausalLM]:
    return {
        name: transformers.LlamaForCausalLM.from_pretrained(tiny_llama(name), dtype=torch.float32, attn_implementation="eager")
        for name in MODELS
    }


@pytest.fixture(scope="module")
def alone(tiny_llama: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]) -> Callable[[str, str], torch.Tensor]:
    """Logits of one rank on one thread."""
    made: dict[tuple[str, str], torch.Tensor] = {}

    def compute(name: str, dtype: str) -> torch.Tensor:
        if (name, dtype) not in made:
            made[name, dtype] = compute_logits(build_model(tiny_llama(name), dtype))
        return made[name, dtype]

    return compute


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(
    name: str,
    references: dict[str, transformers.LlamaForCausalLM],
    tiny_llama: Callable[[str], Path],
    build_model: Callable[..., LlamaForCausalLM],
) -> None:
    model = build_model(tiny_llama(name))
    ids = [(13 * i + 5) % 80 for i in range(60)]
    with torch.inference_mode():
        expected = references[name](torch.tensor([ids])).logits[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(gather_logits(model, [Span(model.build_cache(60), ids)]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_token_by_token_gives_the_logits_of_transformers_too(
    name: str,
    references: dict[str, transformers.LlamaForCausalLM],
    tiny_llama: Callable[[str], Path],
    build_model: Callable[..., LlamaForCausalLM],
) -> None:
    model = build_model(tiny_llama(name))
    ids = [(11 * i + 3) % 80 for i in range(12)]
    cache = model.build_cache(len(ids))
    with torch.inference_mode():
        expected = references[name](torch.tensor([ids])).logits[0]
    found = torch.cat([gather_logits(model, [Span(cache, [token])]) for token in ids])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(
    name: str,
    references: dict[str, transformers.LlamaForCausalLM],
    tiny_llama: Callable[[str], Path],
    build_model: Callable[..., LlamaForCausalLM],
) -> None:
    model, prompt = build_model(tiny_llama(name)), list(PROMPTS[0])
    expected = (
        references[name]
        .generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
            pad_token_id=0,
        )[0]
        .tolist()
    )
    cache, ids, new = model.build_cache(len(prompt) + 20), list(prompt), prompt
    for _ in range(20):
        new = [int(gather_logits(model, [Span(cache, new)])[-1].argmax())]
        ids += new
    assert ids == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(dtype: str, alone: Callable[[str, str], torch.Tensor]) -> None:
    expected, found = alone("nine_heads", "float32"), alone("nine_heads", dtype)
    assert (found - expected).norm() / expected.norm() < (0.03 if dtype == "bfloat16" else 0.004)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "world_size"), [(name, count) for name in MODELS for count in RANKS[name]])
def test_every_number_of_ranks_gives_the_bits_of_one(
    name: str,
    world_size: int,
    dtype: str,
    alone: Callable[[str, str], torch.Tensor],
    tiny_llama: Callable[[str], Path],
    run_ranks: Callable[..., list[Any]],
) -> None:
    expected = alone(name, dtype)
    for found in run_ranks(tiny_llama(name), world_size, compute_logits, dtype=dtype):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nine_heads", "tied"])
def test_int8_gives_the_bits_of_one_rank_for_every_number_of_ranks(
    name: str,
    dtype: str,
    tmp_path: Path,
    tiny_llama: Callable[[str], Path],
    run_ranks: Callable[..., list[Any]],
    quantize: Callable[..., Scheme],
) -> None:
    folder = tmp_path / "int8"
    quantize(tiny_llama(name), folder, *(() if name == "nine_heads" else ("lm_head",)))
    (expected,) = run_ranks(folder, 1, compute_logits, dtype=dtype)
    for world_size in RANKS[name]:
        for found in run_ranks(folder, world_size, compute_logits, dtype=dtype):
            assert torch.equal(found, expected), world_size


def test_int8_gives_the_logits_of_a_float_model_with_the_dequantized_weights(
    tmp_path: Path, tiny_llama: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM], quantize: Callable[..., Scheme]
) -> None:
    int8 = tmp_path / "int8"
    quantize(tiny_llama("nine_heads"), int8, "lm_head", "layers.1.mlp")
    stored = load_file(int8 / "model.safetensors")
    weights = {name: tensor for name, tensor in stored.items() if not name.endswith(("_packed", "_scale", "_shape"))}
    for name in stored:
        if name.endswith("_packed"):
            linear = name.removesuffix("_packed")
            values = stored[name].view(torch.uint8).float() - 128
            weights[linear] = values[:, : stored[f"{linear}_shape"][1]] * stored[f"{linear}_scale"]
    assert len(weights) < len(stored)
    (tmp_path / "float").mkdir()
    save_file(weights, tmp_path / "float" / "model.safetensors")
    shutil.copyfile(tiny_llama("nine_heads") / "config.json", tmp_path / "float" / "config.json")
    expected, found = compute_logits(build_model(tmp_path / "float")), compute_logits(build_model(int8))
    assert 0 < (found - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_two_threads_give_the_bits_of_one(
    int8: bool,
    dtype: str,
    tmp_path: Path,
    tiny_llama: Callable[[str], Path],
    run_ranks: Callable[..., list[Any]],
    quantize: Callable[..., Scheme],
) -> None:
    folder = tiny_llama("nine_heads")
    if int8:
        quantize(folder, tmp_path / "int8", "lm_head")
        folder = tmp_path / "int8"

    def work(model: LlamaForCausalLM) -> torch.Tensor:
        return torch.cat((compute_logits(model), compute_long_logits(model)))

    (expected,) = run_ranks(folder, 1, work, dtype=dtype)
    for world_size in (1, 2):
        for found in run_ranks(folder, world_size, work, dtype=dtype, num_threads=2):
            assert torch.equal(found, expected), world_size


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_rank_files_for_two_give_the_same_bits_to_one_two_and_three_ranks(
    int8: bool, tmp_path: Path, tiny_llama: Callable[[str], Path], run_ranks: Callable[..., list[Any]], quantize: Callable[..., Scheme]
) -> None:
    folder = tiny_llama("nine_heads")
    if int8:
        quantize(folder, tmp_path / "int8", "lm_head")
        folder = tmp_path / "int8"
    source = open_checkpoint(folder)
    write_rank_files(source, build_config(source.config), read_scheme(source.config), 2, tmp_path / "two")
    (expected,) = run_ranks(folder, 1, compute_logits)
    for world_size in (1, 2, 3):
        for found in run_ranks(tmp_path / "two", world_size, compute_logits):
            assert torch.equal(found, expected), world_size


class Alone(IdentityCollectives):
    """One rank of several that loads and never speaks."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_reads_little_more_than_its_own_rank_file(world_size: int, tmp_path: Path, tiny_llama: Callable[[str], Path]) -> None:
    source = open_checkpoint(tiny_llama("nine_heads"))
    config = build_config(source.config)
    write_rank_files(source, config, Scheme(), world_size, tmp_path / "ranks")
    whole = sum(info.num_bytes for info in source.tensors.values())
    for checkpoint in (open_checkpoint(tmp_path / "ranks"), source):
        for rank in range(world_size):
            model = LlamaForCausalLM(config, Scheme(), Alone(rank, world_size), dtype="float32", device=torch.device("cpu"))
            read_bytes = load_model(model, checkpoint)
            file_bytes = (tmp_path / "ranks" / rank_file_name(rank, world_size)).stat().st_size
            assert 0.8 * file_bytes < read_bytes < 1.1 * file_bytes
            assert read_bytes < 0.8 * whole


def test_too_many_ranks_are_refused_before_anything_is_read(tiny_llama: Callable[[str], Path]) -> None:
    config = build_config(open_checkpoint(tiny_llama("nine_heads")).config)
    with pytest.raises(LayoutError, match="10 ranks are too many: the model has 9 query heads; 1 to 9 all work"):
        LlamaForCausalLM(config, Scheme(), Alone(0, 10), dtype="float32", device=torch.device("cpu"))
