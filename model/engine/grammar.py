"""Structured output: grammars that limit the next token, parsed by llguidance.

Only rank 0 parses. It computes the masks of a step in a thread while the model runs, and `model/engine/grammar_masks.py` sends
them to the other ranks. A grammar is a string in llguidance's own JSON form. Depends on a tokenizer only for the bytes of its tokens.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from model.text.tokenizer import Tokenizer
from parallel.errors import InputError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_WORD_BYTES = 4
_LONGEST_ERROR = 300
_MARK = "\x02"
"""A character that no token shares with others."""
_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""Whitespace between the parts of a JSON text. It is bounded: a small model may otherwise write spaces until its tokens are used up."""


def require_grammars() -> None:
    """Raise RequestError if llguidance is not installed."""
    if find_spec("llguidance") is None:
        raise RequestError("structured output needs llguidance: install tandem-launcher[serve]")


class Grammars:
    """Compiles grammars for one model. Reads the tokenizer when the first grammar arrives."""

    def __init__(self, read_tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`eos_token_ids` end an answer whose grammar is complete."""
        self._read_tokenizer, self.vocab_size, self._eos_token_ids = read_tokenizer, vocab_size, list(eos_token_ids)

    def check(self, grammar: str) -> None:
        """Raise RequestError if a grammar cannot be used."""
        from llguidance import LLMatcher

        if not self._eos_token_ids:
            raise RequestError("structured output needs an end-of-sequence token, but this model has none")
        if error := LLMatcher.validate_grammar(grammar, self._tokenizer, limits=_build_limits()):
            raise RequestError(_shorten(error))

    def start(self, grammar: str) -> "GrammarState":
        """Return the parser of a new sequence. Never raises: a parser that cannot start allows no token."""
        try:
            from llguidance import LLMatcher

            return GrammarState(LLMatcher(self._tokenizer, grammar, log_level=0, limits=_build_limits()), self.vocab_size)
        except (ImportError, InputError) as error:
            return GrammarState(None, self.vocab_size, str(error))

    def compute(self, jobs: Sequence[tuple["GrammarState", tuple[int, ...]]]) -> "Future[list[bytes]]":
        """Compute in a thread, for each parser and draft, the masks before each draft token and after the last one."""
        return self._thread.submit(lambda: [mask for state, drafts in jobs for mask in state.compute_masks(drafts)])

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "grammar")

    @cached_property
    def _tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._read_tokenizer(), self.vocab_size, self._eos_token_ids)),
            n_vocab=self.vocab_size,
            eos_token=self._eos_token_ids,
        )


def _build_limits() -> "LLParserLimits":
    """Return limits within which building a client's grammar takes well under a second."""
    from llguidance import LLParserLimits

    return LLParserLimits(initial_lexer_fuel=2_000_000, max_grammar_size=200_000, verbose_errors=False)


class _Vocabulary:
    """A tokenizer in the form that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos_token_ids[0], None
        special = {*tokenizer.special_ids, *eos_token_ids}
        self.special_token_ids = sorted(token for token in special if token < vocab_size)
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        for token in self.special_token_ids:
            self.tokens[token] = self.tokens[token] or f"<|special_{token}|>".encode()
        self._mark_ids = tokenizer.encode(_MARK, False)

    def __call__(self, text: str | bytes) -> list[int]:
        # The text continues others, but SentencePiece puts a space before what it takes for a beginning.
        words, count = text if isinstance(text, str) else text.decode(errors="replace"), len(self._mark_ids)
        marked = self._tokenizer.encode(_MARK + words, False)
        return marked[count:] if marked[:count] == self._mark_ids else self._tokenizer.encode(words, False)


class GrammarState:
    """The parser of one sequence."""

    def __init__(self, matcher: "LLMatcher | None", vocab_size: int, error: str = "") -> None:
        self._matcher, self._error = matcher, error
        self._num_bytes = count_mask_bytes(vocab_size)

    @property
    def error(self) -> str:
        """Why the parser allows no token; empty while it does."""
        return self._error or (_shorten(self._matcher.get_error()) if self._matcher is not None else "")

    def accept(self, token: int) -> None:
        """Advance by a token of the answer."""
        if self._matcher is not None:
            self._matcher.consume_token(token)

    def compute_masks(self, drafts: Sequence[int] = ()) -> list[bytes]:
        """Return the mask of the next token and one more after each draft token. Draft tokens do not advance the parser.

        After a draft token that the grammar forbids, all tokens are allowed: its successors are rejected with it.
        """
        matcher = self._matcher
        if matcher is None:
            return [bytes(self._num_bytes)] * (1 + len(drafts))
        masks, num_taken = [self._compute(matcher)], 0
        for token in drafts:
            # A stopped parser accepts the end-of-sequence token any number of times, but cannot be rolled back over it.
            if num_taken < len(masks) - 1 or matcher.is_stopped() or matcher.validate_tokens([token]) != 1:
                masks.append(b"\xff" * self._num_bytes)
                continue
            matcher.consume_token(token)
            num_taken += 1
            masks.append(self._compute(matcher))
        if num_taken:
            matcher.rollback(num_taken)
        return masks

    def _compute(self, matcher: "LLMatcher") -> bytes:
        mask = matcher.compute_bitmask()[: self._num_bytes]
        return bytes(self._num_bytes) if matcher.is_error() else mask


def count_mask_bytes(vocab_size: int) -> int:
    """Return the size of a mask: one bit per token, in whole 32-bit words."""
    return -(-vocab_size // (8 * _WORD_BYTES)) * _WORD_BYTES


def grammar_of_schema(schema: dict[str, Any], spaces: dict[str, Any] | None = None) -> str:
    """Return the grammar of JSON texts that match a schema. `spaces`: llguidance's options for whitespace.

    Raises RequestError for a schema that is nested too deeply. Whether it can be used is up to `Grammars.check`.
    """
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=cast(Any, spaces or {"whitespace_pattern": _SPACE}))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema cannot be used: {_shorten(str(error))}") from None


def grammar_of_regex(pattern: str) -> str:
    """Return the grammar of texts that match a regular expression as a whole (Rust's syntax, without look-around)."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(pattern)


def grammar_of_choices(choices: Sequence[str]) -> str:
    """Return the grammar of one of several texts."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in choices))


def grammar_of_text(text: str) -> str:
    """Return a grammar given as Lark or GBNF (llama.cpp's, also called EBNF). Raises RequestError if it is neither."""
    from llguidance import grammar_from

    try:
        return grammar_from("grammar", text)
    except ValueError as error:
        raise RequestError(_shorten(str(error))) from None


def _shorten(error: str) -> str:
    """Describe a library's error in one line."""
    words = " ".join(error.split())
    return words if len(words) <= _LONGEST_ERROR else words[:_LONGEST_ERROR] + "..."
