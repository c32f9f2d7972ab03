"""Parse a SentencePiece model: its pieces, and the settings that affect tokenization.

The format is the protocol buffer `ModelProto`. Only fields that affect ids are read.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from parallel.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces, with the same numbers in SentencePiece and in llama.cpp."""
UNIGRAM, BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_PIECES = 2_000_000


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its index."""

    text: str
    score: float = 0.0
    """Pieces with higher scores are merged earlier."""
    kind: int = NORMAL


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """Contents of a tokenizer.model; the defaults are SentencePiece's."""

    pieces: tuple[Piece, ...]
    algorithm: int = UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_piece: str = "<unk>"
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"
    charsmap: bytes = field(default=b"", repr=False)
    """Compiled character normalization."""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def read_sentencepiece_model(data: bytes, path: Path) -> SentencePieceModel:
    """Parse a serialized model. Raises CheckpointError for invalid bytes."""
    try:
        return _read_model(data)
    except (_NotProtocolBuffer, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a whole SentencePiece model ({error}); copy it again, or give a tokenizer.json, as for Llama 3"
        ) from None


class _NotProtocolBuffer(Exception):
    """The bytes are not a ModelProto."""


def _read_model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    values: dict[str, int | bytes | float] = {}
    for number, value in _read_fields(data):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_read_piece(value))
            if len(pieces) > _MAX_PIECES:
                raise _NotProtocolBuffer(f"more than {_MAX_PIECES} pieces")
        elif number in _MESSAGES and isinstance(value, bytes):
            values |= {_MESSAGES[number][at]: found for at, found in _read_fields(value) if at in _MESSAGES[number]}
    if not pieces:
        raise _NotProtocolBuffer("no pieces")
    texts = {piece.text for piece in pieces}
    if len(texts) < len(pieces) or "" in texts:
        raise _NotProtocolBuffer("a piece is empty or listed twice")
    if [piece.kind for piece in pieces].count(UNKNOWN) != 1:
        raise _NotProtocolBuffer("not exactly one unknown piece")
    read = {name: _convert(name, value) for name, value in values.items()}
    model = SentencePieceModel(pieces=tuple(pieces), **read)  # type: ignore[arg-type]
    if model.algorithm not in (UNIGRAM, BPE):
        raise _NotProtocolBuffer(f"its algorithm is number {model.algorithm}, but only unigram (1) and BPE (2) are supported")
    return model


_MESSAGES = {
    2: {
        3: "algorithm",
        35: "byte_fallback",
        40: "unk_id",
        41: "bos_id",
        42: "eos_id",
        45: "unk_piece",
        46: "bos_piece",
        47: "eos_piece",
    },
    3: {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"},
}
"""The fields of TrainerSpec (2) and NormalizerSpec (3) that are read."""


def _convert(name: str, value: int | bytes | float) -> int | str | bytes | bool:
    wants_bytes = name in ("charsmap", "unk_piece", "bos_piece", "eos_piece")
    if wants_bytes != isinstance(value, bytes) or isinstance(value, float):
        raise _NotProtocolBuffer(f"{name} has the wrong type")
    if isinstance(value, bytes):
        return value if name == "charsmap" else value.decode()
    if name in ("algorithm", "unk_id", "bos_id", "eos_id"):
        return value - 2**64 if value >= 2**63 else value
    return bool(value)


def _read_piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _read_fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
        elif number <= 3:
            raise _NotProtocolBuffer(f"field {number} of a piece has the wrong type")
    if kind not in range(NORMAL, BYTE + 1) or score != score:
        raise _NotProtocolBuffer(f"a piece has type {kind} and score {score}")
    return Piece(text, score, kind)


def _read_fields(data: bytes) -> Iterator[tuple[int, int | bytes | float]]:
    """Yield (number, value) of every field of a message."""
    place = 0
    while place < len(data):
        key, place = _read_varint(data, place)
        number, form = key >> 3, key & 7
        if number == 0:
            raise _NotProtocolBuffer("a field has number 0")
        if form == _VARINT:
            value, place = _read_varint(data, place)
            yield number, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(form)
        if form == _BYTES:
            size, place = _read_varint(data, place)
        if size is None:
            raise _NotProtocolBuffer(f"a field has the form {form}")
        if place + size > len(data):
            raise _NotProtocolBuffer("it ends in the middle of a field")
        found = data[place : place + size]
        place += size
        yield number, struct.unpack("<f", found)[0] if form == _FIXED32 else found


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise _NotProtocolBuffer("it ends in the middle of a number")
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 2**64 - 1, place
    raise _NotProtocolBuffer("a number has more than ten bytes")
