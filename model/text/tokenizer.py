"""Text to ids and back, from the files that checkpoints bring along.

Knows tokenizer.json, tokenizer.model, the vocabulary in a GGUF file, and the settings beside them; no model, no ranks.
The two libraries behind it stand in `tokenizer_libraries.py`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from model.checkpoint.gguf_header import read_gguf_header
from model.checkpoint.gguf_vocabulary import build_byte_level_bpe, build_sentencepiece_model, find_pre_tokenizer
from model.text.libraries import JsonTokenizer, SentencePieceTokenizer, SpecialTokens, load_sentencepiece
from parallel.errors import CheckpointError, RequestError


class Tokenizer(Protocol):
    """What every tokenizer can do."""

    bos_token_id: int | None
    """Begin of a text."""
    eos_token_id: int | None
    """End of a text."""
    pad_token_id: int | None
    """Filler of unequal rows."""
    vocab_size: int
    """One more than the largest id."""
    special_ids: frozenset[int]
    """Ids that `decode` leaves out unless told otherwise."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with the begin token where the model was trained with one. Special tokens written in the text are parsed."""
        ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that spell no character become U+FFFD, unknown ids nothing."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, in UTF-8: a space before it included, or a part of a character. Unknown ids: nothing."""
        ...


_FOLDER_FILES = ("tokenizer.json", "tokenizer.model")
"""In the order of preference."""
_USUAL_TOKENS = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos_token": ("</s>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "[PAD]"),
}
"""What a token is called where no settings lie beside tokenizer.json."""


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a folder, or in one tokenizer.json, tokenizer.model or .gguf file.

    Raises CheckpointError when there is none or it cannot be read.
    """
    if path.is_dir():
        found = [path / name for name in _FOLDER_FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path} has no tokenizer: neither {' nor '.join(_FOLDER_FILES)} is there; copy one into it")
        path = found[0]
    elif not path.is_file():
        raise CheckpointError(f"{path} does not exist: name a folder, or a tokenizer.json, tokenizer.model or .gguf file")
    return {".json": _read_json_tokenizer, ".gguf": _read_gguf_tokenizer}.get(path.suffix, _read_sentencepiece_tokenizer)(path)


def _read_json_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is no tokenizer.json that the tokenizers library reads: {error}") from None
    settings = _read_settings(path.parent)
    vocab = backend.get_vocab(with_added_tokens=True)
    usual = {role: next((name for name in names if name in vocab), None) for role, names in _USUAL_TOKENS.items()}
    return JsonTokenizer(backend, _find_special_tokens({**usual, **settings}, vocab))


def _read_sentencepiece_tokenizer(path: Path) -> Tokenizer:
    settings = _read_settings(path.parent)
    decoder = settings.get("added_tokens_decoder") or {}
    added = {**_read_json(path.parent / "added_tokens.json"), **{token["content"]: int(i) for i, token in decoder.items()}}
    processor = load_sentencepiece(path.read_bytes(), path)
    ids = list(range(processor.vocab_size()))
    vocab = {**dict(zip(processor.id_to_piece(ids), ids, strict=True)), **added}
    return SentencePieceTokenizer(processor, _find_special_tokens(settings, vocab), added)


def _read_gguf_tokenizer(path: Path) -> Tokenizer:
    metadata = read_gguf_header(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    special = SpecialTokens(
        bos=metadata.get("tokenizer.ggml.bos_token_id"),
        eos=metadata.get("tokenizer.ggml.eos_token_id"),
        pad=metadata.get("tokenizer.ggml.padding_token_id"),
        add_bos=metadata.get("tokenizer.ggml.add_bos_token"),
        add_eos=metadata.get("tokenizer.ggml.add_eos_token"),
    )
    if kind == "llama":
        return SentencePieceTokenizer(load_sentencepiece(build_sentencepiece_model(metadata), path), special)
    if kind == "gpt2":
        if special.add_bos is None:
            special = replace(special, add_bos=find_pre_tokenizer(metadata).add_bos)
        return JsonTokenizer(build_byte_level_bpe(metadata), special)
    raise CheckpointError(f"{path}: tokenizer.ggml.model is {kind!r}, but only 'llama' and 'gpt2' can be read: give a tokenizer.json")


def _read_settings(folder: Path) -> dict[str, Any]:
    """What lies beside a tokenizer; tokenizer_config.json wins over special_tokens_map.json."""
    return {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, but a JSON object is needed")
    return raw


def _find_special_tokens(settings: dict[str, Any], vocab: dict[str, int]) -> SpecialTokens:
    def find_id(role: str) -> int | None:
        token = settings.get(role)
        # A token is written as its text, or as a dictionary with the text under "content".
        text = token.get("content") if isinstance(token, dict) else token
        return vocab.get(text) if isinstance(text, str) else None

    return SpecialTokens(
        bos=find_id("bos_token"),
        eos=find_id("eos_token"),
        pad=find_id("pad_token"),
        add_bos=settings.get("add_bos_token"),
        add_eos=settings.get("add_eos_token"),
    )


def continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """What `new_ids` add to the text of a prompt. A character that the prompt's last bytes only begin belongs to the continuation."""
    before, full = tokenizer.decode(prompt_ids), tokenizer.decode([*prompt_ids, *new_ids])
    return full[_count_common(before, full) :]


def _count_common(known: str, text: str) -> int:
    """Characters that two texts begin with together."""
    if text.startswith(known):
        return len(known)
    return next((i for i, (a, b) in enumerate(zip(known, text, strict=False)) if a != b), min(len(known), len(text)))


class StreamDecoder:
    """Text of a growing sequence, piece by piece, never taken back; all pieces together are the `continuation`.

    The one exception: where byte tokens that spell no character follow on ones that do, tokenizer.json with byte fallback decodes
    them all to U+FFFD in the end; what was complete before stays as it was given out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # A window that begins where text was complete: its first tokens are known, so that spaces come out as within the whole.
        self._window = list(prompt_ids)
        self._known = tokenizer.decode(self._window)
        self._known_ids = len(self._window)
        # A prompt can end within a character; then its tokens stay in the window until they are no longer the last ones known.
        self._ends_clean = not self._known.endswith("\ufffd")

    def push(self, token_id: int) -> str:
        """The text that this token completes, often empty."""
        self._window.append(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._tokenizer.decode(self._window)
        start = _count_common(self._known, text)
        if not final and text.endswith("\ufffd") and start < len(self._known.rstrip("\ufffd")):
            # tokenizer.json with byte fallback shows a whole run of byte tokens as U+FFFD while its last character is unfinished.
            return ""
        # An unfinished character shows as one to three U+FFFD at the end.
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
    """The calls of MindFormers' LlamaTokenizer, over any tokenizer that can be read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # MindFormers fills with <unk>, id 0, where no pad token is set.
        self.pad_token_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.bos_token_id, self.eos_token_id, self.vocab_size = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "LlamaTokenizer":
        """From a folder or file, as `read_tokenizer`."""
        return cls(read_tokenizer(Path(path)))

    def __call__(
        self,
        text: str | Sequence[str],
        max_length: int | None = None,
        padding: str | bool | None = None,
        truncation: bool | None = None,
        add_special_tokens: bool = True,
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask`: lists for one text, lists of lists for several; filled on the right.

        padding: "max_length", "longest" (or True), or none. Without padding a `max_length` cuts, unless truncation is False.
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
        """Ids of one text."""
        return self.tokenizer.encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids; a special token that is kept stands right before the word after it: `<s>I love Beijing`."""
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
