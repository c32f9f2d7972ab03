"""Tensors that MindSpore's parallel optimizer has cut by rows over the data-parallel ranks, on top of their model-parallel slices.

Training leaves such checkpoints (enable_parallel_optimizer). Depends on names, sizes and the config; does not read tensors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.checkpoint.mindspore_header import StoredTensor
from model.checkpoint.mindspore_names import split_name
from parallel.errors import CheckpointError

_VOCABULARY = ("tok_embeddings.embedding_weight", "lm_head.weight")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "num_key_value_heads", "vocab_size")

Part = tuple[Path, StoredTensor]


def count_shards(names: Mapping[str, Part], config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of shards and of slices of a rank's tensors; (1, 1) if their rows are whole or the sizes do not tell."""
    hidden, width = config.get("hidden_size"), config.get("intermediate_size")
    for name, (_, stored) in names.items():
        if not name.endswith("feed_forward.w2.weight") or len(stored.dims) != 2 or not type(hidden) is type(width) is int:
            continue
        rows, columns = stored.dims
        if 0 < rows < hidden and hidden % rows == 0 and columns and width % columns == 0:
            return hidden // rows, width // columns
    return 1, 1


def is_sharded(name: str, part: Part, shards: int, slices: int, config: Mapping[str, Any]) -> bool | None:
    """Return whether a rank's tensor is one of `shards` parts of its slice, by its number of rows; None if both are possible.

    Raises CheckpointError for a tensor of another size, or whose size is unknown.
    """
    rows, wanted = part[1].dims[0], _list_rows(name, slices, config)
    whole, cut = rows in wanted, rows * shards in wanted
    if not whole and not cut:
        raise CheckpointError(
            f"{part[0]}: {name} has {rows} rows, but {' or '.join(map(str, sorted(wanted))) or 'another number'} of each slice, or "
            f"1/{shards} of them, are needed: this checkpoint was cut over data-parallel ranks too (enable_parallel_optimizer); merge it "
            "with MindSpore's transform_checkpoints first"
        )
    return None if whole and cut else cut


def join_shards(parts: Sequence[Part]) -> Part:
    """Return the tensor whose rows are those of the parts in turn."""
    (file, first), *_ = parts
    rows = sum(stored.dims[0] for _, stored in parts)
    slices = tuple(one for _, stored in parts for one in stored.slices)
    files = tuple(path for path, stored in parts for _ in stored.slices)
    return file, StoredTensor((rows, *first.dims[1:]), first.tensor_type, slices, files)


def _list_rows(name: str, slices: int, config: Mapping[str, Any]) -> set[int]:
    """Return the possible numbers of rows of a float tensor in one slice."""
    hidden, width, heads, head_dim, kv_heads, vocabulary = (config.get(key) for key in _SIZES)
    kv_heads = heads if kv_heads is None else kv_heads
    if not all(type(size) is int for size in (hidden, width, heads, kv_heads, vocabulary)):
        return set()
    assert hidden is not None and width is not None and heads is not None and kv_heads is not None and vocabulary is not None
    head_dim = hidden // heads if head_dim is None else head_dim
    rest = split_name(name)[1]
    if rest in _VOCABULARY:
        return {vocabulary, vocabulary // slices}
    linear = rest.rpartition(".")[0]
    sizes = {
        "attention.wq": heads * head_dim // slices,
        "attention.wk": kv_heads * head_dim // slices,
        "attention.wv": kv_heads * head_dim // slices,
        "attention.w_qkv": (heads + 2 * kv_heads) * head_dim // slices,
        "feed_forward.w1": width // slices,
        "feed_forward.w3": width // slices,
        "feed_forward.w_gate_hidden": 2 * width // slices,
        **dict.fromkeys(("attention.wo", "feed_forward.w2", "attention_norm", "ffn_norm", "norm_out"), hidden),
    }
    return {sizes[linear]} if linear in sizes and rest.endswith((".weight", ".bias")) else set()
