"""Calibration samples: the token ids on which activations are observed.

The dataset kinds, prompts and cleaning follow Golden Stick (mindspore-ai/golden-stick, `mindspore_gs/datasets`) in its "train" mode: a
text starts and ends with the model's special tokens.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from model.text.tokenizer import Tokenizer
from parallel import regular_file
from parallel.errors import CheckpointError, ConfigError, RequestError

BOOLQ_PROMPT = (
    "Read the passage below and answer the question with yes or no.\n"
    "### Passage:\n{title} -- {passage}\n### Question:\n{question}\n### Answer:"
)
SQUAD_PROMPT = "Read the passage and answer the question below.\n\n### Instruction:\n{passage}\n\n### Input:\n{question}\n\n### Response:"

Encode = Callable[[str], list[int]]
"""Returns the ids of a text, with begin and end tokens."""
T = TypeVar("T")


def read_samples(
    kind: str, path: Path, tokenizer: Tokenizer | None, *, num_samples: int = 200, max_tokens: int, vocab_size: int
) -> list[tuple[int, ...]]:
    """Return the token ids of up to `num_samples` samples of a file, each truncated at `max_tokens`.

    kind: a key of DATASETS, case-insensitive. tokenizer: not needed for "ids". Raises ConfigError for an unknown kind, CheckpointError
    when a tokenizer is needed but missing, RequestError when the file is missing, empty or malformed, or has ids outside the vocabulary.
    """
    read = DATASETS.get(kind.lower())
    if read is None:
        raise ConfigError(f"dataset type {kind!r} is unknown: give one of {', '.join(DATASETS)}")
    for name, value in (("num_samples", num_samples), ("max_tokens", max_tokens)):
        if value < 1:
            raise RequestError(f"{name} is {value}, but has to be at least 1")

    def encode(text: str) -> list[int]:
        if tokenizer is None:
            raise CheckpointError(f"a {kind} dataset is text, but there is no tokenizer: put one beside the weights, or give ids as .npy")
        ids, end = tokenizer.encode(text), tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    samples = []
    for place, ids in islice(read(path, encode, max_tokens), num_samples):
        sample = tuple(int(i) for i in ids[:max_tokens])
        unknown = next((i for i in sample if not 0 <= i < vocab_size), None)
        if unknown is not None:
            raise RequestError(f"{place} has id {unknown}, but the vocabulary has {vocab_size}: is it made with another model's tokenizer?")
        samples.append(sample)
    if not samples:
        raise RequestError(f"{path} holds no sample, but calibration needs at least one: is it really a {kind.lower()} file?")
    return samples


def boolq_prompt(record: Mapping[str, Any]) -> str:
    """Return the prompt for a BoolQ record; the answer follows it."""
    return BOOLQ_PROMPT.format(title=record["title"], passage=record["passage"], question=record["question"])


def read_boolq_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (location for messages, record) for each line of a BoolQ file: question, title, passage (str) and answer (bool).

    Raises RequestError at a malformed line, or when the file cannot be read.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        record = _parse_json(line, place)
        for name, needed in (("question", str), ("title", str), ("passage", str), ("answer", bool)):
            _look_up(record, place, needed, name)
        yield place, record


def read_text(path: Path) -> str:
    """Read a UTF-8 file with newlines as \n. Raises RequestError when it cannot be read."""
    try:
        return regular_file.read_text(path, regular_file.MAX_DATA_BYTES)
    except FileNotFoundError:
        raise RequestError(f"the dataset {path} does not exist: give an existing file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the dataset {path} cannot be read as UTF-8 text: {getattr(error, 'strerror', error)}") from None


def _read_boolq(path: Path, encode: Encode, max_tokens: int) -> Iterator[tuple[str, Sequence[int]]]:
    for place, record in read_boolq_records(path):
        yield place, encode(boolq_prompt(record) + ("yes" if record["answer"] else "no"))


def _read_squad(path: Path, encode: Encode, max_tokens: int) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield one sample per paragraph: its first question with that question's first answer."""
    root = _parse_json(read_text(path), str(path))
    for i, article in enumerate(_look_up(root, str(path), list, "data")):
        article_place = f"{path}, data[{i}]"
        for j, paragraph in enumerate(_look_up(article, article_place, list, "paragraphs")):
            place = f"{article_place}.paragraphs[{j}]"
            passage = _look_up(paragraph, place, str, "context")
            question = _look_up(paragraph, place, str, "qas", 0, "question")
            answer = _look_up(paragraph, place, str, "qas", 0, "answers", 0, "text")
            yield place, encode(SQUAD_PROMPT.format(passage=passage, question=question) + answer)


