"""Anthropic's message objects, whole and as the events of a stream."""

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from launcher.server.api_answers import Piece
from launcher.server.errors import ServiceError
from launcher.server.messages_requests import read_arguments
from launcher.server.request_planner import PlannedRequest
from model.text.tool_calls import AnswerPart, CallArguments, CallStart, Reasoning

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesWriter:
    """Writes the answer to one request."""

    def __init__(self) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._blocks: list[dict[str, Any]] = []

    def build(self, asked: PlannedRequest, pieces: Sequence[Sequence[Piece]]) -> bytes:
        """Return the JSON of a complete answer."""
        arguments: list[str] = []
        for part in (part for piece in pieces[0] for part in piece.parts):
            if self._opens(part):
                self._blocks.append(_new_block(part))
                arguments.append("")
            key, text = _read_delta(part)
            if key == "partial_json":
                arguments[-1] += text
            elif key:
                self._blocks[-1][key] += text
        for block, text in zip(self._blocks, arguments, strict=True):
            if block["type"] == "tool_use":
                block["input"] = read_arguments(text)
        reason, sequence = self._read_reason(pieces[0][-1])
        usage = {"input_tokens": sum(map(len, asked.prompts)), "output_tokens": _count(asked)}
        return msgspec.json.encode(
            {**self._head(asked), "content": self._blocks, "stop_reason": reason, "stop_sequence": sequence, "usage": usage}
        )

    async def write_events(self, asked: PlannedRequest, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        usage = {"input_tokens": sum(map(len, asked.prompts)), "output_tokens": 0}
        try:
            message = {**self._head(asked), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
            yield _event("message_start", message=message)
            async for _, piece in pieces:
                for part in piece.parts:
                    if self._opens(part):
                        if self._blocks:
                            yield _event("content_block_stop", index=len(self._blocks) - 1)
                        self._blocks.append(_new_block(part))
                        yield _event("content_block_start", index=len(self._blocks) - 1, content_block=self._blocks[-1])
                    key, text = _read_delta(part)
                    if key:
                        kind = {"text": "text_delta", "thinking": "thinking_delta", "partial_json": "input_json_delta"}[key]
                        yield _event("content_block_delta", index=len(self._blocks) - 1, delta={"type": kind, key: text})
                if piece.finish_reason:
                    if self._blocks:
                        yield _event("content_block_stop", index=len(self._blocks) - 1)
                    reason, sequence = self._read_reason(piece)
                    delta = {"stop_reason": reason, "stop_sequence": sequence}
                    yield _event("message_delta", delta=delta, usage={**usage, "output_tokens": _count(asked)})
                    yield _event("message_stop")
        except ServiceError as error:
            yield _event("error", error=build_error(error)["error"])

    def _opens(self, part: AnswerPart) -> bool:
        """Whether a part begins a new block."""
        if isinstance(part, CallStart) or not self._blocks:
            return True
        kind = "tool_use" if isinstance(part, CallArguments) else "thinking" if isinstance(part, Reasoning) else "text"
        return bool(self._blocks[-1]["type"] != kind)

    def _read_reason(self, last: Piece) -> tuple[str, str | None]:
        if isinstance(last.stop_reason, str) and last.finish_reason == "stop":
            return "stop_sequence", last.stop_reason
        has_calls = any(block["type"] == "tool_use" for block in self._blocks)
        reason = "tool_calls" if last.finish_reason == "stop" and has_calls else str(last.finish_reason)
        return _REASONS[reason], None

    def _head(self, asked: PlannedRequest) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": asked.naming.model}


def build_error(error: ServiceError) -> dict[str, Any]:
    """Build Anthropic's error object."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.to_json()["error"]["message"]}}


def _new_block(part: AnswerPart) -> dict[str, Any]:
    if isinstance(part, CallStart):
        return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": part.name, "input": {}}
    if isinstance(part, Reasoning):
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _read_delta(part: AnswerPart) -> tuple[str, str]:
    """Return the field that a part extends, empty if none, and the text."""
    if isinstance(part, CallStart):
        return "", ""
    return "partial_json" if isinstance(part, CallArguments) else "thinking" if isinstance(part, Reasoning) else "text", part.text


def _count(asked: PlannedRequest) -> int:
    return sum(text.num_tokens for text in asked.texts)


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False, allow_nan=False)}\n\n".encode()
