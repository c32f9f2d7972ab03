"""Evaluate a model on one rank: perplexity over windows of ids, and yes-or-no questions.

Every rank makes the same calls and gets bitwise identical numbers, for any number of ranks: full logits are gathered, a few rows at a
time, and processed in numpy row by row.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.decoder.llama import LlamaForCausalLM
from model.decoder.non_finite import explain
from model.layers.batch import Span
from model.spec.config import PREFILL_TOKENS
from parallel.errors import NonFiniteError, RequestError

LOGIT_ROWS = 64
"""Rows of full logits at a time; bounds the memory: 64 x 128256 float32 are 33 MB."""
MIN_WINDOWS = 8
"""With fewer windows their variance is unreliable, and that of tokens is used."""
_Z = 1.959963984540054
"""95 % of a normal distribution are within this many standard deviations."""

Progress = Callable[[int, int], None]
"""Called with (done, total) after every pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityResult:
    """How well a model predicts a text."""

    perplexity: float
    """exp(nll_mean)."""
    nll_mean: float
    """Mean negative log-likelihood of a predicted token, nats."""
    num_tokens: int
    """Predicted tokens: all but the first of each window."""
    num_windows: int
    """Windows."""
    interval: tuple[float, float] | None
    """95 % confidence interval of the perplexity; None if there is only one token."""
    interval_unit: str
    """The unit assumed to be independent: "window", or "token" with fewer than MIN_WINDOWS windows. Neighboring tokens are not fully
    independent, so an interval from tokens is too narrow.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class BoolqResult:
    """Accuracy of a model's answers."""

    accuracy: float
    """num_correct / num_questions."""
    num_correct: int
    """Correct answers."""
    num_questions: int
    """Questions."""
    interval: tuple[float, float]
    """95 % confidence interval of the accuracy (Wilson)."""
    yes_share: float
    """Fraction of "yes" among the model's answers."""


def perplexity(
    model: LlamaForCausalLM, windows: Sequence[Sequence[int]], *, batch_size: int = 16, on_progress: Progress | None = None
) -> PerplexityResult:
    """Compute the perplexity over windows of at least two ids; each token is predicted from those before it in its window.

    A pass takes up to `batch_size` windows and about PREFILL_TOKENS tokens. Every rank has to call this with the same windows. Raises
    RequestError for windows that `check_rows` refuses, NonFiniteError when logits are not finite.
    """
    _check_batch_size(batch_size)
    check_rows(windows, model.config.max_position_embeddings, model.config.vocab_size, min_tokens=2)
    losses: list[npt.NDArray[np.float64]] = []
    # The last id of a window is only a target: its own logits would predict a token outside the window.
    for group in _group([window[:-1] for window in windows], batch_size):
        members = windows[len(losses) : len(losses) + len(group)]
        targets = [target for window in members for target in window[1:]]
        found: list[float] = []
        for hidden in _forward(model, group):
            for logits in _whole_logits(model, hidden):
                found += map(_negative_log_likelihood, logits, targets[len(found) : len(found) + len(logits)])
        ends = np.cumsum([len(row) for row in group])
        losses += np.split(np.array(found), ends[:-1])
        if on_progress is not None:
            on_progress(len(losses), len(windows))
    return summarize_losses(losses)


def boolq(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[bool],
    *,
    choices: tuple[int, int],
    batch_size: int = 16,
    on_progress: Progress | None = None,
) -> BoolqResult:
    """Compute the accuracy over questions: the answer is yes if yes is more likely than no as the next token; a tie means no.

    prompts: ids, at least one each; answers: the correct ones; choices: ids of "yes" and "no". A pass takes up to `batch_size` prompts
    and about PREFILL_TOKENS tokens. Every rank has to call this with the same questions. Raises RequestError for ids that `check_rows`
    refuses, NonFiniteError when logits are not finite.
    """
    _check_batch_size(batch_size)
    vocab_size = model.config.vocab_size
    check_rows(prompts, model.config.max_position_embeddings, vocab_size)
    if not 0 <= min(choices) <= max(choices) < vocab_size:
        raise RequestError(f"yes and no have ids {choices}, but the vocabulary has {vocab_size}: is it another model's tokenizer?")
    if len(prompts) != len(answers):
        raise RequestError(f"there are {len(prompts)} questions, but {len(answers)} answers: give one for each")
    said_yes: list[bool] = []
    for group in _group(prompts, batch_size):
        *_, last = _forward(model, group)  # for a long prompt, its last part
        rows = np.cumsum([len(row) for row in group]) - 1 if len(group) > 1 else [-1]
        for logits in _whole_logits(model, last[rows]):
            # The softmax of both has the same denominator, so logits suffice.
            said_yes += [bool(row[choices[0]] > row[choices[1]]) for row in logits]
        if on_progress is not None:
            on_progress(len(said_yes), len(prompts))
    correct, total = sum(map(bool.__eq__, said_yes, map(bool, answers))), len(prompts)
    return BoolqResult(
        accuracy=correct / total,
        num_correct=correct,
        num_questions=total,
        interval=wilson_interval(correct, total),
        yes_share=sum(said_yes) / total,
    )