def _read_wikitext(path: Path, encode: Encode, max_tokens: int) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield whole chunks of `max_tokens` ids of all paragraphs, concatenated. The remainder is used only if there is no whole chunk."""
    ids: list[int] = []
    number = 0
    for paragraph in clean_wikitext(read_text(path)).split("\n\n"):
        if not paragraph.strip() or paragraph.strip().startswith("="):
            continue
        ids += encode(paragraph)
        while len(ids) >= max_tokens:
            number += 1
            yield f"{path}, chunk {number}", ids[:max_tokens]
            ids = ids[max_tokens:]
    if number == 0 and ids:
        yield f"{path}, chunk 1", ids


def _read_ids(path: Path, encode: Encode, max_tokens: int) -> Iterator[tuple[str, Sequence[int]]]:
    try:
        regular_file.open_regular(path).close()
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise RequestError(f"the dataset {path} does not exist: give an existing file") from None
    except (OSError, ValueError, EOFError) as error:
        raise RequestError(f"{path} cannot be read as a .npy file of integers: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(rows, np.ndarray):
        raise RequestError(f"{path} is an archive of arrays (.npz), but one array is needed: write it with numpy.save")
    if rows.dtype.kind not in "iu":
        raise RequestError(f"{path} has numbers of type {rows.dtype}, but token ids are integers: write it as int32 or int64")
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise RequestError(f"{path} has shape {list(rows.shape)}, but [samples, length] with a length of at least 1 is needed")
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


DATASETS: dict[str, Callable[[Path, Encode, int], Iterator[tuple[str, Sequence[int]]]]] = {
    "boolq": _read_boolq,
    "squad1.1": _read_squad,
    "wikitext2": _read_wikitext,
    "ids": _read_ids,
}
"""Readers by kind: (path, encode, max_tokens) to (location for messages, ids) of each sample, generated lazily."""

_WIKITEXT_SEPARATORS = (("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"))
_WIKITEXT_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_WIKITEXT_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def clean_wikitext(text: str) -> str:
    """Undo WikiText's tokenization with the rules shared by Megatron, MindFormers and Golden Stick, in their order.

    Their rule for `/' 5/` is omitted: WikiText never contains that.
    """
    for old, new in _WIKITEXT_SEPARATORS:
        text = text.replace(old, new)
    for opening, closing in _WIKITEXT_PAIRS:
        inside = rf"\s*([^{re.escape(closing)}]*?)\s*"
        text = re.sub(re.escape(opening) + inside + re.escape(closing), rf"{opening}\1{closing}", text)
    for old, new in _WIKITEXT_REST:
        text = text.replace(old, new)
    return text


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f"{place} is not JSON: {error}") from None


def _look_up(value: Any, place: str, needed: type[T], *steps: str | int) -> T:
    """Follow a path of steps in parsed JSON. Raises RequestError when a step is missing or the value has another type."""
    name = ""
    for step in steps:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
        there = isinstance(value, dict) and step in value if isinstance(step, str) else isinstance(value, list) and step < len(value)
        if not there:
            raise RequestError(f"{place}: {name} is missing; complete the record or leave it out")
        value = value[step]
    if not isinstance(value, needed):
        raise RequestError(f"{place}: {name} is a {type(value).__name__}, but a {needed.__name__} is needed")
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise RequestError(f"{place}: {name} holds half a character (a lone UTF-16 surrogate), which no tokenizer takes; correct the text")
    return value
