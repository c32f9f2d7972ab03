"""POST /tokenize and /detokenize, as in vLLM: request bodies and answers."""

from typing import Any

from msgspec import Struct

from launcher.server.api_requests import ChatRequest, Token
from model.text.tokenizer import Tokenizer


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """A text to tokenize."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ChatRequest, frozen=True, kw_only=True):
    """A conversation to render and tokenize."""

    return_token_strs: bool = False


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    """Token ids to decode."""

    tokens: list[Token]
    model: str | None = None


def build_tokens(tokenizer: Tokenizer, ids: tuple[int, ...], max_model_len: int, *, with_texts: bool) -> dict[str, Any]:
    """Build the answer of /tokenize."""
    texts = [tokenizer.token_bytes(token).decode(errors="replace") for token in ids] if with_texts else None
    return {"count": len(ids), "max_model_len": max_model_len, "tokens": list(ids), "token_strs": texts}
