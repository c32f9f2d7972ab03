"""Tensor names that differ from Hugging Face's Llama by a common prefix: `layers.0...`, `transformer.layers.0...`, and the like."""

from collections.abc import Iterable
from pathlib import Path

from model.spec.quoting import quote, quote_name
from parallel.errors import CheckpointError

_INNER = "model."
_EMBEDDING = "embed_tokens.weight"
_INNER_PARTS = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")
_ADAPTER_PARTS = (".lora_A", ".lora_B", ".lora_embedding", ".base_layer.", ".ia3_l", ".hada_w", ".modules_to_save.")


def find_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """Map stored names to Hugging Face names; unchanged if they have the usual prefix or none is found.

    A prefix is accepted only if all names have it, the output head excepted. Raises CheckpointError for unmerged adapters, and if only
    some names have the prefix.
    """
    stored = list(names)
    adapter = next((name for name in stored if any(part in name for part in _ADAPTER_PARTS)), None)
    if adapter is not None:
        raise CheckpointError(f"{path} holds {quote_name(adapter)}, a part of an adapter: merge it with PEFT's merge_and_unload() first")
    same = {name: name for name in stored}
    embeddings = [name for name in stored if name.endswith(_EMBEDDING)]
    if _INNER + _EMBEDDING in same or len(embeddings) != 1:
        return same
    prefix = embeddings[0].removesuffix(_EMBEDDING)
    if prefix and not prefix.endswith("."):
        return same
    outer = prefix.removesuffix(_INNER)
    found = {name: _rename(name, prefix, outer) for name in stored}
    left = [name for name, target in found.items() if target is None]
    if left:
        others = f", and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(
            f"{path}: the names of {len(stored) - len(left)} of {len(stored)} tensors differ by the prefix {quote(prefix)} from those of a "
            f"Llama model, but not {quote_name(left[0])}{others}: give a checkpoint of the text model alone"
        )
    targets = {name: target for name, target in found.items() if target is not None}
    if len(set(targets.values())) < len(targets):
        raise CheckpointError(f"{path}: without the prefix {quote(prefix)}, two tensors have the same name: save the model again")
    return targets


def _rename(name: str, prefix: str, outer: str) -> str | None:
    inner = name.removeprefix(prefix)
    if name.startswith(prefix) and inner.startswith(_INNER_PARTS):
        return _INNER + inner
    for before in (outer, prefix, ""):
        if name.startswith(f"{before}lm_head."):
            return name.removeprefix(before)
    return None
