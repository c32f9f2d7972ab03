"""The updates of a LoRA adapter: which linears it changes, with which shapes, and what each rank owns of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from model.spec.config import LlamaConfig
from model.spec.scheme import Scheme
from model.spec.weights import WeightSpec, list_fused, plan_weights
from parallel.layout import TILE_ROWS, count_tiled_rows

ADAPTER_ITEM_BYTES = 4
"""Adapters are kept and applied in float32, as PEFT does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraUpdate:
    """The update of one linear: scale * lora_B @ lora_A is added to its weight."""

    name: str
    """Full name of the linear."""
    rank: int
    """Inner dimension of the update."""
    scale: float
    stored: str
    """Name of the stored linear, which may be that of several linears in one."""
    first_row: int
    """Row of the stored lora_B that is the linear's first one."""


def plan_linears(config: LlamaConfig) -> Mapping[str, WeightSpec]:
    """Return the full shape and the split of every linear that an adapter can change, by full name."""
    specs = plan_weights(config, Scheme())
    names = (f"model.layers.{layer}.{name}" for layer in range(config.num_hidden_layers) for name in _list_dense(config, layer))
    return {name: specs[f"{name}.weight"] for name in names}


def group_updates(config: LlamaConfig, updates: Mapping[str, LoraUpdate]) -> dict[tuple[int, str], list[LoraUpdate]]:
    """Return the updates of each fused linear, by layer and path of the module."""
    groups = {}
    for layer in range(config.num_hidden_layers):
        for fused, names in list_fused(config, layer).items():
            found = [updates[full] for name in names if (full := f"model.layers.{layer}.{name}") in updates]
            if found:
                groups[layer, fused] = found
    return groups


def list_stored_ranks(group: Iterable[LoraUpdate]) -> dict[str, int]:
    """Return the rank of each stored linear among the updates of one fused linear; lora_A of one stored linear is kept once."""
    return {update.stored: update.rank for update in group}


def count_adapter_bytes(config: LlamaConfig, updates: Mapping[str, LoraUpdate], rank: int, world_size: int) -> int:
    """Return the bytes that a rank keeps of an adapter: every lora_A whole, and its rows of every lora_B."""
    specs, total = plan_linears(config), 0
    for group in group_updates(config, updates).values():
        columns = specs[group[0].name].shape[1]
        total += count_tiled_rows(sum(list_stored_ranks(group).values()), TILE_ROWS) * columns
        for update in group:
            spec = specs[update.name]
            start, stop = spec.rows(rank, world_size)
            total += count_tiled_rows(stop - start, find_unit(config, spec)) * update.rank
    return total * ADAPTER_ITEM_BYTES


def find_unit(config: LlamaConfig, spec: WeightSpec) -> int:
    """Return the rows of a linear that are never split."""
    layout = config.layout()
    return config.head_dim if spec.split in (layout.query, layout.key_value) else getattr(spec.split, "unit", TILE_ROWS)


def _list_dense(config: LlamaConfig, layer: int) -> list[str]:
    return [name for fused, names in list_fused(config, layer).items() if not fused.startswith("experts.") for name in names]
