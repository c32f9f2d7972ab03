"""Convert text to ids and back, using the tokenizer files of a checkpoint.

Supports tokenizer.json, tokenizer.model, the vocabulary in a GGUF file, and their settings files. `libraries.py` builds tokenizers from
vocabularies, `tokenizer_settings.py` reads the settings.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from model.spec.json_file import MAX_VOCABULARY_BYTES, parse_json_object, read_file_bytes, read_file_text
from model.text.gguf_vocabulary import read_gguf_tokenizer
from model.text.libraries import (
    LibraryTokenizer,
    add_tokens,
    build_llama_backend,
    build_merges,
    build_sentencepiece_backend,
    catch_library_errors,
    is_llama_like,
    list_added,
    load_json_backend,
    put_around,
)
from model.text.sentencepiece_model import BPE, CONTROL, USER_DEFINED, read_sentencepiece_model
from model.text.tokenizer_settings import AddedToken, TokenizerSettings, read_tokenizer_settings
from parallel.errors import CheckpointError, RequestError


class Tokenizer(Protocol):
    """The interface of all tokenizers."""

    bos_token_id: int | None
    """Begin-of-text id."""
    eos_token_id: int | None
    """End-of-text id."""
    pad_token_id: int | None
    """Padding id."""
    vocab_size: int
    """Largest id plus one."""
    base_size: int
    """Largest id plus one, without added tokens."""
    settings: TokenizerSettings
    """Settings from the files, including the special tokens by role, as text."""
    special_ids: frozenset[int]
    """Ids that `decode` skips by default."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with the begin token if the model was trained with it. Special tokens in the text are parsed."""
        ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD, and unknown ids are skipped."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that one token adds to a text: may start with a space or be part of a character. Empty for unknown ids."""
        ...


_FOLDER_FILES = ("tokenizer.json", "tokenizer.model")
"""In order of preference."""
_LLAMA = "LlamaTokenizer"
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""LlamaTokenizer's defaults."""
_USUAL_TOKENS = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos_token": ("</s>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "[PAD]"),
}
"""Common names of special tokens, if no settings come with tokenizer.json."""


def read_tokenizer(path: Path, *, add_bos: bool | None = None, add_eos: bool | None = None, chat_template: str | None = None) -> Tokenizer:
    """Read the tokenizer in a folder, or a single tokenizer.json, tokenizer.model or .gguf file.

    `add_bos`, `add_eos`: whether texts begin and end with these tokens; None: as its files say. `chat_template`: takes precedence over
    those of its files. Raises CheckpointError when it is missing or cannot be read.
    """
    if path.is_dir():
        path = require_vocabulary(path)
    try:
        tokenizer = {".json": _read_json_tokenizer, ".gguf": read_gguf_tokenizer}.get(path.suffix, _read_sentencepiece_tokenizer)(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: name a folder, or a tokenizer.json, tokenizer.model or .gguf file") from None
    if add_bos is not None or add_eos is not None:
        tokenizer.set_ends(add_bos, add_eos, path)
    if chat_template is not None:
        tokenizer.settings = replace(tokenizer.settings, chat_template=chat_template)
    return tokenizer


def require_vocabulary(folder: Path) -> Path:
    """Return the file of a folder that holds the vocabulary. Raises CheckpointError if there is none."""
    found = [folder / name for name in _FOLDER_FILES if os.path.lexists(folder / name)]
    if not found:
        raise CheckpointError(f"{folder} has no tokenizer: neither {' nor '.join(_FOLDER_FILES)} is there; copy one into it")
    return found[0]


def _read_json_tokenizer(path: Path) -> LibraryTokenizer:
    text = read_file_text(path, MAX_VOCABULARY_BYTES)
    backend = load_json_backend(text, path)
    settings = read_tokenizer_settings(path.parent)
    if not settings.lists_all_added:
        settings = replace(settings, added_tokens={**settings.added_tokens, **list_added(backend)})
    is_llama = settings.tokenizer_class == _LLAMA and is_llama_like(backend)
    if is_llama:
        settings = settings.with_defaults(**_LLAMA_TOKENS)
        backend = _rebuild(parse_json_object(text, path)["model"], backend, settings, path)
    if settings.extra_special_tokens is None:
        settings = replace(settings, extra_special_tokens=settings.listed_special_tokens)
    add_tokens(backend, settings, path)
    usual = {role: next((name for name in names if backend.token_to_id(name) is not None), None) for role, names in _USUAL_TOKENS.items()}
    return LibraryTokenizer(backend, settings.with_defaults(**usual), path, doubles_space=is_llama and _has_legacy_prefix(settings))


def _rebuild(model: dict[str, Any], backend: Any, settings: TokenizerSettings, path: Path) -> Any:
    """Rebuild as LlamaTokenizer does: vocabulary, merges and post-processor from tokenizer.json, its own rules for the rest."""
    merges = [(left, right) for left, right in (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])]
    with catch_library_errors(CheckpointError, f"{path}: its vocabulary cannot be used by LlamaTokenizer"):
        rebuilt = build_llama_backend(model["vocab"], merges, settings)
        if backend.post_processor is not None:
            rebuilt.post_processor = backend.post_processor
    return rebuilt


