"""Observe the activations of one decoder layer during calibration, and run all samples through it.

Every rank sees the full inputs, since they are gathered anyway; keys and values are the rank's own.
"""

from collections.abc import Sequence

import torch

from model.decoder.llama import DecoderLayer, LlamaForCausalLM
from model.layers.batch import Span
from model.spec.weights import linear_shape, list_fused

PASS_TOKENS = 512
"""Tokens of several samples per pass, unless a single sample is longer; bounds the activation memory."""
KEPT_TOKENS = 256
"""Number of inputs kept, evenly spread over all samples, to measure errors and for AWQ's search."""


class InputObserver:
    """Statistics of the inputs [tokens, columns] of one linear."""

    def __init__(self, columns: int, kept_tokens: torch.Tensor, *, hessian: bool) -> None:
        """kept_tokens: sorted positions, over all samples, of the tokens to keep."""
        self.low = torch.full((columns,), float("inf"))
        self.high = torch.full((columns,), float("-inf"))
        self.hessian = torch.zeros((columns, columns)) if hessian else None
        self.kept = torch.empty((len(kept_tokens), columns))
        self._sum_absolute = torch.zeros(columns, dtype=torch.float64)
        self._kept_tokens, self._num_tokens = kept_tokens, 0

    def __call__(self, x: torch.Tensor) -> None:
        """Process the next tokens."""
        x = x.float()
        torch.minimum(self.low, x.amin(dim=0), out=self.low)
        torch.maximum(self.high, x.amax(dim=0), out=self.high)
        self._sum_absolute += x.abs().sum(dim=0, dtype=torch.float64)
        if self.hessian is not None:
            # Weight all tokens equally. Otherwise the few tokens with huge activations (the first of a text) dominate the choice of what is
            # rounded well, although the following norm shrinks exactly these. Measured: perplexity of SmolLM2-135M in 4 bits 43.6 without,
            # 36.0 with it (float 30.0).
            alike = x / x.norm(dim=1, keepdim=True).clamp_min_(1e-12)
            self.hessian.addmm_(alike.T, alike)
        first, end = torch.searchsorted(self._kept_tokens, torch.tensor([self._num_tokens, self._num_tokens + len(x)])).tolist()
        self.kept[first:end] = x[self._kept_tokens[first:end] - self._num_tokens]
        self._num_tokens += len(x)

    @property
    def absmax(self) -> torch.Tensor:
        """Largest magnitude of each channel, float32 [columns]."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def mean_absolute(self) -> torch.Tensor:
        """Mean magnitude of each channel, float32 [columns]."""
        return (self._sum_absolute / max(1, self._num_tokens)).float()


class CacheObserver:
    """Stand-in for the KV caches of all samples in turn: records the largest magnitudes and stores nothing."""

    length = 0

    def __init__(self, num_rows: int) -> None:
        self.absmax = torch.zeros((2, num_rows))
        """Per row of this rank's key (0) and value (1) projections."""
        self._last: tuple[torch.Tensor, torch.Tensor]

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Observe [tokens, heads, head_dim]."""
        for kind, states in enumerate((keys, values)):
            torch.maximum(self.absmax[kind], states.flatten(1).abs().amax(dim=0).float().cpu(), out=self.absmax[kind])
        self._last = keys.transpose(0, 1), values.transpose(0, 1)

    def read(self, layer: int, scale: torch.Tensor | None, end: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values just appended, [heads, tokens, head_dim]: each sample is a new sequence."""
        return self._last


class Observations:
    """All observations of one layer.

    All tokens run through all experts, so that each expert sees as many as a single feed-forward would.
    """

    def __init__(self, model: LlamaForCausalLM, index: int, num_tokens: int, *, hessian: bool) -> None:
        config, kept = model.config, choose_kept_tokens(num_tokens)
        self.inputs: dict[str, InputObserver] = {}
        """By path of the module in DecoderLayer. Experts have the same input, and so the same observer."""
        for path, names in list_fused(config, index).items():
            first = "experts.0.gate_up_proj"
            if path.startswith("experts.") and path.endswith("gate_up_proj") and path != first:
                self.inputs[path] = self.inputs[first]
            else:
                self.inputs[path] = InputObserver(linear_shape(config, names[0])[1], kept, hessian=hessian)
        self.cache = CacheObserver(model.shares.key_value)


def choose_kept_tokens(num_tokens: int) -> torch.Tensor:
    """Return the sorted positions of up to KEPT_TOKENS tokens, evenly spread."""
    return torch.arange(min(num_tokens, KEPT_TOKENS)) * num_tokens // min(num_tokens, KEPT_TOKENS)


def run_samples(
    model: LlamaForCausalLM, index: int, hidden: torch.Tensor, lengths: Sequence[int], seen: Observations | None, *, keep_hidden: bool
) -> None:
    """Run the samples, concatenated hidden states [tokens of all, H], through layer `index`.

    `hidden` is overwritten with the outputs unless `keep_hidden`. `seen` observes the inputs.
    """
    layer = model.layers[index]
    assert isinstance(layer, DecoderLayer)
    hooks = []
    if seen is not None:
        for observer, path in {observer: path for path, observer in reversed(seen.inputs.items())}.items():
            take = observer.__call__
            hooks.append(layer.get_submodule(path).register_forward_pre_hook(lambda module, args, take=take: take(args[0].cpu())))
    cache = CacheObserver(model.shares.key_value) if seen is None else seen.cache
    if layer.experts is not None:
        layer.experts.runs_all = seen is not None
    first = 0
    try:
        for part in _group_samples(lengths):
            end = first + sum(part)
            out = model.run_layer(index, hidden[first:end].to(model.device, model.dtype), [Span(cache, range(length)) for length in part])
            if not keep_hidden:
                hidden[first:end] = out
            first = end
    finally:
        for hook in hooks:
            hook.remove()


def _group_samples(lengths: Sequence[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for length in lengths:
        if groups and sum(groups[-1]) + length <= PASS_TOKENS:
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups
