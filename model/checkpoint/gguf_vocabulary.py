"""The vocabulary in a GGUF file's metadata, as the tokenizer libraries want it.

Knows llama.cpp's `tokenizer.ggml.*` keys and its pre-tokenizers; no files and no rules about begin and end tokens.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parallel.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Types of tokens: the same numbers in llama.cpp and in SentencePiece."""

_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split_gpt2() -> "tokenizers.pre_tokenizers.PreTokenizer":
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split_smollm() -> "tokenizers.pre_tokenizers.PreTokenizer":
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _split_gpt2()])


def _split_llama3() -> "tokenizers.pre_tokenizers.PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How one family of byte-level vocabularies is used."""

    build: Callable[[], "tokenizers.pre_tokenizers.PreTokenizer"]
    ignore_merges: bool = False
    """A word that is a token is taken whole, whatever the merges say."""
    add_bos: bool = False
    """The begin token is put before a text when the metadata do not say."""


_PRE_TOKENIZERS = {
    "default": _PreTokenizer(_split_gpt2),
    "gpt-2": _PreTokenizer(_split_gpt2),
    "smollm": _PreTokenizer(_split_smollm),
    "llama-bpe": _PreTokenizer(_split_llama3, ignore_merges=True, add_bos=True),
}
"""By `tokenizer.ggml.pre`."""


def find_pre_tokenizer(metadata: Mapping[str, Any]) -> _PreTokenizer:
    """The rules of a byte-level vocabulary. Raises CheckpointError for a family that is not in the table."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise CheckpointError(f"tokenizer.ggml.pre is {name!r}, but only {', '.join(_PRE_TOKENIZERS)} can be read: give a tokenizer.json")
    return _PRE_TOKENIZERS[name]


def build_byte_level_bpe(metadata: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    """The vocabulary of `tokenizer.ggml.model: gpt2`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    rules = find_pre_tokenizer(metadata)
    tokens, merges = _require(metadata, "tokens"), _require(metadata, "merges")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        model = models.BPE({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=rules.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"the tokens and merges in the GGUF metadata do not fit together: {error}") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = rules.build()
    tokenizer.decoder = decoders.ByteLevel()
    for kinds, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
        added = [AddedToken(token, normalized=False, special=special) for token, kind in zip(tokens, types, strict=True) if kind in kinds]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def build_sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """The vocabulary of `tokenizer.ggml.model: llama` as a serialized SentencePiece ModelProto.

    Written field by field: the library's own message classes need protobuf, which it does not bring along.
    """
    tokens, scores, types = (_require(metadata, key) for key in ("tokens", "scores", "token_type"))
    unknown = types.index(UNKNOWN) if UNKNOWN in types else metadata.get("tokenizer.ggml.unknown_token_id", 0)
    types = [UNKNOWN if i == unknown else kind for i, kind in enumerate(types)]
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + _float_field(2, score) + _field(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    bpe = 2  # llama.cpp joins the pair with the best score first, which is what SentencePiece calls BPE
    byte_fallback = types.count(BYTE) == 256
    trainer = _field(3, bpe) + _field(4, len(tokens)) + _field(35, byte_fallback) + _field(40, unknown)
    for number, key in ((41, "bos"), (42, "eos"), (43, "padding")):
        trainer += _field(number, metadata.get(f"tokenizer.ggml.{key}_token_id", -1))
    normalizer = (
        _field(1, b"identity")
        + _field(3, metadata.get("tokenizer.ggml.add_space_prefix", True))
        + _field(4, metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
        + _field(5, True)
    )
    return pieces + _field(2, trainer) + _field(3, normalizer)


def _require(metadata: Mapping[str, Any], key: str) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list):
        raise CheckpointError(f"the GGUF metadata lack tokenizer.ggml.{key}: give a tokenizer.json or tokenizer.model")
    return values


def _field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: a varint, or bytes behind their length."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _float_field(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative numbers are written as their 64-bit complement
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
