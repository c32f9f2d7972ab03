"""Sampling of the next token of every sequence, identical on every rank, from candidates that the ranks exchange.

Each rank sends only its best candidates; full logits are gathered when a sequence samples without top-k or with a large one, or requests
log-probabilities. The order of operations and the random numbers follow MindFormers: repetition penalty, temperature, top-k, top-p, then
one draw from a numpy generator. OpenAI's bias and penalties are applied after the repetition penalty.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.engine.choice import NO_TOKEN, Choice
from model.engine.sampling_params import SamplingParams
from parallel.collectives import Collectives

LEAST_LOGPROB = -9999.0
"""vLLM's substitute for log(0), since JSON has no infinity."""
_MOST_CANDIDATES = 2048
"""Maximum per rank and sequence; beyond it, full logits are exchanged. A client may request any top_k, and more than 65,536 candidates
would not fit a slot of shared memory."""

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]


class RandomNumbers:
    """Random numbers of one sequence: MindFormers' generator, whose next numbers can be read ahead."""

    def __init__(self, seed: int) -> None:
        self._generator, self._ahead = np.random.RandomState(seed), deque[float]()

    def draw(self) -> float:
        """Return the next number in [0, 1)."""
        return self._ahead.popleft() if self._ahead else self._generator.random_sample()

    def peek(self, place: int) -> float:
        """Return the number that `draw` returns after `place` others."""
        while len(self._ahead) <= place:
            self._ahead.append(self._generator.random_sample())
        return self._ahead[place]


class NumbersAhead:
    """A copy of random numbers after the first `place` of them. Valid until the original draws."""

    def __init__(self, numbers: RandomNumbers, place: int) -> None:
        self._numbers, self._place = numbers, place

    def draw(self) -> float:
        """Return the next number in [0, 1)."""
        self._place += 1
        return self._numbers.peek(self._place - 1)


@dataclass(slots=True)
class SamplingState:
    """Sampling state of one sequence."""

    params: SamplingParams
    """Its options."""
    penalized: set[int]
    """Ids that have occurred."""
    numbers: RandomNumbers | NumbersAhead
    """Its own random numbers, so that other sequences do not affect them."""
    counts: dict[int, int] = field(default_factory=dict)
    """Number of occurrences of each new id, if a penalty needs it."""
    end_ids: frozenset[int] = frozenset()
    """Ids that end the sequence."""
    num_new: int = 0
    """Number of new tokens."""
    last_ids: tuple[int, ...] = ()
    """The last new tokens, as far as `bad_words` needs them."""

    def take(self, token: int) -> None:
        """Advance the state as if this token had been sampled."""
        if self.params.do_sample:
            self.numbers.draw()  # the random number that `_draw` would consume
        self.note(token)

    def after(self, tokens: Sequence[int]) -> "SamplingState":
        """Return a copy of the state after these tokens. Valid until this state takes a token."""
        penalized = set(self.penalized) if self.params.repetition_penalty != 1 else set()
        assert isinstance(self.numbers, RandomNumbers)
        ahead = replace(self, penalized=penalized, counts=dict(self.counts), numbers=NumbersAhead(self.numbers, len(tokens)))
        for token in tokens:
            ahead.note(token)
        return ahead

    def note(self, token: int) -> None:
        """Record that this token has been chosen."""
        self.penalized.add(token)
        self.num_new += 1
        if self.params.bad_words:
            self.last_ids = (*self.last_ids, token)[-max(map(len, self.params.bad_words)) :]
        if self.params.frequency_penalty or self.params.presence_penalty:
            self.counts[token] = self.counts.get(token, 0) + 1

    def list_forbidden(self) -> list[int]:
        """List the ids that must not come next."""
        params = self.params
        found = [word[-1] for word in params.bad_words if len(word) == 1 or self.last_ids[1 - len(word) :] == word[:-1]]
        if self.num_new < params.min_tokens and not params.grammar:
            found += self.end_ids
        return found


