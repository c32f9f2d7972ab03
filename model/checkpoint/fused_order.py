"""Detect the row order of MindFormers' fused weights, which changed in 1.4 while names and shapes stayed the same.

    order  w_qkv                                           w_gate_hidden
    1.3    all q, all k, all v                             all gate, all up
    1.4    of each KV head: its q heads, its k, its v      gate 0, up 0, gate 1, up 1, ...

Trained gate rows and up rows differ in their norms. Labels of the correct order therefore explain part of the variance of the log row
norms, and labels of the wrong order explain none of it. Uses only the norms of sampled rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.lazy_torch import torch

ORDERS = ("1.3", "1.4")
AUTO = "auto"
MARGIN = 4.0
"""The correct order has to explain at least this many times the variance explained by the other one."""
_SIGMAS, _FLOOR = 6.0, 30.0
"""Meaningless labels explain about 1/rows; the correct ones have to exceed chance by this much (a chi-square sum)."""
_STEP = 0.5
"""Order 1.3 is a step between the halves, not a slope: the rows around the middle have to differ by this part of the halves' difference."""


@dataclass(frozen=True, slots=True)
class RowNorms:
    """Norms of sampled rows of one fused tensor."""

    rows: torch.Tensor
    """Row indices, int64 [sampled], ascending."""
    norms: torch.Tensor
    """float32 [sampled]."""
    num_rows: int
    """Rows of the whole tensor."""
    heads: tuple[int, int] | None = None
    """Of w_qkv: query heads and KV heads; None: w_gate_hidden."""


@dataclass(frozen=True, slots=True)
class OrderEvidence:
    """Evidence on the order from the sampled rows."""

    order: str | None
    """An entry of ORDERS; None: undecided."""
    explained: tuple[float, float]
    """Fraction of the variance of row norms explained by each of ORDERS, averaged over the tensors."""
    num_tensors: int
    """Number of sampled fused tensors."""

    def describe(self) -> str:
        """Describe the evidence for messages."""
        shares = [f"{100 * share:.3g} %" for share in self.explained]
        explain = f"order 1.3 explains {shares[0]} and order 1.4 explains {shares[1]} of the variance of row norms"
        return f"{explain} in {self.num_tensors} fused tensors"


def weigh_orders(tensors: Sequence[RowNorms]) -> OrderEvidence:
    """Decide between the orders, given tensors of one kind: all w_gate_hidden or all w_qkv."""
    scores, shares = [0.0, 0.0], [0.0, 0.0]
    halves, middle, count, freedom = 0.0, 0.0, 0, 0
    for tensor in tensors:
        labels = [_label_rows(tensor, order) for order in ORDERS]
        if len(tensor.rows) < 16 or torch.equal(*labels) or not bool(tensor.norms.isfinite().all()):
            continue
        logs = tensor.norms.clamp_min(float(tensor.norms.median()) / 1000 + 1e-30).log()
        logs = (logs - logs.mean()).double()
        for number, label in enumerate(labels):
            share = _explain(logs, label)
            shares[number] += share
            scores[number] += share * len(logs)
        if tensor.heads is None:
            half, near_middle = _measure_step(logs, tensor)
            halves += abs(half)
            middle += near_middle if half > 0 else -near_middle
        count, freedom = count + 1, freedom + (1 if tensor.heads is None else 2)
    if count == 0:
        return OrderEvidence(None, (0.0, 0.0), 0)
    best = int(scores[1] > scores[0])
    needed = max(freedom + _SIGMAS * (2 * freedom) ** 0.5 + _FLOOR, MARGIN * scores[1 - best])
    is_sure = scores[best] >= needed and (best == 1 or middle >= _STEP * halves)
    return OrderEvidence(ORDERS[best] if is_sure else None, (shares[0] / count, shares[1] / count), count)


def _label_rows(tensor: RowNorms, order: str) -> torch.Tensor:
    """Label each sampled row with the fused tensor it belongs to: 0, 1, 2."""
    rows = tensor.rows
    if tensor.heads is None:
        return (rows >= tensor.num_rows // 2).long() if order == ORDERS[0] else rows % 2
    heads, kv_heads = tensor.heads
    head_rows = tensor.num_rows // (heads + 2 * kv_heads)
    if order == ORDERS[0]:
        bounds, place = torch.tensor([heads, heads + kv_heads]) * head_rows, rows
    else:
        group = heads // kv_heads
        bounds, place = torch.tensor([group, group + 1]) * head_rows, rows % ((group + 2) * head_rows)
    return torch.bucketize(place, bounds, right=True)


def _explain(logs: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction of the variance between groups; `logs` have mean 0."""
    total = float((logs * logs).sum())
    if total == 0.0:
        return 0.0
    groups = [logs[labels == label] for label in set(labels.tolist())]
    return sum(len(group) * float(group.mean()) ** 2 for group in groups) / total


def _measure_step(logs: torch.Tensor, tensor: RowNorms) -> tuple[float, float]:
    """Differences of means: between the halves, and between the two quarters that meet in the middle."""
    first = logs[tensor.rows < tensor.num_rows // 2]
    second = logs[tensor.rows >= tensor.num_rows // 2]
    if not len(first) or not len(second):
        return 0.0, 0.0
    near, after = first[-max(1, len(first) // 4) :], second[: max(1, len(second) // 4)]
    return float(first.mean() - second.mean()), float(near.mean() - after.mean())
