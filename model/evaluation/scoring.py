"""Scores a model on one rank: perplexity of windows of ids, and yes-or-no questions.

Every rank makes the same calls and comes to the same numbers, bit for bit, however many ranks there are: whole logits are
gathered, a few rows at a time, and what follows runs in numpy, row by row. Knows ids and logits; no text, no files.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.decoder.llama import LlamaForCausalLM
from model.layers.batch import Span
from model.spec.config import PREFILL_TOKENS
from parallel.errors import RequestError, RunError

LOGIT_ROWS = 64
"""Rows of whole logits at a time: bounds memory, 64 x 128256 float32 are 33 MB."""
MIN_WINDOWS = 8
"""With fewer windows their spread says little, and the spread of tokens is taken."""
_Z = 1.959963984540054
"""95 % of a normal distribution lie within so many standard deviations."""

Progress = Callable[[int, int], None]
"""Told (done, total) after every pass."""


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
    """95 % confidence interval of the perplexity; None where there is one token only."""
    interval_unit: str
    """What was taken as independent: "window", or "token" with fewer than MIN_WINDOWS windows. Neighbouring tokens are not quite
    independent, so that an interval from tokens is rather too narrow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoolqResult:
    """How often a model answers right."""

    accuracy: float
    """num_correct / num_questions."""
    num_correct: int
    """Right answers."""
    num_questions: int
    """Questions."""
    interval: tuple[float, float]
    """95 % confidence interval of the accuracy (Wilson)."""
    yes_share: float
    """Share of "yes" among the model's answers."""


def perplexity(
    model: LlamaForCausalLM, windows: Sequence[Sequence[int]], *, batch_size: int = 16, on_progress: Progress | None = None
) -> PerplexityResult:
    """Perplexity over windows of at least two ids; each token is predicted from those before it in its window.

    A pass takes up to `batch_size` windows and about PREFILL_TOKENS tokens. Every rank has to call this with the same windows.
    Raises RequestError for windows that `check_rows` refuses, RunError where logits are not finite.
    """
    _check_batch_size(batch_size)
    check_rows(windows, model.config.max_position_embeddings, model.config.vocab_size, min_tokens=2)
    losses: list[npt.NDArray[np.float64]] = []
    # The last id of a window is only predicted: its own logits would belong to a token outside.
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
    """Accuracy over questions: the answer is yes where yes is likelier than no as the token after the prompt; equal is no.

    prompts: ids, at least one each; answers: the right ones; choices: ids of "yes" and "no".
    A pass takes up to `batch_size` prompts and about PREFILL_TOKENS tokens. Every rank has to call this with the same questions.
    Raises RequestError for ids that `check_rows` refuses, RunError where logits are not finite.
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
        *_, last = _forward(model, group)  # of a long prompt the last part counts
        rows = np.cumsum([len(row) for row in group]) - 1 if len(group) > 1 else [-1]
        for logits in _whole_logits(model, last[rows]):
            # The softmax of both has one denominator.
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
    """Raise RequestError unless there are rows, each of known ids, not too short, and within the context."""
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
    """The result from the negative log-likelihoods of the tokens of each window, at least one each."""
    sums, counts = np.array([math.fsum(loss) for loss in losses]), np.array([len(loss) for loss in losses])
    total = int(counts.sum())
    mean = math.fsum(sums) / total
    by_window = len(losses) >= MIN_WINDOWS
    # A mean of tokens in clusters of unequal sizes: the deviation of a window counts by its length.
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
    """95 % confidence interval of a share; within 0 and 1, and honest at the edges, unlike the normal one."""
    share, square = num_correct / num_questions, _Z**2 / num_questions
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / num_questions + square / (4 * num_questions)) / (1 + square)
    # At 0 and at all the sums meet 0 and 1 but for their last bits.
    return 0.0 if num_correct == 0 else middle - half, 1.0 if num_correct == num_questions else middle + half


def _group(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[Sequence[int]]]:
    """Rows that fit one pass together, in order; a longer one alone."""
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
    """Hidden states [tokens, H] of the rows of a group, one after another; of one long row in several parts."""
    caches = [model.build_cache(len(row)) for row in group]
    for first in range(0, max(map(len, group)), PREFILL_TOKENS):
        part = slice(first, first + PREFILL_TOKENS)
        yield model([Span(cache, row[part]) for cache, row in zip(caches, group, strict=True)])


def _whole_logits(model: LlamaForCausalLM, hidden: torch.Tensor) -> Iterator[npt.NDArray[np.float32]]:
    """float32 logits [up to LOGIT_ROWS, vocabulary] of hidden states [rows, H]. Raises RunError where they are not finite."""
    for rows in torch.split(hidden, LOGIT_ROWS):
        logits: npt.NDArray[np.float32] = model.collectives.gather_columns(model.logits_local(rows), model.shares.vocab).numpy(force=True)
        # A NaN or an infinity stays one in the largest or the smallest.
        if not (np.isfinite(logits.max()) and np.isfinite(logits.min())):
            raise RunError(f"logits are not finite in {model.dtype}: run in float32, or check the weights with tandem verify")
        yield logits


def _negative_log_likelihood(logits: npt.NDArray[np.float32], target: int) -> float:
    """-log softmax of one row at `target`, summed in float64. Row by row: one row stays in the processor's cache."""
    wide = logits.astype(np.float64)
    top = wide.max()
    return float(top + np.log(np.exp(wide - top).sum()) - wide[target])


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}, but has to be at least 1")
