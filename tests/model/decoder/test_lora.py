"""LoRA adapters: the logits of PEFT, per sequence in one batch, and the same bits for any number of ranks and any batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint.formats import open_checkpoint
from model.checkpoint.lora_folder import LoraFolder
from model.decoder.adapters import load_adapter
from model.decoder.llama import LlamaForCausalLM
from model.kernels.library import find_kernels, kernels_disabled
from model.layers.batch import Span
from model.spec.config import build_config
from model.spec.scheme import Scheme
from tests.model.adapters import compute_peft_logits, write_adapter
from tests.model.families import MODELS, write_model

ATTENTION, ALL = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "all": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "stabilized": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["down_proj", "k_proj"]},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"q_proj": 3, "model.layers.0.self_attn.o_proj": 1.5},
    },
    "one layer": {"target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1]},
    "expression": {"target_modules": r".*layers\.0\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
}
PROMPTS = ([5, 60, 7, 33, 2], [9, 8, 7, 6, 5, 4, 3, 41, 42, 43, 44], [1, 2, 3, 4], [(7 * i) % 79 for i in range(70)])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def adapters(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Folder of an adapter of `SETTINGS` for a tiny model."""
    made: dict[tuple[str, str], Path] = {}

    def find(base: str, kind: str) -> Path:
        if (base, kind) not in made:
            made[base, kind] = write_adapter(tiny_llama(base), tmp_path_factory.mktemp("adapter"), seed=len(made), **SETTINGS[kind])
        return made[base, kind]

    return find


def add(model: LlamaForCausalLM, *folders: Path) -> LlamaForCausalLM:
    for number, folder in enumerate(folders):
        load_adapter(model, f"adapter {number}", LoraFolder(folder, model.config))
    return model


def compute(model: LlamaForCausalLM, prompts: list[tuple[list[int], int]]) -> list[torch.Tensor]:
    """Logits of each (prompt, adapter), all in one batch, and of two decoded tokens."""
    caches = [model.build_cache(100) for _ in prompts]
    steps = [[Span(cache, ids, number) for cache, (ids, number) in zip(caches, prompts, strict=True)]]
    steps += [[Span(cache, [token], number) for cache, (_, number) in zip(caches, prompts, strict=True)] for token in (11, 70)]
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    for spans in steps:
        logits = model.collectives.gather_columns(model.logits_local(model(spans)), model.shares.vocab)
        for mine, part in zip(rows, torch.split(logits, [len(span.ids) for span in spans]), strict=True):
            mine.append(part)
    return [torch.cat(parts) for parts in rows]


