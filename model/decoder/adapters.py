"""Load this rank's part of LoRA adapters into a loaded model."""

from itertools import accumulate

import torch

from model.checkpoint.lora_folder import LoraFolder
from model.decoder.llama import LlamaForCausalLM
from model.layers.linear import RowBlock
from model.layers.lora import LoraLayer, UpdatePart
from model.spec.lora_updates import find_unit, group_updates, list_stored_ranks, plan_linears
from model.spec.weights import list_fused
from parallel.file_slices import FileReader


def load_adapter(model: LlamaForCausalLM, name: str, folder: LoraFolder) -> int:
    """Add an adapter to the model under this name, and return the number of bytes read."""
    config, shares, specs = model.config, model.shares, plan_linears(model.config)
    reader, layers = FileReader(), {}
    for (layer, fused), group in group_updates(config, folder.updates).items():
        ranks = list_stored_ranks(group)
        firsts = dict(zip(ranks, accumulate(ranks.values(), initial=0), strict=False))
        parts, first_row = [], 0
        updates = {update.name: update for update in group}
        for linear in (f"model.layers.{layer}.{short}" for short in list_fused(config, layer)[fused]):
            start, stop = specs[linear].rows(shares.rank, shares.world_size)
            if (update := updates.get(linear)) is not None:
                weight = folder.read_b(reader, update, start, stop).mul_(update.scale)
                block = RowBlock(stop - start, find_unit(config, specs[linear]))
                parts.append(UpdatePart(first_row, block, firsts[update.stored], weight))
            first_row += stop - start
        a = torch.cat([folder.read_a(reader, stored) for stored in ranks])
        layers[layer, fused] = LoraLayer(a, parts, model.backend, model.device)
    reader.close()
    model.add_adapter(name, layers)
    return reader.read_bytes