def sample(
    logits_local: torch.Tensor,
    states: Sequence[SamplingState],
    sizes: Sequence[int],
    collectives: Collectives,
    allowed: Mapping[int, npt.NDArray[np.bool_]] | None = None,
    find_largest: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> list[Choice | None]:
    """Choose the next token of every sequence; None where the largest logit is NaN or infinite, identically on every rank.

    logits_local: float32 [sequences, vocab_local]; sizes: vocab_local of every rank. allowed: mask of the whole vocabulary for rows that a
    grammar limits. NO_TOKEN where no token is allowed. find_largest: finds candidates on the device of the logits where no option changes
    logits; None: they are found in host memory.
    """
    first_id, masks = sum(sizes[: collectives.rank]), allowed or {}
    chosen: list[Choice | None] = []
    if any(_needs_all(state.params) for state in states):
        full = collectives.gather_columns(logits_local, sizes).numpy(force=True)
        for row, (values, state) in enumerate(zip(full, states, strict=True)):
            penalized = _penalize(values, state, 0, masks.get(row))
            if not math.isfinite(top := penalized.max()):
                chosen.append(_explain_top(top, state))
                continue
            ids, total = _list_candidates(penalized, state.params)
            logprobs = _log_probability(values) if state.params.logprobs else None
            chosen.append(_choose(ids, penalized[ids], total, state, logprobs))
        return chosen
    count = min(sum(sizes), max(state.params.top_k if state.params.do_sample else 1 for state in states))
    if find_largest is not None and not masks and not any(_changes_logits(state) for state in states):
        width = min(count, logits_local.shape[1])
        values_found, columns = find_largest(logits_local, width)
        mine = logits_local.new_full((len(states), 2, count), -torch.inf, dtype=torch.float64)
        mine[:, 0, :width], mine[:, 1, :width] = columns + first_id, values_found
        mine = mine.view(len(states), 2 * count)
    else:
        mine = _list_best(logits_local, states, count, first_id, masks)
    wide = [2 * count] * collectives.world_size
    gathered = collectives.gather_columns(mine.cpu(), wide).numpy()
    candidates = gathered.reshape(len(states), -1, 2, count)
    tops = candidates[:, :, 1].max(axis=(1, 2)).tolist()  # a NaN in a row is among its rank's candidates, as the largest
    for values, state, top in zip(candidates, states, tops, strict=True):
        if not math.isfinite(top):
            chosen.append(_explain_top(top, state))
            continue
        every, logits = values[:, 0].ravel(), values[:, 1].ravel()
        keep = np.lexsort((every, -logits))[: state.params.top_k if state.params.do_sample else 1]
        keep = keep[np.isfinite(every[keep])]
        chosen.append(_choose(every[keep].astype(np.int64), logits[keep].astype(np.float32), None, state, None))
    return chosen


def _list_best(
    logits_local: torch.Tensor, states: Sequence[SamplingState], count: int, first_id: int, masks: Mapping[int, npt.NDArray[np.bool_]]
) -> torch.Tensor:
    """Return this rank's best candidates, found in host memory: float64 [rows, ids and then logits of `count` candidates]."""
    local = logits_local.numpy(force=True)
    mine = np.full((len(states), 2 * count), -np.inf)  # float64 represents ids and float32 logits exactly
    for row, (values, state) in enumerate(zip(local, states, strict=True)):
        mask = masks.get(row)
        penalized = _penalize(values, state, first_id, None if mask is None else mask[first_id : first_id + len(values)])
        ids = _best(penalized, count)
        mine[row, : len(ids)] = ids + first_id
        mine[row, count : count + len(ids)] = penalized[ids]
    return torch.from_numpy(mine)


def _changes_logits(state: SamplingState) -> bool:
    """Return whether an option changes the logits or forbids a token."""
    params = state.params
    changed = params.repetition_penalty != 1.0 or params.logit_bias or state.counts or params.allowed_token_ids
    return bool(changed or state.list_forbidden())


def score(logits_local: torch.Tensor, targets: Sequence[tuple[int, int]], sizes: Sequence[int], collectives: Collectives) -> list[Choice]:
    """Return the log-probability of a given token in each row, before any penalty. Rank 0 only; empty on the others.

    logits_local: float32 [rows, vocab_local]; targets: (token id, number of most likely tokens to report) per row; sizes: vocab_local of
    every rank.
    """
    full = collectives.gather_columns(logits_local, sizes)
    if collectives.rank:
        return []
    rows = full.numpy(force=True)
    return [_report(token, _log_probability(values), top) for values, (token, top) in zip(rows, targets, strict=True)]


def _report(token: int, logprobs: Floats, top: int) -> Choice:
    ids = _best(logprobs, top) if top else ()
    rank = 1 + int(np.count_nonzero(logprobs > logprobs[token]))
    return Choice(token, _read_logprob(logprobs, token), tuple((int(i), _read_logprob(logprobs, i)) for i in ids), rank)


def _choose(ids: Ids, logits: Floats, total: float | None, state: SamplingState, logprobs: Floats | None) -> Choice:
    """Choose one of the candidates. `logprobs`: log-probabilities of the whole vocabulary, if requested."""
    token = int(_draw(ids, logits, total, state) if state.params.do_sample else ids[0])
    state.note(token)
    return Choice(token, None) if logprobs is None else _report(token, logprobs, state.params.top_logprobs)


def _read_logprob(logprobs: Floats, token: int | np.integer[Any]) -> float:
    return max(float(logprobs[token]), LEAST_LOGPROB)


def _needs_all(params: SamplingParams) -> bool:
    return params.logprobs or (params.do_sample and not 0 < params.top_k <= _MOST_CANDIDATES)


def _explain_top(top: float, state: SamplingState) -> Choice | None:
    params = state.params
    is_limited = params.grammar or params.allowed_token_ids or params.bad_words or params.min_tokens
    return NO_TOKEN if is_limited and top == -math.inf else None


def _penalize(values: Floats, state: SamplingState, first_id: int, mask: npt.NDArray[np.bool_] | None) -> Floats:
    """Return the logits of this part of the vocabulary after bias, penalties and restrictions. mask: this part of a grammar's."""
    params, forbidden = state.params, state.list_forbidden()
    restricted = mask is not None or forbidden or params.allowed_token_ids
    is_penalized = params.repetition_penalty != 1.0 or params.logit_bias or state.counts
    if not is_penalized and not restricted:
        return values
    out: Floats = values.copy() if is_penalized else values
    if params.repetition_penalty != 1.0:
        ids, _ = _inside(sorted(state.penalized), first_id, len(values))
        seen, penalty = out[ids], np.float32(params.repetition_penalty)
        out[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
    if params.logit_bias:
        ids, keep = _inside([token for token, _ in params.logit_bias], first_id, len(values))
        out[ids] += np.array([bias for _, bias in params.logit_bias], dtype=np.float32)[keep]
    if state.counts:
        ids, keep = _inside(list(state.counts), first_id, len(values))
        counts = np.array(list(state.counts.values()), dtype=np.float32)[keep]
        out[ids] -= counts * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
    if not restricted or not out.max() < np.inf:  # NaN or infinity has to be noticed wherever it is
        return out
    keep = np.ones(len(out), dtype=np.bool_) if mask is None else mask
    if params.allowed_token_ids:
        named = np.zeros(len(out), dtype=np.bool_)
        named[_inside(params.allowed_token_ids, first_id, len(out))[0]] = True
        keep = keep & named
    if forbidden:
        keep = keep.copy()
        keep[_inside(forbidden, first_id, len(out))[0]] = False
    return np.where(keep, out, out.dtype.type(-np.inf))


def _inside(ids: Sequence[int], first_id: int, count: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Return the ids in [first_id, first_id + count), relative to first_id, and the mask that selects them."""
    places = np.array(ids, dtype=np.int64) - first_id
    keep = (places >= 0) & (places < count)
    return places[keep], keep


_NUCLEUS = 128


def _list_candidates(values: Floats, params: SamplingParams) -> tuple[Ids, float | None]:
    """List the eligible tokens of a full vocabulary, sorted by descending logit where needed, and the sum of all weights if some are
    dropped.

    Never sorts the whole vocabulary: that would take longer than a small model's step.
    """
    if not params.do_sample or params.top_k:
        return _best(values, params.top_k if params.do_sample else 1), None
    if params.top_p == 1:
        return np.arange(len(values)), None
    weights = _weigh(values, params.temperature)
    weights[weights < params.min_p] = 0
    total, count = float(weights.sum()), _NUCLEUS
    while True:
        ids = _best(values, count)
        if count >= len(values) or weights[ids].sum() > params.top_p * total:
            return ids, total
        count *= 8


def _weigh(logits: Floats, temperature: float) -> npt.NDArray[np.float64]:
    """float64 exp(logits / temperature), scaled so that the largest is 1."""
    scaled = logits.astype(np.float64) / temperature
    weights: npt.NDArray[np.float64] = np.exp(scaled - scaled.max())
    return weights


def _best(values: Floats, count: int) -> Ids:
    """Ids of the `count` largest values in descending order, ties by ascending id. If the largest is not finite, only its id.

    NaN counts as the largest value, so argmax detects it without another pass over the row.
    """
    top = values.argmax()
    if count == 1 or not math.isfinite(values[top]):
        return np.array([top])
    if count < len(values):
        threshold = np.partition(values, -count)[-count]
        # With fewer eligible tokens than asked for, the forbidden ones need no order.
        ids = np.flatnonzero(values >= threshold if threshold > -np.inf else values > threshold)
    else:
        ids = np.arange(len(values))
    best: Ids = ids[np.lexsort((ids, -values[ids]))]
    return best[:count]


def _draw(ids: Ids, logits: Floats, total: float | None, state: SamplingState) -> int:
    """Draw one id. With top-p the candidates are in descending order; `total`: sum of all weights, including dropped ones."""
    params = state.params
    weights = _weigh(logits, params.temperature)
    if params.min_p:
        ids, weights = ids[weights >= params.min_p], weights[weights >= params.min_p]
    if params.top_p < 1:
        probabilities = weights / (weights.sum() if total is None else total)
        reached = np.cumsum(probabilities) - probabilities  # exclusive prefix sums
        ids, weights = ids[reached < params.top_p], weights[reached < params.top_p]
    # numpy's `choice` over the whole vocabulary scans ids in ascending order; candidates of probability 0 do not change the result.
    order = np.argsort(ids)
    cumulative = np.cumsum(weights[order] / weights.sum())
    place = np.searchsorted(cumulative / cumulative[-1], state.numbers.draw(), side="right")
    return int(ids[order][place])


def _log_probability(values: Floats) -> Floats:
    """float32 log-softmax over the whole vocabulary, accumulated in float64."""
    wide = values.astype(np.float64)
    top = wide.max()
    result: Floats = (wide - (top + np.log(np.exp(wide - top).sum()))).astype(np.float32)
    return result
