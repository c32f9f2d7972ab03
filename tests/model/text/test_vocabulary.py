"""Two vocabularies: equal ones, and where unequal ones differ first."""

import json
from pathlib import Path

import pytest

from model.text.tokenizer import read_tokenizer
from model.text.vocabulary import describe_difference


def write(folder: Path, vocab: dict[str, int], special: tuple[str, ...] = ()) -> Path:
    folder.mkdir()
    added = [
        {"id": vocab[text], "content": text, "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        for text in special
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "decoder": decoder, "model": model}))
    return folder


@pytest.mark.parametrize(
    ("vocab", "special", "expected"),
    [
        ({"a": 0, "b": 1, "c": 2}, (), None),
        ({"a": 0, "c": 1, "b": 2}, (), "token 1 is 'b' and not 'c'"),
        ({"a": 0, "b": 1}, (), "token 2 is 'c' and not missing"),
        ({"a": 0, "b": 1, "c": 2, "d": 3}, (), "token 3 is missing and not 'd'"),
        ({"a": 0, "b": 1, "c": 2}, ("c",), "token 2 is 'c' and not the special 'c'"),
    ],
    ids=str,
)
def test_the_first_difference_is_named(tmp_path: Path, vocab: dict[str, int], special: tuple[str, ...], expected: str | None) -> None:
    one = read_tokenizer(write(tmp_path / "one", {"a": 0, "b": 1, "c": 2}))
    assert describe_difference(one, read_tokenizer(write(tmp_path / "other", vocab, special))) == expected
