"""The libraries `tokenizers` and `sentencepiece` behind one interface: the Tokenizer of `model/text/tokenizer.py`.

Knows how each is asked and how Llama-2's rules go on top; no files.
Both are imported where they are used: of all ranks only the one that reads prompts needs them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import CheckpointError

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Which ids begin, end and fill, and which are put around a text."""

    bos: int | None
    """Begin of a text."""
    eos: int | None
    """End of a text."""
    pad: int | None
    """Filler."""
    add_bos: bool | None
    """Begin every text with bos; None leaves it to the tokenizer's own file."""
    add_eos: bool | None
    """End every text with eos; None leaves it to the tokenizer's own file."""


class JsonTokenizer:
    """The `tokenizers` library."""

    def __init__(self, backend: "tokenizers.Tokenizer", special: SpecialTokens) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id = special.bos, special.eos, special.pad
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._letters = _list_letters() if "ByteLevel" in repr(backend.decoder) else None
        self._put_around(special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_ids:
            return str(token).encode()
        if self._letters is not None:
            return bytes(self._letters[letter] for letter in token)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else str(token).replace("▁", " ").encode()

    def _put_around(self, special: SpecialTokens) -> None:
        """Replace the file's own rule where the settings say otherwise."""
        from tokenizers import processors

        empty = self._backend.encode("", add_special_tokens=True).ids
        has_bos = special.bos is not None and empty[:1] == [special.bos]
        has_eos = special.eos is not None and empty[has_bos:][-1:] == [special.eos]
        wants_bos = special.bos is not None and (has_bos if special.add_bos is None else special.add_bos)
        wants_eos = special.eos is not None and (has_eos if special.add_eos is None else special.add_eos)
        if (wants_bos, wants_eos) == (has_bos, has_eos):
            return
        ids = {self._backend.id_to_token(i): i for i in (special.bos, special.eos) if i is not None}
        before = [token for token, i in ids.items() if wants_bos and i == special.bos]
        after = [token for token, i in ids.items() if wants_eos and i == special.eos]
        self._backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=list(ids.items()))


def load_sentencepiece(serialized_model: bytes, source: Path) -> "sentencepiece.SentencePieceProcessor":
    """A SentencePiece model. Raises CheckpointError when the bytes are none."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(serialized_model)
    except RuntimeError as error:
        raise CheckpointError(f"{source} holds no SentencePiece model ({error}): give a tokenizer.json, as for Llama 3") from None
    return processor


class SentencePieceTokenizer:
    """The `sentencepiece` library with Llama-2's rules: special tokens in a text are ids, what lies between is encoded by itself."""

    def __init__(
        self,
        processor: "sentencepiece.SentencePieceProcessor",
        special: SpecialTokens,
        added_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self._processor = processor
        ids = list(range(processor.vocab_size()))
        pieces, is_byte = processor.id_to_piece(ids), processor.is_byte(ids)
        flags = zip(processor.is_control(ids), processor.is_unknown(ids), strict=True)
        self._special = {pieces[i]: i for i, flag in enumerate(flags) if any(flag)} | dict(added_tokens or {})
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")")
        self._bytes = {i: bytes([int(p[3:5], 16)]) if is_byte[i] else p.replace("▁", " ").encode() for i, p in enumerate(pieces)}
        self._bytes |= {i: token.encode() for token, i in self._special.items()}
        self._leading_space = " " if processor.encode("a", out_type=str)[0].startswith("▁") else ""
        self.special_ids = frozenset(self._special.values())
        self.vocab_size = max(self._bytes) + 1
        self.bos_token_id = _first_id(special.bos, processor.bos_id())
        self.eos_token_id = _first_id(special.eos, processor.eos_id())
        self.pad_token_id = _first_id(special.pad, processor.pad_id())
        self._before = [] if special.add_bos is False or self.bos_token_id is None else [self.bos_token_id]
        self._after = [self.eos_token_id] if special.add_eos and self.eos_token_id is not None else []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += self._processor.encode(part)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text."""
        return self._bytes.get(token_id, b"")

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Not the library's: that drops special tokens, or writes them as ' ⁇ '."""
        left_out = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self._bytes.get(i, b"") for i in map(int, ids) if i not in left_out)
        text = re.sub("[\udc80-\udcff]", "\ufffd", data.decode("utf-8", errors="surrogateescape"))
        return text.removeprefix(self._leading_space)


def _list_letters() -> dict[str, int]:
    """How byte-level vocabularies write bytes: those that print as Latin-1 as themselves, the others as letters from U+0100 on (GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _first_id(*candidates: int | None) -> int | None:
    return next((i for i in candidates if i is not None and i >= 0), None)
