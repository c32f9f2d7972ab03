"""Scores against direct computation with transformers, the same bits for every number of ranks, and the statistics' known values."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from model.decoder.llama import LlamaForCausalLM
from model.evaluation.scoring import MIN_WINDOWS, boolq, check_rows, perplexity, summarize_losses, wilson_interval
from model.spec.config import PREFILL_TOKENS
from parallel.errors import RequestError, RunError

VOCAB = 97
CHOICES = (11, 29)


def random_rows(*lengths: int) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(5)
    return [tuple(int(i) for i in generator.integers(0, VOCAB, length)) for length in lengths]


WINDOWS = random_rows(40, 40, 150, 2, 40, 3, 70, 40, 40, 17)
PROMPTS = random_rows(5, 90, 1, 33, 12, 200, 200, 200, 7, 8)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return build_model(tiny_llama("nine_heads"))


@pytest.fixture(scope="module")
def reference(tiny_llama: Callable[[str], Path]) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(tiny_llama("nine_heads"), dtype=torch.float32, attn_implementation="eager")


def reference_losses(reference: transformers.LlamaForCausalLM, windows: list[tuple[int, ...]]) -> list[float]:
    """Mean loss of each window."""
    with torch.inference_mode():
        return [reference(torch.tensor([window]), labels=torch.tensor([window])).loss.item() for window in windows]


def reference_says_yes(reference: transformers.LlamaForCausalLM, prompts: list[tuple[int, ...]]) -> list[bool]:
    with torch.inference_mode():
        rows = [reference(torch.tensor([prompt])).logits[0, -1].softmax(0) for prompt in prompts]
    return [bool(row[CHOICES[0]] > row[CHOICES[1]]) for row in rows]


def test_perplexity_is_transformers_loss(model: LlamaForCausalLM, reference: transformers.LlamaForCausalLM) -> None:
    # One window longer than a pass, one exactly as long.
    windows = [*WINDOWS, *random_rows(PREFILL_TOKENS * 2 + 30, PREFILL_TOKENS + 1)]
    means, counts = np.array(reference_losses(reference, windows)), np.array([len(window) - 1 for window in windows])
    expected = (means * counts).sum() / counts.sum()
    result = perplexity(model, windows)
    assert result.nll_mean == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (result.num_tokens, result.num_windows, result.interval_unit) == (counts.sum(), len(windows), "window")
    assert result.interval is not None and result.interval[0] < result.perplexity < result.interval[1]


@pytest.mark.usefixtures("keep_torch_threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_have_the_same_bits_for_every_number_of_ranks(
    tiny_llama: Callable[[str], Path], run_ranks: Callable[..., list[Any]], dtype: str
) -> None:
    answers = [index % 3 == 0 for index in range(len(PROMPTS))]

    def score(model: LlamaForCausalLM) -> Any:
        return perplexity(model, WINDOWS), boolq(model, PROMPTS, answers, choices=CHOICES)

    found = [run_ranks(tiny_llama("nine_heads"), world_size, score, dtype=dtype) for world_size in (1, 2, 3)]
    assert all(result == found[0][0] for results in found for result in results)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_no_score(model: LlamaForCausalLM, batch_size: int) -> None:
    whole, parts = perplexity(model, WINDOWS, batch_size=100), perplexity(model, WINDOWS, batch_size=batch_size)
    assert parts.nll_mean == pytest.approx(whole.nll_mean, rel=1e-6)
    assert parts.interval == pytest.approx(whole.interval, rel=1e-6)
    assert (parts.num_tokens, parts.num_windows) == (whole.num_tokens, whole.num_windows)
    answers = [True] * len(PROMPTS)
    assert boolq(model, PROMPTS, answers, choices=CHOICES, batch_size=batch_size) == boolq(model, PROMPTS, answers, choices=CHOICES)


def test_boolq_is_the_likelier_word(model: LlamaForCausalLM, reference: transformers.LlamaForCausalLM) -> None:
    prompts = [*PROMPTS, *random_rows(PREFILL_TOKENS + 40)]
    said = reference_says_yes(reference, prompts)
    assert len(set(said)) == 2
    answers = [index % 2 == 0 for index in range(len(prompts))]
    right = sum(a == b for a, b in zip(said, answers, strict=True))
    result = boolq(model, prompts, answers, choices=CHOICES)
    assert (result.num_correct, result.num_questions) == (right, len(prompts))
    assert result.accuracy == right / len(prompts)
    assert result.yes_share == sum(said) / len(prompts)
    assert result.interval == wilson_interval(right, len(prompts))
    assert boolq(model, prompts, said, choices=CHOICES).accuracy == 1.0
    for prompt, answer in zip(prompts, said, strict=True):
        assert boolq(model, [prompt], [answer], choices=CHOICES).num_correct == 1


def test_equal_choices_are_a_no(model: LlamaForCausalLM) -> None:
    result = boolq(model, PROMPTS, [True] * len(PROMPTS), choices=(4, 4))
    assert (result.num_correct, result.yes_share) == (0, 0.0)


def test_progress_reaches_the_end_in_passes(model: LlamaForCausalLM) -> None:
    told: list[tuple[int, int]] = []
    windows = random_rows(PREFILL_TOKENS // 2, PREFILL_TOKENS // 2 + 2, 9, 9, PREFILL_TOKENS + 9)
    perplexity(model, windows, batch_size=2, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]
    told.clear()
    boolq(model, PROMPTS[:3], [True] * 3, choices=CHOICES, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(3, 3)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to evaluate"),
        ([(1, 2), (3,)], "row 1 has 1 tokens, but at least 2"),
        ([(1, 2, 3, 4, 5)], "row 0 has 5 tokens, but the model's context is 4"),
        ([(1, 2), (3, 10)], "row 1 has id 10, but the vocabulary has 10"),
        ([(1, -1)], "row 0 has id -1"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_rows(rows, 4, 10, min_tokens=2)


def test_options_are_checked(model: LlamaForCausalLM) -> None:
    with pytest.raises(RequestError, match="batch_size is 0"):
        perplexity(model, WINDOWS, batch_size=0)
    with pytest.raises(RequestError, match="10 questions, but 1 answers"):
        boolq(model, PROMPTS, [True], choices=CHOICES)
    with pytest.raises(RequestError, match=r"ids \(4, 97\), but the vocabulary has 97"):
        boolq(model, PROMPTS, [True] * 10, choices=(4, 97))
    with pytest.raises(RequestError, match="at least 2"):
        perplexity(model, [(1,)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_an_error(
    tiny_llama: Callable[[str], Path], build_model: Callable[..., LlamaForCausalLM], value: float
) -> None:
    model = build_model(tiny_llama("nine_heads"))
    with torch.no_grad():
        model.norm.weight[3] = value
    for score in (lambda: perplexity(model, WINDOWS), lambda: boolq(model, PROMPTS, [True] * 10, choices=CHOICES)):
        with pytest.raises(RunError, match=r"not finite in torch\.float32"):
            score()


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), the score method without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1.0)],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert 0 <= wilson_interval(correct, total)[0] and wilson_interval(correct, total)[1] <= 1


def test_the_interval_comes_from_windows_or_from_tokens() -> None:
    values = np.random.default_rng(0).normal(3, 1, (MIN_WINDOWS, 50))
    result = summarize_losses(list(values))
    half = 1.959964 * values.mean(1).std(ddof=1) / math.sqrt(MIN_WINDOWS)
    assert result.interval_unit == "window"
    assert result.interval == pytest.approx((math.exp(values.mean() - half), math.exp(values.mean() + half)), rel=1e-6)

    few = values[:-1]
    result = summarize_losses(list(few))
    half = 1.959964 * few.std(ddof=1) / math.sqrt(few.size)
    assert result.interval_unit == "token"
    assert result.interval == pytest.approx((math.exp(few.mean() - half), math.exp(few.mean() + half)), rel=1e-6)

    single = summarize_losses([np.array([2.0])])
    assert (single.perplexity, single.interval) == (math.exp(2.0), None)