def check_rows(rows: Sequence[Sequence[int]], context_tokens: int, vocab_size: int, *, min_tokens: int = 1) -> None:
    """Raise RequestError unless there are rows, each with valid ids, not too short, and within the context."""
    if not rows:
        raise RequestError("there is nothing to evaluate: give data with at least one row")
    for index, row in enumerate(rows):
        if len(row) < min_tokens:
            raise RequestError(f"row {index} has {len(row)} tokens, but at least {min_tokens} are needed; leave it out")
        if len(row) > context_tokens:
            raise RequestError(f"row {index} has {len(row)} tokens, but the model's context is {context_tokens}: cut it shorter")
        unknown = next((i for i in row if not 0 <= i < vocab_size), None)
        if unknown is not None:
            raise RequestError(f"row {index} has id {unknown}, but the vocabulary has {vocab_size}: is it another model's tokenizer?")


def summarize_losses(losses: Sequence[npt.NDArray[np.float64]]) -> PerplexityResult:
    """Aggregate the negative log-likelihoods of the tokens of each window, at least one each."""
    sums, counts = np.array([math.fsum(loss) for loss in losses]), np.array([len(loss) for loss in losses])
    total = int(counts.sum())
    mean = math.fsum(sums) / total
    by_window = len(losses) >= MIN_WINDOWS
    # A mean over tokens in clusters of unequal sizes: a window's deviation is weighted by its length.
    deviations = sums - mean * counts if by_window else np.concatenate(losses) - mean
    num = len(deviations)
    interval = None
    if num > 1:
        error = math.sqrt(num / (num - 1) * math.fsum(deviations**2)) / total
        interval = _exp(mean - _Z * error), _exp(mean + _Z * error)
    return PerplexityResult(
        perplexity=_exp(mean),
        nll_mean=mean,
        num_tokens=total,
        num_windows=len(losses),
        interval=interval,
        interval_unit="window" if by_window else "token",
    )


def wilson_interval(num_correct: int, num_questions: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion; within 0 and 1, and accurate near them, unlike the normal interval."""
    share, square = num_correct / num_questions, _Z**2 / num_questions
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / num_questions + square / (4 * num_questions)) / (1 + square)
    # With none or all correct, the bounds equal 0 and 1 up to rounding.
    return 0.0 if num_correct == 0 else middle - half, 1.0 if num_correct == num_questions else middle + half


def _group(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[Sequence[int]]]:
    """Group consecutive rows that fit a pass together; a longer row is a group of its own."""
    group: list[Sequence[int]] = []
    tokens = 0
    for row in rows:
        if group and (tokens + len(row) > PREFILL_TOKENS or len(group) == batch_size):
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += len(row)
    if group:
        yield group


def _forward(model: LlamaForCausalLM, group: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Return hidden states [tokens, H] of the rows of a group, concatenated; a single long row takes several passes."""
    caches = [model.build_cache(len(row)) for row in group]
    for first in range(0, max(map(len, group)), PREFILL_TOKENS):
        part = slice(first, first + PREFILL_TOKENS)
        yield model([Span(cache, row[part]) for cache, row in zip(caches, group, strict=True)])


def _whole_logits(model: LlamaForCausalLM, hidden: torch.Tensor) -> Iterator[npt.NDArray[np.float32]]:
    """Return float32 logits [up to LOGIT_ROWS, vocabulary] of hidden states [rows, H]. Raises NonFiniteError when they are not finite."""
    for rows in torch.split(hidden, LOGIT_ROWS):
        logits: npt.NDArray[np.float32] = model.collectives.gather_columns(model.logits_local(rows), model.shares.vocab).numpy(force=True)
        # NaN and infinities propagate to the maximum or the minimum.
        if not (np.isfinite(logits.max()) and np.isfinite(logits.min())):
            raise NonFiniteError(explain(model.dtype, "in the evaluation"))
        yield logits


def _negative_log_likelihood(logits: npt.NDArray[np.float32], target: int) -> float:
    """Return -log softmax of one row at `target`, accumulated in float64. One row at a time stays in the CPU cache."""
    wide = logits.astype(np.float64)
    top = wide.max()
    return float(top + np.log(np.exp(wide - top).sum()) - wide[target])


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}, but has to be at least 1")
