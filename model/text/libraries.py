"""Build every kind of vocabulary as a tokenizer of the `tokenizers` library, and wrap it as a Tokenizer of `model/text/tokenizer.py`.

Built as in transformers 5, so that ids are the same. The library is imported lazily, since only the rank that reads prompts needs it.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.spec.quoting import quote, quote_name
from model.text.sentencepiece_model import BPE, NORMAL, USER_DEFINED, SentencePieceModel
from model.text.tokenizer_settings import AddedToken, TokenizerSettings
from parallel.errors import CheckpointError, InputError, RequestError

if TYPE_CHECKING:
    import tokenizers

_SPACE = "▁"
_LONG_TEXT = 4096
"""Minimum length in characters of a text to encode with the library's batch call, which releases the GIL."""


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        settings: TokenizerSettings,
        source: Path,
        *,
        doubles_space: bool = False,
        joins_bytes: bool = False,
    ) -> None:
        """`backend` already holds all tokens of `settings`. Raises CheckpointError when it cannot encode.

        `doubles_space`: add the prefix also to a text that starts with a space, as Llama 2's own tokenizer does. Metaspace, and so
        transformers 5, omits it there, and the text loses a space. `joins_bytes`: decode as SentencePiece does, where only invalid bytes
        become U+FFFD; the library replaces the whole run of bytes around them.
        """
        self.settings, self._backend, self._doubles_space = settings, backend, doubles_space
        self._bytes: dict[int, bytes] = {}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = map(
            self._find_id, (settings.bos_token, settings.eos_token, settings.pad_token)
        )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = settings.split_special_tokens
        self.base_size = max(backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._joins_bytes, self._leading_space = joins_bytes, " " if "Strip" in repr(backend.decoder) else ""
        self._letters = _list_letters() if _is_byte_level(backend) else None
        with _silence_panics(), catch_library_errors(CheckpointError, f"{source} cannot be used as a tokenizer"):
            backend.decode(backend.encode("a 1.").ids)

    def set_ends(self, add_bos: bool | None, add_eos: bool | None, source: Path) -> None:
        """Set whether texts begin with the begin token and end with the end token; None leaves it as the files say.

        Raises CheckpointError when there is no such token. `source` names the file in messages.
        """
        plain, ends = self.encode("a", add_special_tokens=False), self.encode("a")
        first, last = ends[: len(ends) - len(plain)], ends[len(plain) :]
        wants_bos = self.bos_token_id in first if add_bos is None else add_bos
        wants_eos = self.eos_token_id in last if add_eos is None else add_eos
        for wanted, number, role in ((wants_bos, self.bos_token_id, "bos_token"), (wants_eos, self.eos_token_id, "eos_token")):
            if wanted and number is None:
                raise CheckpointError(f"{source} has no {role}, but the settings add one to every text")
        put_around(self._backend, self.settings.bos_token if wants_bos else None, self.settings.eos_token if wants_eos else None, source)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text. Raises RequestError for a text that cannot be encoded."""
        if self._doubles_space and text.startswith((" ", _SPACE)):
            text = _SPACE + text
        with catch_library_errors(RequestError, "the tokenizer cannot encode this text"):
            if len(text) > _LONG_TEXT:
                return list(self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids."""
        if self._joins_bytes:
            left_out = self.special_ids if skip_special_tokens else frozenset()
            data = b"".join(self.token_bytes(i) for i in map(int, ids) if i not in left_out)
            text = re.sub("[\udc80-\udcff]", "\ufffd", data.decode("utf-8", errors="surrogateescape"))
            return text.removeprefix(self._leading_space)
        with catch_library_errors(RequestError, "the tokenizer cannot decode these ids"):
            return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token adds to a text."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def to_json(self) -> str:
        """Serialize to a tokenizer.json that loads as this tokenizer."""
        return self._backend.to_str()

    def _spell(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            return b""
        if token_id in self._added_ids:
            return str(token).encode()
        if self._letters is not None:
            return b"".join(bytes([self._letters[letter]]) if letter in self._letters else letter.encode() for letter in token)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else str(token).replace(_SPACE, " ").encode()

    def _find_id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)


@contextmanager
def catch_library_errors(kind: type[InputError], words: str) -> Iterator[None]:
    """Raise errors of the library as `kind`: it has no exception types, and its panics are not even Exceptions."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise kind(f"{words}: {quote_name(str(error)[:200])}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{words}: the tokenizers library failed on it") from None


@contextmanager
def _silence_panics() -> Iterator[None]:
    """Suppress the library's own stack traces on standard error; its errors are reported."""
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def load_json_backend(text: str, path: Path) -> "tokenizers.Tokenizer":
    """Load a tokenizer.json. Raises CheckpointError."""
    from tokenizers import Tokenizer

    with _silence_panics(), catch_library_errors(CheckpointError, f"{path} is not a tokenizer.json that the tokenizers library can read"):
        return Tokenizer.from_str(text)


def is_llama_like(backend: "tokenizers.Tokenizer") -> bool:
    """Return whether Hugging Face's LlamaTokenizer can use this vocabulary: a BPE that is not byte-level."""
    return type(backend.model).__name__ == "BPE" and not _is_byte_level(backend)


def list_added(backend: "tokenizers.Tokenizer") -> dict[int, AddedToken]:
    """Return the added tokens of a backend by id."""
    names = ("content", "special", "normalized", "lstrip", "rstrip", "single_word")
    found = backend.get_added_tokens_decoder().items()
    return {number: AddedToken(**{name: getattr(token, name) for name in names}) for number, token in found}


def build_llama_backend(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], settings: TokenizerSettings) -> "tokenizers.Tokenizer":
    """Build a vocabulary with the rules of Hugging Face's LlamaTokenizer; it ignores normalizers too.

    With `legacy`, its LibraryTokenizer doubles a leading space.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE(dict(vocab), list(merges), fuse_unk=True, byte_fallback=True))
    prefixed = settings.add_prefix_space is not False
    scheme = "never" if not prefixed else "always" if settings.legacy else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)] if prefixed else steps)
    return backend


def build_merges(texts: Sequence[str], model: SentencePieceModel) -> list[tuple[str, str]]:
    """Return all pairs of normal pieces that form a normal piece, best score first. `texts`: the pieces' texts."""
    ranks = {
        text: (-piece.score, number) for number, (text, piece) in enumerate(zip(texts, model.pieces, strict=True)) if piece.kind == NORMAL
    }
    pairs = sorted(
        (*rank, text[:at], text[at:])
        for text, rank in ranks.items()
        for at in range(1, len(text))
        if text[:at] in ranks and text[at:] in ranks
    )
    return [(left, right) for _, _, left, right in pairs]


