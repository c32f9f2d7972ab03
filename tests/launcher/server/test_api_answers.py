"""Answers piece by piece: stop texts, characters of several tokens, and OpenAI's objects."""

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.server.api_answers import ChoiceText, Naming, Piece, TextRules, build_chat_logprobs, build_text_logprobs, build_usage
from launcher.server.inflight_requests import NewToken


class WordTokenizer:
    """Token i is the i-th text; a token of bytes may be a part of a character."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, *words: str | bytes) -> None:
        self._words = [word.encode() if isinstance(word, str) else word for word in words]
        self.special_ids = frozenset(i for i, word in enumerate(self._words) if word.startswith(b"<|"))
        self.vocab_size = len(words)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        left_out = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self._words[i] for i in ids if i not in left_out).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._words[token_id]


def answer(words: Sequence[str | bytes], stops: Sequence[str], reason: str = "length") -> list[Piece]:
    """The pieces of an answer that consists of these tokens, up to its end."""
    text = ChoiceText(WordTokenizer(*words), [], TextRules(stops=stops))
    pieces = []
    for place in range(len(words)):
        pieces.append(text.push(NewToken(place, reason if place == len(words) - 1 else None, None, ())))
        if text.finish_reason:
            break
    return pieces


def cut(text: str, stops: Sequence[str]) -> str | None:
    """What comes before the stop text that is complete first (of several, the longest), character by character; None: there is none."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return None


LETTERS = st.text(alphabet="ab ü", max_size=4)


