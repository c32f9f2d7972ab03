"""Evaluation inputs: BoolQ questions, and windows of a text, as token ids."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from model.quantization.datasets import boolq_prompt, read_boolq_records, read_text
from model.text.tokenizer import Tokenizer
from parallel.errors import CheckpointError, RequestError


@dataclass(frozen=True, slots=True)
class BoolqQuestion:
    """One question about a passage."""

    prompt: str
    """Passage and question, ending where the answer follows."""
    answer: bool
    """The correct answer: yes or no."""


def read_boolq(path: Path, limit: int | None = None) -> list[BoolqQuestion]:
    """Return the first `limit` questions of a BoolQ file (JSON lines); None for all.

    Raises RequestError when the file is missing, empty or malformed.
    """
    _check_limit(limit)
    questions = [BoolqQuestion(boolq_prompt(record), record["answer"]) for _, record in islice(read_boolq_records(path), limit)]
    if not questions:
        raise RequestError(f"{path} holds no question, but at least one is needed: is it really a BoolQ file (JSON lines)?")
    return questions


def encode_prompts(prompts: Iterable[str], tokenizer: Tokenizer, max_tokens: int) -> tuple[list[tuple[int, ...]], int]:
    """Return the ids of prompts without an end token, each truncated on the right at `max_tokens`, and the number truncated.

    A truncated prompt loses its question, as in Golden Stick's evaluation, so its answer is of little value.
    """
    if max_tokens < 1:
        raise RequestError(f"max_tokens is {max_tokens}, but has to be at least 1")
    rows, num_cut = [], 0
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        num_cut += len(ids) > max_tokens
        rows.append(tuple(ids[:max_tokens]))
    return rows, num_cut


def find_choice_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the first ids of "yes" and "no". Raises CheckpointError when the tokenizer does not distinguish them."""
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[:1] for word in ("yes", "no"))
    if not yes or not no or yes == no:
        raise CheckpointError(f'the tokenizer begins "yes" with {yes} and "no" with {no}, but two different ids are needed for BoolQ')
    return yes[0], no[0]


def read_windows(path: Path, tokenizer: Tokenizer, window_tokens: int = 512, limit: int | None = None) -> list[tuple[int, ...]]:
    """Return non-overlapping windows of `window_tokens` ids of a text file, at most `limit`; None for all.

    The text is encoded as a whole, since splitting it may change ids at the split (1.3 MB take about a second). A shorter last window
    counts if it has at least two tokens, so that one can be predicted. Raises RequestError when the file cannot be read or is too short,
    or an option is out of range.
    """
    if window_tokens < 2:
        raise RequestError(f"window_tokens is {window_tokens}, but has to be at least 2: the first token only starts a window")
    _check_limit(limit)
    ids = tokenizer.encode(read_text(path))
    rows = (tuple(ids[first : first + window_tokens]) for first in range(0, len(ids) - 1, window_tokens))
    windows = list(islice(rows, limit))
    if not windows:
        raise RequestError(f"{path} has {len(ids)} tokens, but at least 2 are needed to predict one from another: give a longer text")
    return windows


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise RequestError(f"limit is {limit}, but has to be at least 1; leave it out for everything")
