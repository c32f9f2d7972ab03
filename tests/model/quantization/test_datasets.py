"""Calibration samples and evaluation data: small files written here, and the real BoolQ and WikiText-2 where they are at hand."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.evaluation.data import encode_prompts, find_choice_ids, read_boolq, read_windows
from model.quantization.datasets import boolq_prompt, clean_wikitext, read_samples
from model.text.tokenizer import read_tokenizer
from parallel.errors import CheckpointError, ConfigError, RequestError

RECORD = {"question": "is it far", "title": "Mars", "passage": "Mars is far away.", "answer": True}
PROMPT = (
    "Read the passage below and answer the question with yes or no.\n"
    "### Passage:\nMars -- Mars is far away.\n### Question:\nis it far\n### Answer:"
)
BOS, EOS, VOCAB = 1, 2, 1000


class CharacterTokenizer:
    """An id a character: its code, after a begin token."""

    bos_token_id: int | None = BOS
    eos_token_id: int | None = EOS
    pad_token_id: int | None = None
    vocab_size = VOCAB
    special_ids = frozenset({BOS, EOS})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + [ord(character) for character in text]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids if i not in self.special_ids)


class EndingTokenizer(CharacterTokenizer):
    """One that ends every text by itself."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text, add_special_tokens) + [EOS] * add_special_tokens


def read(kind: str, path: Path, **options: Any) -> list[tuple[int, ...]]:
    return read_samples(kind, path, CharacterTokenizer(), **{"max_tokens": 500, "vocab_size": VOCAB, **options})


def text_of(sample: tuple[int, ...]) -> str:
    assert (sample[0], sample[-1]) == (BOS, EOS)
    return CharacterTokenizer().decode(sample)


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def squad(*paragraphs: Any) -> dict[str, Any]:
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]} for paragraph in paragraphs]}


def paragraph(context: str, *pairs: tuple[str, str]) -> dict[str, Any]:
    return {"context": context, "qas": [{"question": q, "answers": [{"text": a}, {"text": "other"}]} for q, a in pairs]}


def test_boolq_samples_are_the_prompt_and_the_answer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "b.jsonl", RECORD, {**RECORD, "answer": False}, RECORD)
    assert [text_of(sample) for sample in read("BoolQ", path)] == [PROMPT + "yes", PROMPT + "no", PROMPT + "yes"]
    assert boolq_prompt(RECORD) == PROMPT
    assert len(read("boolq", path, num_samples=2)) == 2
    assert read("boolq", path, max_tokens=7)[0] == (BOS, *map(ord, "Read t"))


def test_an_end_token_is_never_put_twice(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "b.jsonl", RECORD)
    assert read_samples("boolq", path, EndingTokenizer(), max_tokens=500, vocab_size=VOCAB) == read("boolq", path)


def test_squad_samples_are_one_question_a_paragraph(tmp_path: Path) -> None:
    data = squad(paragraph("It is hot.", ("how is it", "hot"), ("is it", "yes")), paragraph("It is wet.", ("what", "wet")))
    path = write_lines(tmp_path / "s.json", data)
    head = "Read the passage and answer the question below.\n\n### Instruction:\n"
    assert [text_of(sample) for sample in read("squad1.1", path)] == [
        f"{head}It is hot.\n\n### Input:\nhow is it\n\n### Response:hot",
        f"{head}It is wet.\n\n### Input:\nwhat\n\n### Response:wet",
    ]


