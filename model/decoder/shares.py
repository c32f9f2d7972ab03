"""The share of each split that every rank owns, in elements."""

from model.layers.linear import RowBlock
from model.spec.config import LlamaConfig
from parallel.layout import plan_heads


class Shares:
    """The share of each split that every rank owns, in elements."""

    def __init__(self, config: LlamaConfig, rank: int, world_size: int) -> None:
        layout, ranks = config.layout(), range(world_size)
        layout.check(world_size)

        def widths(split: str, size: int) -> list[int]:
            parts = [getattr(layout, split).interval(size, r, world_size) for r in ranks]
            return [stop - start for start, stop in parts]

        self.rank, self.world_size = rank, world_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        (q_start, q_stop), (kv_start, kv_stop) = plan_heads(heads, kv_heads, rank, world_size)
        self.num_heads, self.num_kv_heads = q_stop - q_start, kv_stop - kv_start
        self.query = widths("query", heads * config.head_dim)
        self.hidden = widths("hidden", config.hidden_size)
        self.intermediate = widths("intermediate", config.intermediate_size)
        self.experts = widths("experts", 0 if config.experts is None else config.experts.intermediate_size)
        self.vocab = widths("vocab", config.vocab_size)
        self.first_id = sum(self.vocab[:rank])
        self.ends = [sum(self.vocab[: r + 1]) for r in ranks]
        self.key_value = self.num_kv_heads * config.head_dim
        self.units = {"hidden": layout.hidden.unit, "intermediate": layout.intermediate.unit, "vocab": layout.vocab.unit}
        self.units |= {"head": config.head_dim, "experts": layout.experts.unit}

    def block(self, kind: str, unit: str | None = None) -> RowBlock:
        """Return the rows of a split that this rank owns."""
        width = getattr(self, kind)
        return RowBlock(width if isinstance(width, int) else width[self.rank], self.units[unit or kind])