@pytest.mark.parametrize("kernels", [True, False], ids=["native", "pytorch"])
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("base", ["nine_heads", "tied"])
def test_logits_are_those_of_peft(
    base: str,
    kind: str,
    kernels: bool,
    tiny_llama: Callable[[str], Path],
    build_model: Callable[..., LlamaForCausalLM],
    adapters: Callable[[str, str], Path],
) -> None:
    folder, adapter = tiny_llama(base), adapters(base, kind)
    if kernels:
        model = add(build_model(folder), adapter)
    else:
        with kernels_disabled():
            model = add(build_model(folder), adapter)
    for ids, found in zip(PROMPTS, compute(model, [(ids, 1) for ids in PROMPTS]), strict=True):
        expected, plain = compute_peft_logits(folder, adapter, [*ids, 11, 70]), compute_peft_logits(folder, None, [*ids, 11, 70])
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
        assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in MODELS if name in ("phi3", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen2")])
def test_other_families_give_the_logits_of_peft(name: str, tmp_path: Path, build_model: Callable[..., LlamaForCausalLM]) -> None:
    folder = write_model(tmp_path / "model", name)
    targets = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj"], "mixtral": ["q_proj", "o_proj"]}.get(name, ALL)
    adapter = write_adapter(folder, tmp_path / "adapter", target_modules=targets)
    model = add(build_model(folder), adapter)
    (found,) = compute(model, [(PROMPTS[1], 1)])
    expected = compute_peft_logits(folder, adapter, [*PROMPTS[1], 11, 70])
    torch.testing.assert_close(found, expected, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["nine_heads", "tied", "nine_heads-int8"])
def test_a_sequence_keeps_its_bits_whatever_adapters_the_others_use(
    kind: str,
    dtype: str,
    tmp_path: Path,
    tiny_llama: Callable[[str], Path],
    quantize: Callable[..., Scheme],
    build_model: Callable[..., LlamaForCausalLM],
    adapters: Callable[[str, str], Path],
) -> None:
    if find_kernels() is None:
        pytest.skip("no kernels: without them the low-order bits depend on the batch")
    name = kind.partition("-")[0]
    folder = tiny_llama(name)
    if kind != name:
        folder = tmp_path / "int8"
        quantize(tiny_llama(name), folder, "lm_head")
    model = add(build_model(folder, dtype), adapters(name, "all"), adapters(name, "patterns"), adapters(name, "attention"))
    plain = build_model(folder, dtype)
    mixed = [(PROMPTS[0], 0), (PROMPTS[1], 1), (PROMPTS[2], 2), (PROMPTS[1], 0), (PROMPTS[3], 1), (PROMPTS[0], 3), (PROMPTS[3], 0)]
    for asked, found in zip(mixed, compute(model, mixed), strict=True):
        (alone,) = compute(model, [asked])
        assert torch.equal(found, alone)
        (without,) = compute(plain, [(asked[0], 0)])  # runs all layers in one call
        assert torch.equal(found, without) == (asked[1] == 0)


@pytest.mark.parametrize("kernels", [True, False], ids=["native", "pytorch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "world_size"), [("nine_heads", 2), ("nine_heads", 3), ("nine_heads", 9), ("tied", 3), ("tied", 8)])
def test_every_number_of_ranks_gives_the_bits_of_one(
    name: str,
    world_size: int,
    dtype: str,
    kernels: bool,
    tiny_llama: Callable[[str], Path],
    run_ranks: Callable[..., list[Any]],
    adapters: Callable[[str, str], Path],
) -> None:
    folders = adapters(name, "all"), adapters(name, "patterns")
    mixed = [(PROMPTS[0], 0), (PROMPTS[1], 1), (PROMPTS[2], 2), (PROMPTS[3], 1)]

    def work(model: LlamaForCausalLM) -> list[torch.Tensor]:
        return compute(add(model, *folders), mixed)

    def run(size: int) -> list[list[torch.Tensor]]:
        if kernels:
            return run_ranks(tiny_llama(name), size, work, dtype=dtype)
        with kernels_disabled():
            return run_ranks(tiny_llama(name), size, work, dtype=dtype)

    (expected,) = run(1)
    for found in run(world_size):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_plan_has_the_bytes_of_loaded_ranks_and_each_reads_its_rows(
    tiny_llama: Callable[[str], Path], run_ranks: Callable[..., list[Any]], adapters: Callable[[str, str], Path]
) -> None:
    base, adapter = tiny_llama("nine_heads"), adapters("nine_heads", "patterns")
    folder = LoraFolder(adapter, build_config(open_checkpoint(base).config))

    def work(model: LlamaForCausalLM) -> tuple[int, int]:
        read = load_adapter(model, "one", folder)
        return model.adapter_bytes, read

    shared = sum(info.num_bytes for name, info in folder.tensors.items() if name.endswith(".A"))
    split = sum(info.num_bytes for name, info in folder.tensors.items() if name.endswith(".B"))
    for world_size in (1, 3):
        results = run_ranks(base, world_size, work)
        assert [kept for kept, _ in results] == [folder.count_bytes(rank, world_size) for rank in range(world_size)]
        assert sum(read for _, read in results) == world_size * shared + split