def test_wikitext_is_cleaned_and_cut_into_whole_chunks(tmp_path: Path) -> None:
    path = tmp_path / "w.raw"
    path.write_text(" \n = A title = \n \n It @-@ was ( so ) . \n Then on . \n \n = = Part = = \n \n The end \n", encoding="utf-8")
    # A begin and an end token around each paragraph, as Golden Stick's tokenizer puts them.
    ids = [BOS, *map(ord, "It-was (so).\nThen on."), EOS, BOS, *map(ord, "The end\n"), EOS]
    assert read("wikitext2", path, max_tokens=8) == [tuple(ids[first : first + 8]) for first in range(0, len(ids) - 7, 8)]
    assert read("wikitext2", path, max_tokens=8, num_samples=2) == [tuple(ids[:8]), tuple(ids[8:16])]
    assert read("wikitext2", path) == [tuple(ids)]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("1 @,@ 000 @.@ 5 m : yes ; no ! what ? a , b", "1,000.5 m: yes; no! what? a, b"),
        ('he said " hi there " [ 1 ] { x }', 'he said "hi there" [1] {x}'),
        ("the dogs ' tail at 5 \N{DEGREE SIGN} C", "the dogs' tail at 5\N{DEGREE SIGN}C"),
        ("Ann 's", "Ann's"),
        # Two apostrophes are taken for quotation marks: a flaw of the original that is kept, so that samples are the same.
        ("the dogs ' tail and Ann 's", "the dogs'tail and Ann's"),
        ("about N of them", "about 1 of them"),
    ],
)
def test_cleaning_joins_what_wikitext_spaces_out(raw: str, clean: str) -> None:
    assert clean_wikitext(raw) == clean


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_id_rows_are_samples_and_need_no_tokenizer(tmp_path: Path, dtype: str) -> None:
    rows = np.arange(12).reshape(3, 4).astype(dtype)
    np.save(tmp_path / "ids.npy", rows)
    found = read_samples("ids", tmp_path / "ids.npy", None, max_tokens=3, vocab_size=12)
    assert found == [(0, 1, 2), (4, 5, 6), (8, 9, 10)]
    assert all(type(token) is int for sample in found for token in sample)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), dtype=np.float32), r"type float32, but token ids are integers"),
        (np.zeros((2, 3), dtype=bool), r"type bool, but token ids are integers"),
        (np.zeros(3, dtype=np.int32), r"shape \[3\], but \[samples, length\]"),
        (np.zeros((2, 3, 1), dtype=np.int32), r"shape \[2, 3, 1\]"),
        (np.array([[1, 2], [3, 40]]), r"ids\.npy, row 1 has id 40, but the vocabulary has 40"),
        (np.array([[1, -1]]), r"row 0 has id -1, but the vocabulary has 40"),
        (np.array([[1, "a"]], dtype=object), r"cannot be read as a \.npy file"),
        (np.zeros((0, 3), dtype=np.int32), r"ids\.npy"),
        (np.zeros((3, 0), dtype=np.int32), r"ids\.npy"),
    ],
)
def test_id_files_of_another_make_are_refused(tmp_path: Path, array: Any, message: str) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(RequestError, match=message):
        read("ids", tmp_path / "ids.npy", vocab_size=40)


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_arrays_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(RequestError, match=r"ids\.npy cannot be read as a \.npy file"):
        read("ids", tmp_path / "ids.npy")


def test_an_archive_of_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", np.zeros((2, 2), dtype=np.int32))
    with pytest.raises(RequestError, match="archive of arrays"):
        read("ids", tmp_path / "ids.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no sample"),
        ("\n \n", "holds no sample"),
        (json.dumps(RECORD) + "\n\n{broken\n", r"b\.jsonl, line 3 is not JSON"),
        (json.dumps({**RECORD, "answer": "true"}), "line 1: answer is a str, but a bool is needed"),
        (json.dumps({**RECORD, "title": 4}), "line 1: title is a int, but a str is needed"),
        ('{"question": "q", "title": "t", "answer": true}', "line 1: passage is missing"),
        ("[1]", "line 1: question is missing"),
        (json.dumps({**RECORD, "passage": "a \ud83d b"}), "line 1: passage holds half a character"),
        (json.dumps({**RECORD, "title": "杜"}), r"line 1 has id 26460, but the vocabulary has 1000"),
    ],
)
def test_malformed_boolq_files_are_refused_with_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        read("boolq", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"s\.json is not JSON"),
        ({"data": {}}, r"s\.json: data is a dict, but a list is needed"),
        ([], r"s\.json: data is missing"),
        ({"data": []}, "holds no sample"),
        ({"data": [{"title": "t"}]}, r"data\[0\]: paragraphs is missing"),
        (squad({"context": "c"}), r"data\[0\]\.paragraphs\[0\]: qas is missing"),
        (squad({"context": "c", "qas": []}), r"data\[0\]\.paragraphs\[0\]: qas\[0\] is missing"),
        (squad({"context": "c", "qas": [{"question": "q", "answers": []}]}), r"qas\[0\]\.answers\[0\] is missing"),
        (squad({"context": None, "qas": []}), "context is a NoneType"),
    ],
)
def test_malformed_squad_files_are_refused_with_the_place(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        read("squad1.1", path)


@pytest.mark.parametrize("kind", ["boolq", "squad1.1", "wikitext2", "ids"])
def test_missing_files_and_folders_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RequestError, match=r"none does not exist"):
        read(kind, tmp_path / "none")
    with pytest.raises(RequestError, match="cannot be read"):
        read(kind, tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.raw").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RequestError, match="cannot be read as UTF-8"):
        read("wikitext2", tmp_path / "w.raw")


def test_options_are_checked(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "b.jsonl", RECORD)
    with pytest.raises(ConfigError, match=r"'alpaca' is unknown: give one of boolq, squad1\.1, wikitext2, ids"):
        read("alpaca", path)
    with pytest.raises(RequestError, match="num_samples is 0"):
        read("boolq", path, num_samples=0)
    with pytest.raises(RequestError, match="max_tokens is 0"):
        read("boolq", path, max_tokens=0)
    with pytest.raises(CheckpointError, match="there is no tokenizer"):
        read_samples("boolq", path, None, max_tokens=5, vocab_size=VOCAB)


def test_questions_end_where_the_answer_follows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "b.jsonl", RECORD, {**RECORD, "answer": False}, RECORD)
    questions = read_boolq(path)
    assert [(question.prompt, question.answer) for question in questions] == [(PROMPT, True), (PROMPT, False), (PROMPT, True)]
    assert read_boolq(path, 2) == questions[:2]
    rows, num_cut = encode_prompts([PROMPT, "short"], EndingTokenizer(), 50)
    assert rows == [(BOS, *map(ord, PROMPT[:49])), (BOS, *map(ord, "short"))]
    assert num_cut == 1
    (tmp_path / "empty").write_text("")
    with pytest.raises(RequestError, match="holds no question"):
        read_boolq(tmp_path / "empty")
    with pytest.raises(RequestError, match="limit is 0"):
        read_boolq(path, 0)


