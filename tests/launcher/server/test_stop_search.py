"""Stop texts in an answer with special tokens, against a search that looks at the whole answer after every character."""

from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.server.stop_search import StopSearch

Parts = list[tuple[str, bool]]


def search(parts: Parts, stops: list[str]) -> tuple[str, bool]:
    """What is given out in all, and whether a stop text was found."""
    found, given_out = StopSearch(stops), ""
    for number, (text, shown) in enumerate(parts):
        found.add(text, shown=shown)
        text, stopped = found.take(is_end=number == len(parts) - 1)
        given_out += text
        if stopped:
            return given_out, True
    return given_out, False


def search_plainly(parts: Parts, stops: list[str]) -> tuple[str, bool]:
    letters = [(letter, shown) for text, shown in parts for letter in text]
    for end in range(1, len(letters) + 1):
        starts = []
        for kept in (range(end), [place for place in range(end) if letters[place][1]]):
            text = "".join(letters[place][0] for place in kept)
            starts += [kept[len(text) - len(stop)] for stop in stops if text.endswith(stop)]
        if starts:
            return "".join(letter for letter, shown in letters[: min(starts)] if shown), True
    return "".join(letter for letter, shown in letters if shown), False


WORDS = st.text(alphabet="ab<>", max_size=4)
PARTS = st.lists(st.tuples(WORDS, st.booleans()), min_size=1, max_size=10)


@settings(deadline=None, max_examples=400)
@given(parts=PARTS, stops=st.lists(st.text(alphabet="ab<>", min_size=1, max_size=5), max_size=3))
def test_an_answer_ends_before_the_stop_text_that_is_complete_first(parts: Parts, stops: list[str]) -> None:
    assert search(parts, stops) == search_plainly(parts, stops)


def test_the_text_of_a_special_token_is_found_and_never_shown() -> None:
    parts = [("Lily", True), ("<|eot|>", False), (" She", True)]
    assert search(parts, ["<|eot|>"]) == ("Lily", True)
    assert search(parts, ["y<|eot|>"]) == ("Lil", True)
    assert search(parts, ["<|eot|> S"]) == ("Lily", True)
    assert search(parts, ["Lily She"]) == ("", True), "a client who never sees special tokens means this text"
    assert search(parts, ["<|eot|>She"]) == ("Lily She", False)