def _read_sentencepiece_tokenizer(path: Path) -> LibraryTokenizer:
    model = read_sentencepiece_model(read_file_bytes(path, MAX_VOCABULARY_BYTES), path)
    settings = read_tokenizer_settings(path.parent)
    is_llama = settings.tokenizer_class == _LLAMA and model.algorithm == BPE
    texts = [piece.text for piece in model.pieces]
    own = tuple(
        AddedToken(content=piece.text, special=piece.kind == CONTROL, normalized=False)
        for piece in model.pieces
        if piece.kind in (CONTROL, USER_DEFINED)
    )
    with catch_library_errors(CheckpointError, f"{path}: its vocabulary cannot be used"):
        if is_llama:
            vocab = {text: number for number, text in enumerate(texts)}
            backend = build_llama_backend(vocab, build_merges(texts, model), settings)
            settings = settings.with_defaults(**_LLAMA_TOKENS)
        else:
            own = tuple(token for token in own if token.special)
            names = {number: token.content for number, token in settings.added_tokens.items()}
            backend = build_sentencepiece_backend(model, legacy=settings.legacy is not False, names=names)
            if model.add_dummy_prefix:
                added = {number: replace(token, normalized=False) for number, token in settings.added_tokens.items()}
                settings = replace(settings, added_tokens=added)
            pieces = {"bos": model.bos_piece, "eos": model.eos_piece, "unk": model.unk_piece}
            ids = {"bos": model.bos_id, "eos": model.eos_id, "unk": model.unk_id}
            settings = settings.with_defaults(**{f"{role}_token": pieces[role] for role in pieces if ids[role] >= 0})
    if settings.extra_special_tokens is None:
        settings = replace(settings, extra_special_tokens=own)
    add_tokens(backend, settings, path)
    # Without tokenizer_config.json the model comes from Meta or MindFormers, which prepend the bos token to every text.
    wants_bos = settings.add_bos_token or (settings.add_bos_token is None and not settings.has_config)
    put_around(backend, settings.bos_token if wants_bos else None, settings.eos_token if settings.add_eos_token else None, path)
    return LibraryTokenizer(backend, settings, path, doubles_space=is_llama and _has_legacy_prefix(settings), joins_bytes=True)


def _has_legacy_prefix(settings: TokenizerSettings) -> bool:
    return bool(settings.legacy) and settings.add_prefix_space is not False


def continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """Return the text that `new_ids` add to a prompt. A character that starts in the prompt's last bytes belongs to the continuation."""
    before, full = tokenizer.decode(prompt_ids), tokenizer.decode([*prompt_ids, *new_ids])
    return full[_count_common(before, full) :]


