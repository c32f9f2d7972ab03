"""Picks the next token of every sequence, the same on every rank, from candidates that the ranks exchange.

Each rank sends only its own best ones; whole logits travel when somebody samples without top-k or asks for
log-probabilities. Order of steps and random numbers as in MindFormers: repetition penalty, temperature, top-k, top-p,
then one draw of a numpy generator. Knows logits and ids; no text, no caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from parallel.collectives import Collectives
from parallel.errors import RequestError

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence goes on. Defaults are MindFormers' GenerationConfig's."""

    max_new_tokens: int
    """Tokens to add at most."""
    do_sample: bool = False
    """Draw at random; False takes the likeliest."""
    temperature: float = 1.0
    """Logits are divided by this when sampling."""
    top_k: int = 50
    """Sample among the k likeliest; 0 for all."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach this sum."""
    repetition_penalty: float = 1.0
    """Logits of ids that occurred are divided by this (multiplied, when negative)."""
    seed: int = 0
    """Start of the sequence's own random numbers."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence id."""
    logprobs: bool = False
    """Report the log-probability of each new token, from the logits before any of the above."""

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0 (for the likeliest token, use --greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0: all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295"),
        )
        for name, holds, needed in checks:
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)}, but has to be {needed}")


@dataclass(slots=True)
class SamplingState:
    """What sampling keeps of one sequence."""

    params: SamplingParams
    """Its options."""
    penalized: set[int]
    """Ids that occurred."""
    generator: np.random.RandomState
    """Its random numbers: MindFormers' generator, one a sequence, so that neighbours do not matter."""

    def take(self, token: int) -> None:
        """Go on as if this token had been chosen."""
        if self.params.do_sample:
            self.generator.random_sample()  # the one that `_draw` takes
        self.penalized.add(token)


def sample(
    logits_local: torch.Tensor, states: Sequence[SamplingState], sizes: Sequence[int], collectives: Collectives
) -> list[tuple[int, float | None]]:
    """The next (id, log-probability or None) of every sequence.

    logits_local: float32 [sequences, vocab_local]; sizes: vocab_local of every rank.
    """
    first_id = sum(sizes[: collectives.rank])
    if any(_needs_all(state.params) for state in states):
        full = collectives.gather_columns(logits_local, sizes).numpy(force=True)
        rows = []
        for values, state in zip(full, states, strict=True):
            penalized = _penalize(values, state, 0)
            count = state.params.top_k or len(values) if state.params.do_sample else 1
            ids = _best(penalized, count)
            logprob = _log_probability(values) if state.params.logprobs else None
            rows.append((ids, penalized[ids], logprob))
    else:
        count = max(state.params.top_k if state.params.do_sample else 1 for state in states)
        local = logits_local.numpy(force=True)
        mine = np.full((len(states), 2 * count), -np.inf)  # float64 holds ids and float32 logits exactly
        for row, (values, state) in enumerate(zip(local, states, strict=True)):
            penalized = _penalize(values, state, first_id)
            ids = _best(penalized, count)
            mine[row, : len(ids)] = ids + first_id
            mine[row, count : count + len(ids)] = penalized[ids]
        wide = [2 * count] * collectives.world_size
        gathered = collectives.gather_columns(torch.from_numpy(mine).to(logits_local.device), wide).numpy(force=True)
        rows = []
        for values, state in zip(gathered.reshape(len(states), -1, 2, count), states, strict=True):
            ids, logits = values[:, 0].ravel(), values[:, 1].ravel()
            keep = np.lexsort((ids, -logits))[: state.params.top_k if state.params.do_sample else 1]
            keep = keep[np.isfinite(ids[keep])]
            rows.append((ids[keep].astype(np.int64), logits[keep].astype(np.float32), None))
    chosen = []
    for (ids, logits, logprob), state in zip(rows, states, strict=True):
        token = int(_draw(ids, logits, state) if state.params.do_sample else ids[0])
        state.penalized.add(token)
        chosen.append((token, None if logprob is None else float(logprob[token])))
    return chosen


def _needs_all(params: SamplingParams) -> bool:
    return params.logprobs or (params.do_sample and params.top_k == 0)


def _penalize(values: Floats, state: SamplingState, first_id: int) -> Floats:
    """The logits after the repetition penalty of the ids that are in this part of the vocabulary."""
    penalty = state.params.repetition_penalty
    if penalty == 1.0:
        return values
    ids = np.array(sorted(state.penalized), dtype=np.int64) - first_id
    ids = ids[(ids >= 0) & (ids < len(values))]
    out: Floats = values.copy()
    seen = out[ids]
    out[ids] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return out


def _best(values: Floats, count: int) -> Ids:
    """Ids of the `count` largest values, largest first; of equals the lowest id first."""
    if count == 1:
        return np.array([values.argmax()])
    if count < len(values):
        threshold = np.partition(values, -count)[-count]
        ids = np.flatnonzero(values >= threshold)
    else:
        ids = np.arange(len(values))
    best: Ids = ids[np.lexsort((ids, -values[ids]))]
    return best[:count]


def _draw(ids: Ids, logits: Floats, state: SamplingState) -> int:
    """One id at random, from candidates that are sorted by falling logits."""
    params = state.params
    scaled = logits.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled[0])
    if params.top_p < 1:
        probabilities = weights / weights.sum()
        reached = np.cumsum(probabilities) - probabilities  # the sum before each candidate
        ids, weights = ids[reached < params.top_p], weights[reached < params.top_p]
    # numpy's `choice` over the whole vocabulary walks the ids upwards; candidates of probability 0 change nothing.
    order = np.argsort(ids)
    cumulative = np.cumsum(weights[order] / weights.sum())
    place = np.searchsorted(cumulative / cumulative[-1], state.generator.random_sample(), side="right")
    return int(ids[order][place])


def _log_probability(values: Floats) -> Floats:
    """float32 log-softmax of the whole vocabulary, summed in float64."""
    wide = values.astype(np.float64)
    top = wide.max()
    result: Floats = (wide - (top + np.log(np.exp(wide - top).sum()))).astype(np.float32)
    return result
