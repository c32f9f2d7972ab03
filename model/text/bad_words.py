"""Texts that an answer must not contain, as token ids."""

from collections.abc import Iterable

from model.text.tokenizer import Tokenizer


def encode_bad_words(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Tokenize texts as they are at the beginning of a text and, as vLLM does, after a space."""
    found: list[tuple[int, ...]] = []
    for word in words:
        plain, spaced = (tuple(tokenizer.encode(prefix + word.lstrip(), False)) for prefix in ("", " "))
        found += [plain] if plain else []
        if plain and spaced and len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
    return tuple(found)
