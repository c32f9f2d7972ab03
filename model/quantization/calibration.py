"""Quantize a checkpoint layer by layer on one rank; at most one decoder layer is in memory as floats.

Samples go through the float layers. The input of layer N + 1 comes from the float layer N, as in Golden Stick, or for GPTQ from the
quantized one, so that later layers compensate for its error.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from model.checkpoint.source import CheckpointSource
from model.decoder.llama import DecoderLayer, LlamaForCausalLM
from model.decoder.loading import ModelLoader
from model.layers.linear import BiasedLinear
from model.quantization.awq import dequantize
from model.quantization.layer_rounding import LayerRounder, RoundedLayer
from model.quantization.observing import InputObserver, Observations, choose_kept_tokens, run_samples
from model.quantization.recipe import Recipe
from model.quantization.work_folder import WorkFolder
from model.spec.config import LlamaConfig
from model.spec.scheme import Scheme
from model.spec.weights import list_fused, plan_weights
from parallel.collectives import Collectives
from parallel.file_slices import FileReader

Progress = Callable[[int, int], None]


def quantize_layers(
    source: CheckpointSource,
    config: LlamaConfig,
    recipe: Recipe,
    samples: Sequence[Sequence[int]],
    collectives: Collectives,
    work: WorkFolder,
    *,
    dtype: str,
    device: torch.device,
    num_threads: int,
    on_progress: Progress,
) -> None:
    """Quantize the layers missing in `work`, and the head; called by all ranks together.

    samples: token ids, if the recipe needs them. `on_progress` is called with (layers done, total layers including the head).
    """
    model = LlamaForCausalLM(config, Scheme(), collectives, dtype=dtype, device=device, num_threads=num_threads)
    loader, total = ModelLoader(model, source), config.num_hidden_layers + 1
    # A tied head that gets rows of its own is split like any other.
    specs, scheme = plan_weights(replace(config, tie_word_embeddings=False), Scheme()), recipe.build_scheme(config)
    rank, world_size = collectives.rank, collectives.world_size
    rounder = LayerRounder(config, scheme, recipe, collectives, loader.read, lambda name: specs[name].rows(rank, world_size)[0])
    lengths = [len(sample) for sample in samples] if recipe.needs_samples else []
    first = work.count_done()
    hidden = None
    if lengths and first < total:
        hidden = work.read_hidden(first) if first else model.scale_embeddings(read_embeddings(source, samples).to(model.dtype))
    on_progress(first, total)
    for index in range(first, total):
        if index < config.num_hidden_layers:
            rounded = _quantize_layer(model, loader, rounder, recipe, index, hidden, lengths)
        else:
            rounded = _quantize_head(model, loader, rounder, hidden)
        work.write_rank(index, rank, rounded.tensors)
        collectives.barrier()
        if rank == 0:
            work.finish_layer(index, rounded.report, hidden if index + 1 < total else None)
        del rounded  # free it before the next layer is loaded
        collectives.barrier()
        on_progress(index + 1, total)
    loader.reader.close()


@torch.inference_mode()
def _quantize_layer(
    model: LlamaForCausalLM,
    loader: ModelLoader,
    rounder: LayerRounder,
    recipe: Recipe,
    index: int,
    hidden: torch.Tensor | None,
    lengths: Sequence[int],
) -> RoundedLayer:
    if hidden is None:
        return rounder.round_layer(index, None)
    again = recipe.method == "gptq"
    seen = Observations(model, index, len(hidden), hessian=again)
    loader.load_layer(index)
    run_samples(model, index, hidden, lengths, seen, keep_hidden=again)
    model.layers[index] = model.build_layer(index)  # its weights are no longer needed
    rounded = rounder.round_layer(index, seen)
    if again:
        del seen
        loader.load_layer(index)
        _put_rounded(model, index, rounded)
        run_samples(model, index, hidden, lengths, None, keep_hidden=False)
        model.layers[index] = model.build_layer(index)
    return rounded


@torch.inference_mode()
def _quantize_head(model: LlamaForCausalLM, loader: ModelLoader, rounder: LayerRounder, hidden: torch.Tensor | None) -> RoundedLayer:
    if hidden is None or model.config.tie_word_embeddings:
        return rounder.round_head(None)
    model.norm.assign(loader.read("model.norm.weight"), model.device)
    observer = InputObserver(model.config.hidden_size, choose_kept_tokens(len(hidden)), hessian=False)
    for rows in torch.split(hidden, 1024):
        observer(model.norm(rows.to(model.device)).cpu())
    return rounder.round_head(observer)


def _put_rounded(model: LlamaForCausalLM, index: int, rounded: RoundedLayer) -> None:
    """Replace the float weights by the rounded ones, for fused weights whose linears are all quantized."""
    layer, prefix, tensors = model.layers[index], f"model.layers.{index}", rounded.tensors
    assert isinstance(layer, DecoderLayer)
    for path, names in list_fused(model.config, index).items():
        full = [f"{prefix}.{name}" for name in names]
        if all(f"{name}.weight_scale" in tensors for name in full):
            weights = [
                dequantize(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], tensors.get(f"{name}.weight_zero_point"))
                for name in full
            ]
            module: Any = layer.get_submodule(path)
            module = module.linear if isinstance(module, BiasedLinear) else module
            module.assign(torch.cat(weights), model.device)


def read_embeddings(source: CheckpointSource, samples: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return hidden states [tokens of all samples, H] before the first layer, reading only the rows of ids that occur."""
    reader, name = FileReader(), "model.embed_tokens.weight"
    ids, places = torch.unique(torch.tensor([token for sample in samples for token in sample]), return_inverse=True)
    rows = torch.cat([source.read_rows(reader, name, token, token + 1) for token in ids.tolist()])
    reader.close()
    return rows[places]