@settings(deadline=None)
@given(words=st.lists(LETTERS, min_size=1, max_size=12), stops=st.lists(st.text(alphabet="ab ü", min_size=1, max_size=5), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop_wherever_tokens_end(words: list[str], stops: list[str]) -> None:
    pieces = answer(words, stops)
    whole = "".join(words)
    expected = cut(whole, stops)
    assert "".join(piece.text for piece in pieces) == (whole if expected is None else expected)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == ("length" if expected is None else "stop")
    assert all(len(piece.tokens) == 1 for piece in pieces)


@settings(deadline=None)
@given(
    data=st.data(),
    text=st.text(alphabet="aé€😀", min_size=1, max_size=8),
    stops=st.lists(st.sampled_from(["€", "aé", "😀a", "éé"]), max_size=2),
)
def test_tokens_may_end_within_characters(data: st.DataObject, text: str, stops: list[str]) -> None:
    raw = text.encode()
    ends = sorted(data.draw(st.sets(st.integers(1, len(raw)), max_size=6)) | {len(raw)})
    words = [raw[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    expected = cut(text, stops)
    assert "".join(piece.text for piece in answer(words, stops)) == (text if expected is None else expected)


def test_a_stop_text_of_two_tokens_never_shows() -> None:
    assert [piece.text for piece in answer(["one", " EN", "D two"], [" END"])] == ["one", "", ""]
    assert [piece.text for piece in answer(["one", " EN", "ding"], [" END"])] == ["one", "", " ENding"]
    assert [piece.text for piece in answer(["one", " EN"], [" END"])] == ["one", " EN"], "the end of the answer gives out what was held"


def test_the_stop_text_that_is_complete_first_counts() -> None:
    for words in (["abc"], ["a", "b", "c"], ["ab", "c"]):
        assert "".join(piece.text for piece in answer(words, ["abc", "b"])) == "a"
        assert "".join(piece.text for piece in answer(words, ["c", "bc"])) == "a"


def test_without_stop_texts_nothing_is_held() -> None:
    assert [piece.text for piece in answer(["a", "b"], [])] == ["a", "b"]


def test_a_text_ends_with_its_sequence() -> None:
    assert answer(["a"], ["b"], "eos")[-1].finish_reason == "stop"
    assert answer(["a"], ["b"], "length")[-1].finish_reason == "length"
    assert answer(["b"], ["b"], "length")[-1].finish_reason == "stop"
    assert answer(["a", b"\xe2\x82"], [])[-1].text == "\ufffd", "what never became a character is told at the end"


def test_tokens_are_counted_with_those_of_the_stop_text() -> None:
    text = ChoiceText(WordTokenizer("a", "b"), [], TextRules(stops=["b"]))
    text.push(NewToken(0, None, None, ()))
    text.push(NewToken(1, None, None, ()))
    assert (text.num_tokens, text.finish_reason) == (2, "stop")


@pytest.mark.parametrize(
    ("is_chat", "is_chunk", "kind", "prefix"),
    [
        (True, True, "chat.completion.chunk", "chatcmpl-"),
        (True, False, "chat.completion", "chatcmpl-"),
        (False, True, "text_completion", "cmpl-"),
        (False, False, "text_completion", "cmpl-"),
    ],
)
def test_objects_say_what_they_are(is_chat: bool, is_chunk: bool, kind: str, prefix: str) -> None:
    naming = Naming.new("m", is_chat=is_chat, fingerprint="f")
    built = naming.build([{"index": 0}], build_usage(3, 4), is_chunk=is_chunk)
    assert built["object"] == kind and built["id"].startswith(prefix)
    assert (built["model"], built["system_fingerprint"], built["choices"]) == ("m", "f", [{"index": 0}])
    assert built["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert naming.id != Naming.new("m", is_chat=is_chat, fingerprint="f").id


def test_log_probabilities_stand_as_each_route_has_them() -> None:
    tokenizer = WordTokenizer("so", " ü")
    tokens = [NewToken(0, None, -0.5, ((0, -0.5), (1, -1.0))), NewToken(1, "length", -0.25, ())]
    assert build_text_logprobs(tokenizer, [], tokens, 10) == {
        "tokens": ["so", " ü"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"so": -0.5, " ü": -1.0}, None],
        "text_offset": [10, 12],
    }
    alike = NewToken(0, None, -0.5, ((0, -0.5), (2, -1.0)))
    assert build_text_logprobs(WordTokenizer(b"\xe2", "", b"\x82"), [], [alike], 0)["top_logprobs"] == [{"\ufffd": -0.5}], "the likeliest"
    prompt = [NewToken(1, None, None, ()), NewToken(0, None, -2.0, ((1, -0.1),))]
    assert build_text_logprobs(tokenizer, prompt, tokens, 4) == {
        "tokens": [" ü", "so", "so", " ü"],
        "token_logprobs": [None, -2.0, -0.5, -0.25],
        "top_logprobs": [None, {" ü": -0.1}, {"so": -0.5, " ü": -1.0}, None],
        "text_offset": [0, 2, 4, 6],
    }
    first, second = build_chat_logprobs(tokenizer, tokens)["content"]
    assert first["token"] == "so" and first["logprob"] == -0.5 and [one["token"] for one in first["top_logprobs"]] == ["so", " ü"]
    assert second == {"token": " ü", "logprob": -0.25, "bytes": [32, 195, 188], "top_logprobs": []}


@pytest.mark.parametrize(
    ("words", "stops", "text", "reason"),
    [
        (["Li", "ly", "<|eot|>", " She"], ["<|eot|>"], "Lily", "stop"),
        (["Li", "ly", "<|eot|>", " She"], ["ly<|eot|>"], "Li", "stop"),
        (["Li", "ly", "<|eot|>", " She"], ["<|eot|> S"], "Lily", "stop"),
        (["Li", "ly", "<|eot|>", " She"], ["ly She"], "Li", "stop"),
        (["Li", "ly", "<|eot|>", " She"], ["<|end|>"], "Lily She", "length"),
        (["Li", "ly", "<|eot|>", "<|end|>", "!"], ["<|eot|><|end|>"], "Lily", "stop"),
        (["Li", b"\xc3", "<|eot|>", b"\xa9"], ["<|eot|>"], "Li", "stop"),
        (["Li", "ly", "<|eot|>"], [], "Lily", "length"),
    ],
)
def test_stop_texts_are_looked_for_with_the_text_of_special_tokens(words: list[str], stops: list[str], text: str, reason: str) -> None:
    pieces = answer(words, stops)
    assert ("".join(piece.text for piece in pieces), pieces[-1].finish_reason) == (text, reason)