def test_choices_are_the_first_ids_of_yes_and_no() -> None:
    assert find_choice_ids(CharacterTokenizer()) == (ord("y"), ord("n"))

    class Blind(CharacterTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [7]

    with pytest.raises(CheckpointError, match="two different ids"):
        find_choice_ids(Blind())


def test_windows_do_not_overlap_and_keep_a_rest_of_two(tmp_path: Path) -> None:
    path = tmp_path / "text"
    ids = (BOS, *map(ord, "0123456789"))

    def read_text(text: str, window_tokens: int, limit: int | None = None) -> list[tuple[int, ...]]:
        path.write_text(text, encoding="utf-8")
        return read_windows(path, CharacterTokenizer(), window_tokens, limit)

    assert read_text("0123456789", 4) == [ids[:4], ids[4:8], ids[8:11]]
    assert read_text("0123456789", 5) == [ids[:5], ids[5:10]]
    assert read_text("0123456789", 4, 2) == [ids[:4], ids[4:8]]
    assert read_text("0123456789", 100) == [ids]
    with pytest.raises(RequestError, match="has 1 tokens, but at least 2"):
        read_text("", 4)
    with pytest.raises(RequestError, match="window_tokens is 1"):
        read_text("0123456789", 1)
    with pytest.raises(RequestError, match="limit is 0"):
        read_text("0123456789", 4, 0)


def test_the_real_files_are_read(shared_dir: Path) -> None:
    data = shared_dir / "data"
    tokenizer = read_tokenizer(data / "llama2-tokenizer" / "tokenizer.model")
    options = {"max_tokens": 256, "vocab_size": 32000}
    boolq_file, wiki_file = data / "boolq" / "dev.jsonl", data / "wiki.test.raw"

    samples = read_samples("boolq", boolq_file, tokenizer, num_samples=5, **options)
    questions = read_boolq(boolq_file, 5)
    texts = [question.prompt + ("yes" if question.answer else "no") for question in questions]
    assert samples == [(*tokenizer.encode(text), 2)[:256] for text in texts]
    assert any(sample[-1] == 2 for sample in samples)
    assert find_choice_ids(tokenizer) == (4874, 694)

    chunks = read_samples("wikitext2", wiki_file, tokenizer, num_samples=3, **options)
    assert [len(chunk) for chunk in chunks] == [256] * 3
    beginning = "Robert Boulter is an English film, television and theatre actor. He had a guest-starring role on the television series"
    assert tokenizer.decode(chunks[0]).startswith(beginning)

    windows = read_windows(wiki_file, tokenizer, limit=2)
    assert [len(window) for window in windows] == [512] * 2
    assert tokenizer.decode([*windows[0], *windows[1]]).startswith(" \n = Robert Boulter = \n")
