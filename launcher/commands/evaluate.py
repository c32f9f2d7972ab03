"""`tandem eval`: accuracy on BoolQ, or perplexity on a text.

Depends on files, options and output formatting; scoring is in the model package.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from launcher.commands.job_plan import build_job
from launcher.commands.opened_run import Run, open_run
from launcher.commands.run_ranks import run_to_result
from launcher.job.tasks import EVALUATIONS, Evaluate
from launcher.settings.measure_options import EvaluateOptions
from model.evaluation.data import encode_prompts, find_choice_ids, read_boolq, read_windows
from model.evaluation.scoring import check_rows
from parallel.errors import ConfigError


def evaluate(options: EvaluateOptions) -> None:
    """Score a checkpoint and print the result. Raises InputError before anything starts, RanksFailedError if ranks fail."""
    assert options.task in EVALUATIONS and options.data is not None
    run = open_run(options)
    task = _plan_windows(options, options.data, run) if options.task == "perplexity" else _plan_questions(options, options.data, run)
    job = build_job(run, task)
    what = f"{options.task}, {'windows' if options.task == 'perplexity' else 'questions'}"
    found = run_to_result(run, job, what, "the evaluation starts over")
    if found is None:
        return
    result = {"task": options.task, "checkpoint": str(run.opened.source.path), "data": str(options.data), **found}
    print(write_json(result) if options.as_json else "\n".join(describe_result(result)))


def write_json(result: dict[str, Any]) -> str:
    """Format a result as JSON. JSON has no infinity, so a perplexity beyond float64 is null; `nll_mean` stays finite."""
    ends = result["interval"]
    interval = None if ends is None or not all(map(math.isfinite, ends)) else ends
    finite = {"perplexity": value if math.isfinite(value) else None} if (value := result.get("perplexity")) is not None else {}
    return json.dumps({**result, **finite, "interval": interval}, allow_nan=False)


def describe_result(result: dict[str, Any]) -> list[str]:
    """Format a result for the terminal."""
    interval = result["interval"]
    if result["task"] == "perplexity":
        spread = "" if interval is None else f", 95 % between {interval[0]:.4f} and {interval[1]:.4f} (by {result['interval_unit']})"
        score = f"perplexity {result['perplexity']:.4f}{spread}"
        size = f"{result['num_tokens']} tokens in {result['num_windows']} windows, mean loss {result['nll_mean']:.5f}"
    else:
        spread = f"95 % between {interval[0]:.4f} and {interval[1]:.4f}"
        score = f"accuracy {result['accuracy']:.4f} ({result['num_correct']} of {result['num_questions']}), {spread}"
        size = f"answered yes to {result['yes_share']:.0%}"
    run = f"{result['quantization']}, {result['dtype']}, {result['world_size']} rank(s), {result['tokens_per_second']:.0f} tokens/s"
    return [score, size, run]


def _plan_windows(options: EvaluateOptions, data: Path, run: Run) -> Evaluate:
    if not 2 <= options.window_tokens <= run.context_tokens:
        raise ConfigError(f"--window is {options.window_tokens} tokens, but has to be from 2 to {run.context_tokens}, the model's context")
    rows = read_windows(data, run.read_tokenizer(), options.window_tokens, options.limit)
    check_rows(rows, run.context_tokens, run.opened.config.vocab_size, min_tokens=2)
    return Evaluate(name="perplexity", rows=tuple(rows))


def _plan_questions(options: EvaluateOptions, data: Path, run: Run) -> Evaluate:
    questions, tokenizer = read_boolq(data, options.limit), run.read_tokenizer()
    rows, num_cut = encode_prompts([question.prompt for question in questions], tokenizer, run.context_tokens)
    if num_cut:
        print(f"warning: {num_cut} prompts exceed the context of {run.context_tokens} and are truncated", file=sys.stderr)
    check_rows(rows, run.context_tokens, run.opened.config.vocab_size)
    answers = tuple(question.answer for question in questions)
    return Evaluate(name="boolq", rows=tuple(rows), answers=answers, choices=find_choice_ids(tokenizer))
