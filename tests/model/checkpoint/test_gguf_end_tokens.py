"""Ends of answers in GGUF metadata, by the rules of llama.cpp's src/llama-vocab.cpp (special_eog_ids)."""

from pathlib import Path
from typing import Any

import pytest

from model.checkpoint.gguf_end_tokens import find_end_ids
from model.checkpoint.gguf_metadata import NO_TOKEN, GgufMetadata
from parallel.errors import CheckpointError

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c"]
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def find(tokens: list[Any], types: list[int] | None = None, **ids: Any) -> list[int]:
    values: dict[str, Any] = {"tokenizer.ggml.tokens": tokens}
    values |= {} if types is None else {"tokenizer.ggml.token_type": types}
    values |= {f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items()}
    return find_end_ids(GgufMetadata(values, Path("model.gguf")))


@pytest.mark.parametrize("key", ["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_ids_of_the_metadata_end_an_answer(key: str) -> None:
    assert find(WORDS, **{key: 4}) == [4]
    assert find(WORDS, **{key: NO_TOKEN}) == []
    with pytest.raises(CheckpointError, match=f"tokenizer.ggml.{key}_token_id is '4'"):
        find(WORDS, **{key: "4"})


def test_all_of_them_count_the_eos_first() -> None:
    assert find([*WORDS, "<|im_end|>", "<|endoftext|>"], eot=3, eos=5, eom=4) == [5, 3, 4, 6, 7]
    assert find([*WORDS, "<|im_end|>"], eos=6, eot=6) == [6]


@pytest.mark.parametrize(
    "name",
    "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance>"
    " <eos> <|fim_pad|> <PAD> <reponame> <|file_sep|>".split(),
)
@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_tokens_by_name_end_an_answer_whatever_type_the_file_gives_them(name: str, kind: int) -> None:
    assert find([*WORDS, name], [NORMAL] * len(WORDS) + [kind], eos=5) == [5, 6]
    assert find([*WORDS, name.strip("<>[]|") + "?"], eos=5) == [5]


def test_a_tag_of_html_ends_an_answer_only_as_a_control_token() -> None:
    assert find(WORDS, [NORMAL] * 6, eos=5) == [5]
    assert find(WORDS, [NORMAL, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL], eos=5) == [5, 2]


@pytest.mark.parametrize("others", [("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>")])
def test_the_end_of_a_message_inside_an_answer_is_none(others: tuple[str, str]) -> None:
    assert find([*WORDS, "<|end|>", *others], eos=5) == [5, 7, 8]
    assert find([*WORDS, "<|end|>", others[0]], eos=5) == [5, 6, 7]


def test_a_vocabulary_that_holds_no_texts_has_no_names() -> None:
    assert find([1, ["<|im_end|>"], None, "<|im_end|>"], eos=0) == [0, 3]
