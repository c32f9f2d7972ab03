"""Comparison of two tokenizers' vocabularies: whether an id means the same token in both."""

from model.text.tokenizer import Tokenizer


def describe_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return the first difference of two vocabularies as a clause, `one`'s token first; None if every id means the same token."""
    for token in range(max(one.vocab_size, other.vocab_size)):
        first, second = _describe_token(one, token), _describe_token(other, token)
        if first != second:
            return f"token {token} is {first} and not {second}"
    return None


def _describe_token(tokenizer: Tokenizer, token: int) -> str:
    spelled = tokenizer.token_bytes(token)
    if token in tokenizer.special_ids:
        return f"the special {spelled.decode(errors='backslashreplace')!r}"
    return repr(spelled.decode(errors="backslashreplace")) if spelled else "missing"
