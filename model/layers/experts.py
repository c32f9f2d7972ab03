"""Feed-forward of several experts: a router picks some for each token, and their outputs are added up with its weights.

Every rank owns rows of every expert, and computes the same routing in float32. So the numbers of tokens of an expert, the gathers and the
order of every sum are the same for any number of ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from model.backends.interface import Backend
from model.layers.linear import ColumnParallelLinear, RowBlock
from model.spec.architecture import Experts
from parallel.layout import TILE_ROWS


@dataclass(frozen=True, slots=True)
class Routing:
    """The (token, expert) pairs of one pass, sorted by expert, then token."""

    tokens: torch.Tensor
    """int64 [pairs]: the token of each pair."""
    counts: list[int]
    """Pairs of each expert."""
    places: torch.Tensor
    """int64 [tokens, picked]: the pairs of each token, by ascending expert."""
    weights: torch.Tensor
    """float32 [tokens, picked]: the weights of `places`."""


class Expert(nn.Module):
    """The linears of one expert."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj


class ExpertLayer(nn.Module):
    """The router and this rank's rows of all experts of a layer; expert N is the submodule `N`."""

    def __init__(self, experts: Experts, hidden_size: int, members: Sequence[Expert], backend: Backend) -> None:
        super().__init__()
        self._experts, self._backend = experts, backend
        self.router = ColumnParallelLinear(hidden_size, (RowBlock(experts.count, TILE_ROWS),), torch.float32, backend)
        self.runs_all = False
        """Whether tokens run through all experts, with a weight of 0 for those not picked, so that each can be observed."""
        for number, member in enumerate(members):
            self.add_module(str(number), member)

    def route(self, x: torch.Tensor) -> Routing:
        """Pick the experts of each token of x [T, H]."""
        count, picked = self._experts.count, self._experts.per_token
        logits = self.router(x.float())
        found, experts = logits.topk(picked, dim=1)
        # The largest logit is the first one. Sums of a few columns are added up one by one, in the same order in any batch.
        shares = torch.exp(found - found[:, :1])
        if self._experts.normalized:
            total = shares[:, :1].clone()
            for place in range(1, picked):
                total += shares[:, place : place + 1]
        else:
            total = torch.exp(logits - found[:, :1]).double().cumsum(dim=1)[:, -1:].float()
        weights = shares / total
        if self.runs_all:
            weights = torch.zeros((len(x), count), dtype=torch.float32, device=x.device).scatter_(1, experts, weights)
            experts = torch.arange(count, device=x.device).expand(len(x), count)
        experts, order = experts.sort(dim=1)
        by_expert = experts.flatten().argsort(stable=True)
        places = torch.empty_like(by_expert)
        places[by_expert] = torch.arange(len(by_expert), device=x.device)
        counts = torch.bincount(experts.flatten(), minlength=count).tolist()
        return Routing(by_expert // experts.shape[1], counts, places.view(experts.shape), weights.gather(1, order))

    def expand(self, x: torch.Tensor, routing: Routing, activate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the local columns of the intermediate activations of all pairs, [pairs, local width]."""
        rows = torch.split(x[routing.tokens], routing.counts)
        return torch.cat([activate(self._find(number).gate_up_proj(part)) for number, part in enumerate(rows) if len(part)])

    def contract(self, inner: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return the local columns of the weighted outputs, [T, local hidden], given the activations of all pairs, [pairs, width]."""
        rows = torch.split(inner, routing.counts)
        outputs = torch.cat([self._find(number).down_proj(part) for number, part in enumerate(rows) if len(part)]).float()
        total = outputs[routing.places[:, 0]] * routing.weights[:, :1]
        for place in range(1, routing.places.shape[1]):
            total += outputs[routing.places[:, place]] * routing.weights[:, place : place + 1]
        return total.to(inner.dtype)

    def _find(self, number: int) -> Expert:
        member = self.get_submodule(str(number))
        assert isinstance(member, Expert)
        return member