def _count_common(known: str, text: str) -> int:
    """Return the length of the common prefix of two texts."""
    if text.startswith(known):
        return len(known)
    return next((i for i, (a, b) in enumerate(zip(known, text, strict=False)) if a != b), min(len(known), len(text)))


class StreamDecoder:
    """Incremental text of a growing sequence, never revised; the pieces add up to the `continuation`.

    One exception: if invalid byte tokens follow valid ones, tokenizer.json with byte fallback finally decodes all of them to U+FFFD,
    while complete characters have already been emitted.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # The window starts where the text was complete and includes earlier tokens, so that spaces are decoded as in the whole text.
        self._window = list(prompt_ids)
        self._known = tokenizer.decode(self._window)
        self._known_ids = len(self._window)
        # A prompt may end within a character; its last tokens then stay in the window until that character is complete.
        self._ends_clean = not self._known.endswith("\ufffd")

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, often empty."""
        self._window.append(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        """Return the text held back."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._tokenizer.decode(self._window)
        start = _count_common(self._known, text)
        if not final and text.endswith("\ufffd") and start < len(self._known.rstrip("\ufffd")):
            # With byte fallback, tokenizer.json decodes a whole run of byte tokens to U+FFFD while its last character is incomplete.
            return ""
        # An incomplete character decodes to one to three U+FFFD at the end.
        held = 0 if final else min(3, len(text) - len(text.rstrip("\ufffd")))
        stop = len(text) - held
        if stop <= start:
            return ""
        if held:
            self._known = text[:stop]
        else:
            if self._ends_clean:
                self._window = self._window[self._known_ids :]
            self._known_ids = len(self._window)
            self._known = self._tokenizer.decode(self._window)
            self._ends_clean = True
        return text[start:stop]


class LlamaTokenizer:
    """MindFormers' LlamaTokenizer API over any supported tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # MindFormers pads with <unk>, id 0, if no pad token is set.
        self.pad_token_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.bos_token_id, self.eos_token_id, self.vocab_size = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "LlamaTokenizer":
        """Load from a folder or file, as `read_tokenizer` does."""
        return cls(read_tokenizer(Path(path)))

    def __call__(
        self,
        text: str | Sequence[str],
        max_length: int | None = None,
        padding: str | bool | None = None,
        truncation: bool | None = None,
        add_special_tokens: bool = True,
    ) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask`: lists for one text, lists of lists for several; padded on the right.

        padding: "max_length", "longest" (or True), or none. Without padding, `max_length` truncates unless truncation is False.
        """
        single = isinstance(text, str)
        rows = [self.encode(t, add_special_tokens) for t in ([text] if isinstance(text, str) else text)]
        if max_length is not None and (truncation or (truncation is None and not padding)):
            rows = [row[:max_length] for row in rows]
        widths = {"max_length": max_length, "longest": max(map(len, rows), default=0), "none": 0}
        width = widths.get("longest" if padding is True else padding or "none")
        if width is None:
            raise RequestError(f"padding {padding!r} with max_length {max_length} is impossible: give 'longest', or 'max_length' with one")
        fill = [max(0, width - len(row)) for row in rows]
        result = {
            "input_ids": [row + [self.pad_token_id] * n for row, n in zip(rows, fill, strict=True)],
            "attention_mask": [[1] * len(row) + [0] * n for row, n in zip(rows, fill, strict=True)],
        }
        return {key: value[0] for key, value in result.items()} if single else dict(result)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of one text."""
        return self.tokenizer.encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; a special token that is kept has no space after it: `<s>I love Beijing`."""
        if skip_special_tokens:
            return self.tokenizer.decode(ids)
        text, run = "", list[int]()
        for token_id in map(int, ids):
            if token_id in self.tokenizer.special_ids:
                text += self.tokenizer.decode(run) + self.tokenizer.decode([token_id], skip_special_tokens=False)
                run = []
            else:
                run.append(token_id)
        return text + self.tokenizer.decode(run)
