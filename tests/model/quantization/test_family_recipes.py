"""Every way to quantize, for every family: each keeps the logits near those of the float model, for any number of ranks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint.formats import open_checkpoint
from model.decoder.llama import LlamaForCausalLM
from model.export.quantized_folder import write_quantized
from model.layers.batch import Span
from model.quantization.calibration import quantize_layers
from model.quantization.recipe import Recipe
from model.quantization.work_folder import WorkFolder
from model.spec.config import build_config
from model.spec.linear_scheme import LinearScheme
from tests.model.families import MODELS, write_model

SAMPLES = [[(17 * sample + 13 * i + i * i) % 79 for i in range(40)] for sample in range(6)]
STATIC = LinearScheme(packed=False, activation="tensor", activation_symmetric=False)
INT4 = LinearScheme(bits=4, group_size=16)
RECIPES: dict[str, tuple[Recipe, float]] = {
    # with the largest relative difference of logits
    "smooth, folded": (Recipe(approach="omniquant-a16w8", linear=LinearScheme(), smooth=True, fold=True), 0.06),
    "smooth, static": (Recipe(approach="smooth-quant", linear=STATIC, smooth=True, kv_cache="channel"), 0.25),
    "gptq": (Recipe(approach="gptq-a16w4", linear=INT4, method="gptq"), 0.6),
    "awq": (Recipe(approach="awq-a16w4", linear=replace(INT4, symmetric=False), method="awq"), 0.6),
}
NAMES = ("mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe")
PROMPT = SAMPLES[0][:30]


@pytest.fixture(autouse=True)
def threads(keep_torch_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = write_model(tmp_path_factory.mktemp(name), name)
        return made[name]

    return find


def quantize(folder: Path, recipe: Recipe, world_size: int, place: Path, gather_ranks: Callable[..., list[Any]]) -> Path:
    source, work = open_checkpoint(folder), WorkFolder(place / "work", world_size)
    config = build_config(source.config)
    work.open({})

    def round_layers(collectives: Any) -> None:
        settings: dict[str, Any] = {"dtype": "float32", "device": torch.device("cpu"), "num_threads": 1}
        quantize_layers(source, config, recipe, SAMPLES, collectives, work, **settings, on_progress=lambda done, total: None)

    gather_ranks(world_size, round_layers)
    write_quantized(source, config, recipe.build_scheme(config), work, place / "written", {}, lambda done, total: None)
    return place / "written"


def compute_logits(model: LlamaForCausalLM) -> torch.Tensor:
    return model.logits_local(model([Span(model.build_cache(len(PROMPT)), PROMPT)]))


def test_every_family_is_among_those_quantized() -> None:
    assert {MODELS[name][0] for name in NAMES} == {kind for kind, _ in MODELS.values()}


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_family_stays_near_the_float_model(
    name: str,
    kind: str,
    tmp_path: Path,
    folder: Callable[[str], Path],
    build_model: Callable[..., LlamaForCausalLM],
    gather_ranks: Callable[..., list[Any]],
) -> None:
    recipe, limit = RECIPES[kind]
    written = quantize(folder(name), recipe, 1, tmp_path / "1", gather_ranks)
    exact, found = (compute_logits(build_model(path)) for path in (folder(name), written))
    # Not of all tokens together: where a router is near a tie, a token gets another expert.
    assert 0 < ((found - exact).norm(dim=1) / exact.norm(dim=1)).median() < limit
    again = load_file(quantize(folder(name), recipe, 2, tmp_path / "2", gather_ranks) / "model.safetensors")
    for tensor_name, tensor in load_file(written / "model.safetensors").items():
        assert torch.equal(again[tensor_name], tensor), tensor_name
