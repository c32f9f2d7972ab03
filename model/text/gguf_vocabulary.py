"""The tokenizer in a GGUF file: llama.cpp's `tokenizer.ggml.*` keys, pre-tokenizers and rules."""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.checkpoint.gguf_header import read_gguf_header
from model.spec.quoting import quote
from model.text.libraries import LibraryTokenizer, add_tokens, build_sentencepiece_backend, catch_library_errors, put_around
from model.text.sentencepiece_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Piece, SentencePieceModel
from model.text.tokenizer_settings import AddedToken, TokenizerSettings
from parallel.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

_NO_TOKENS = (-1, 2**32 - 1)
"""Values with which converters mark a missing token."""

_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace("{1,3}", "")
"""Digits one by one."""


def _split_gpt2() -> "tokenizers.pre_tokenizers.PreTokenizer":
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split_smollm() -> "tokenizers.pre_tokenizers.PreTokenizer":
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _split_gpt2()])


def _split_llama3() -> "tokenizers.pre_tokenizers.PreTokenizer":
    return _split_by(_LLAMA3_SPLIT)


def _split_qwen2() -> "tokenizers.pre_tokenizers.PreTokenizer":
    return _split_by(_QWEN2_SPLIT)


def _split_by(pattern: str) -> "tokenizers.pre_tokenizers.PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """Rules of one family of byte-level vocabularies."""

    build: Callable[[], "tokenizers.pre_tokenizers.PreTokenizer"]
    ignore_merges: bool = False
    """Whether a word that is a token is used as is, regardless of the merges."""
    add_bos: bool = False
    """Whether to prepend the begin token if the metadata do not specify it."""


_PRE_TOKENIZERS = {
    "default": _PreTokenizer(_split_gpt2),
    "gpt-2": _PreTokenizer(_split_gpt2),
    "smollm": _PreTokenizer(_split_smollm),
    "qwen2": _PreTokenizer(_split_qwen2),
    "llama-bpe": _PreTokenizer(_split_llama3, ignore_merges=True, add_bos=True),
}
"""By `tokenizer.ggml.pre`."""


def find_pre_tokenizer(metadata: Mapping[str, Any]) -> _PreTokenizer:
    """Return the rules of a byte-level vocabulary. Raises CheckpointError for an unknown family."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise CheckpointError(f"tokenizer.ggml.pre is {name!r}, but only {', '.join(_PRE_TOKENIZERS)} can be read: give a tokenizer.json")
    return _PRE_TOKENIZERS[name]


def read_gguf_tokenizer(path: Path) -> LibraryTokenizer:
    """Build the tokenizer in a GGUF file by llama.cpp's rules. Raises CheckpointError."""
    metadata = read_gguf_header(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model is {quote(kind)}, but only 'llama' and 'gpt2' can be read: give a tokenizer.json"
        )
    tokens, types = _read_tokens(metadata)
    if kind == "llama":
        model = read_sentencepiece(metadata)
        with catch_library_errors(CheckpointError, f"{path}: its vocabulary cannot be used"):
            # llama.cpp matches user-defined tokens in the text like control tokens; they take no part in merges.
            pieces = tuple(replace(piece, kind=UNUSED) if piece.kind == USER_DEFINED else piece for piece in model.pieces)
            backend = build_sentencepiece_backend(replace(model, pieces=pieces), legacy=True)
    else:
        backend = _build_byte_level_bpe(metadata, tokens)
    add_bos, add_eos = (_read_flag(metadata, f"add_{role}_token") for role in ("bos", "eos"))
    if add_bos is None:
        add_bos = kind == "llama" or find_pre_tokenizer(metadata).add_bos
    added = {
        number: AddedToken(content=token, special=kind != USER_DEFINED, normalized=False)
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and token
    }
    settings = TokenizerSettings(added_tokens=added, lists_all_added=True, add_bos_token=add_bos, add_eos_token=bool(add_eos))
    settings = settings.with_defaults(**{role: _find_token(metadata, key, tokens) for role, key in _ROLES.items()})
    named = replace(settings, special_tokens={})  # a role does not make a token special or matched in text; its type does
    add_tokens(backend, named, path)
    put_around(backend, settings.bos_token if add_bos else None, settings.eos_token if add_eos else None, path)
    return LibraryTokenizer(backend, settings, path, joins_bytes=kind == "llama")