def build_sentencepiece_backend(
    model: SentencePieceModel, *, legacy: bool, names: Mapping[int, str] | None = None
) -> "tokenizers.Tokenizer":
    """Build a vocabulary with SentencePiece's rules. `legacy`: prefix every text between special tokens with a space. `names`: renamed
    pieces.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    texts = _rename([piece.text for piece in model.pieces], names or {})
    own = [text for text, piece in zip(texts, model.pieces, strict=True) if piece.kind == USER_DEFINED]
    if model.algorithm == BPE:
        vocab = {text: number for number, text in enumerate(texts)}
        bpe = models.BPE(
            vocab,
            build_merges(texts, model),
            unk_token=model.unk_piece,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=bool(own),
        )
        backend = Tokenizer(bpe)
    else:
        scores = [(text, piece.score) for text, piece in zip(texts, model.pieces, strict=True)]
        backend = Tokenizer(models.Unigram(scores, unk_id=model.unk_id, byte_fallback=model.byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if model.add_dummy_prefix and legacy:
        # Metaspace adds no prefix to a text that starts with one; SentencePiece does.
        steps.append(normalizers.Replace(Regex(rf"\A{_SPACE}"), _SPACE * 2))
    backend.normalizer = normalizers.Sequence(steps)
    splits: list[Any] = []
    if model.add_dummy_prefix:
        splits.append(pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always" if legacy else "first", split=False))
    if own:
        pattern = "|".join(re.escape(text) for text in sorted(own, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    ends: list[Any] = [decoders.Replace(_SPACE, " ")]
    if model.byte_fallback:
        ends.append(decoders.ByteFallback())
    if model.add_dummy_prefix:
        ends += [decoders.Fuse(), decoders.Strip(" ", left=1)]
    elif model.byte_fallback:
        ends.append(decoders.Fuse())
    backend.decoder = decoders.Sequence(ends)
    return backend


def add_tokens(backend: "tokenizers.Tokenizer", settings: TokenizerSettings, source: Path) -> None:
    """Add the tokens of the settings. Raises CheckpointError when one gets another id than the files declare."""
    from tokenizers import AddedToken as LibraryToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    with catch_library_errors(CheckpointError, f"{source}: its special and added tokens cannot be used"):
        backend.add_tokens(
            [
                LibraryToken(
                    token.content,
                    special=token.special,
                    normalized=not token.special if token.normalized is None else token.normalized,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                )
                for token in settings.list_tokens(known)
            ]
        )
    for number, token in settings.added_tokens.items():
        found = backend.token_to_id(token.content)
        if found != number and token.content:
            raise CheckpointError(
                f"{source}: the added token {quote(token.content)} is declared with id {number}, but in this vocabulary it has id {found}; "
                "correct added_tokens_decoder in tokenizer_config.json, or added_tokens.json"
            )


def put_around(backend: "tokenizers.Tokenizer", before: str | None, after: str | None, source: Path) -> None:
    """Put these tokens before and after every text. Raises CheckpointError when the vocabulary lacks them."""
    from tokenizers import processors

    ids = {token: backend.token_to_id(token) for token in (before, after) if token is not None}
    missing = next((token for token, number in ids.items() if number is None), None)
    if missing is not None:
        raise CheckpointError(f"{source}: texts are to begin or end with the token {quote(missing)}, which is not in the vocabulary")
    single = [*([before] if before in ids else []), "$A", *([after] if after in ids else [])]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))


def _rename(texts: Sequence[str], names: Mapping[int, str]) -> list[str]:
    """Rename placeholder pieces to the added tokens, unless another piece already has the name."""
    kept = {text for number, text in enumerate(texts) if number not in names}
    return [names[number] if names.get(number, text) not in kept and number in names else text for number, text in enumerate(texts)]


def _is_byte_level(backend: "tokenizers.Tokenizer") -> bool:
    return "ByteLevel" in repr(backend.decoder) or "ByteLevel" in repr(backend.pre_tokenizer)


def _list_letters() -> dict[str, int]:
    """Return GPT-2's characters for the 256 bytes: printable Latin-1 as itself, the others as letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