_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # llama.cpp's spelling
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
"""llama.cpp's names of the roles."""


def _read_tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = _require(metadata, "tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not all(isinstance(token, str) for token in tokens):
        raise CheckpointError("tokenizer.ggml.tokens holds something else than texts: convert the file again")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(f"the GGUF metadata hold {len(tokens)} tokens, but token_type does not have as many: convert the file again")
    return tokens, types


def _read_flag(metadata: Mapping[str, Any], name: str) -> bool | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"tokenizer.ggml.{name} is {quote(value)}, but true or false is needed: convert the file again")
    return value


def _find_token(metadata: Mapping[str, Any], key: str, tokens: Sequence[str]) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if number is None or number in _NO_TOKENS:
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(tokens):
        raise CheckpointError(f"tokenizer.ggml.{key}_token_id is {quote(number)}, but the vocabulary has {len(tokens)} tokens")
    return tokens[number] or None


def _build_byte_level_bpe(metadata: Mapping[str, Any], tokens: Sequence[str]) -> "tokenizers.Tokenizer":
    """Build the vocabulary of `tokenizer.ggml.model: gpt2`."""
    from tokenizers import Tokenizer, decoders, models

    rules = find_pre_tokenizer(metadata)
    with catch_library_errors(CheckpointError, "the tokens and merges in the GGUF metadata do not fit together"):
        pairs = [tuple(merge.split(" ", 1)) for merge in _require(metadata, "merges")]
        model = models.BPE({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=rules.ignore_merges)
    backend = Tokenizer(model)
    backend.pre_tokenizer = rules.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def read_sentencepiece(metadata: Mapping[str, Any]) -> SentencePieceModel:
    """Build the vocabulary of `tokenizer.ggml.model: llama`, which llama.cpp splits as SentencePiece's BPE, without a normalizer."""
    tokens, types = _read_tokens(metadata)
    scores = _require(metadata, "scores")
    if len(scores) != len(tokens) or not all(isinstance(score, int | float) for score in scores):
        raise CheckpointError(f"the GGUF metadata hold {len(tokens)} tokens, but not as many scores: convert the file again")
    unknown = types.index(UNKNOWN) if UNKNOWN in types else tokens.index(_find_token(metadata, "unknown", tokens) or tokens[0])
    kinds = [UNKNOWN if number == unknown else kind for number, kind in enumerate(types)]
    prefix = _read_flag(metadata, "add_space_prefix")
    return SentencePieceModel(
        pieces=tuple(Piece(token, score, kind) for token, score, kind in zip(tokens, scores, kinds, strict=True)),
        algorithm=BPE,
        byte_fallback=types.count(BYTE) == 256,
        unk_id=unknown,
        unk_piece=tokens[unknown],
        add_dummy_prefix=prefix is not False,
        remove_extra_whitespaces=False,
    )


def write_sentencepiece_model(model: SentencePieceModel, special: Mapping[str, int | None]) -> bytes:
    """Serialize a ModelProto, for other programs. `special`: ids of bos, eos and padding.

    Encoded by hand: the library's message classes need protobuf, which is not among its dependencies.
    """
    pieces = b"".join(
        _field(1, _field(1, piece.text.encode()) + _float_field(2, piece.score) + _field(3, piece.kind)) for piece in model.pieces
    )
    trainer = _field(3, BPE) + _field(4, len(model.pieces)) + _field(35, model.byte_fallback) + _field(40, model.unk_id)
    for number, role in ((41, "bos"), (42, "eos"), (43, "padding")):
        found = special.get(role)
        trainer += _field(number, -1 if found is None else found)
    normalizer = _field(1, b"identity") + _field(3, model.add_dummy_prefix) + _field(4, False) + _field(5, True)
    return pieces + _field(2, trainer) + _field(3, normalizer)


def _require(metadata: Mapping[str, Any], key: str) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list):
        raise CheckpointError(f"the GGUF metadata lack tokenizer.ggml.{key}: give a tokenizer.json or tokenizer.model")
    return values


def _field(number: int, value: int | bytes) -> bytes:
    """Encode one protobuf field: a varint, or length-prefixed bytes."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _float_field(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative numbers are encoded as their 64-bit two's complement
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
