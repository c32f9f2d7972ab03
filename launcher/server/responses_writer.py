"""OpenAI's response objects of /v1/responses, whole and as the events of a stream."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from launcher.server.api_answers import Piece, build_chat_logprobs
from launcher.server.errors import ServiceError
from launcher.server.request_planner import PlannedRequest
from launcher.server.responses_requests import ResponsesRequest
from model.text.tokenizer import Tokenizer
from model.text.tool_calls import AnswerPart, CallArguments, CallStart, Reasoning, Text

_DELTAS = {
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
    "reasoning": "response.reasoning_text",
}
"""Beginning of the names of events about an item's text."""


class ResponsesWriter:
    """Writes the answer to one request."""

    def __init__(self, body: ResponsesRequest, tokenizer: Tokenizer) -> None:
        self._body, self._tokenizer = body, tokenizer
        self._id, self._created = _new_id("resp"), int(time.time())
        self._items: list[dict[str, Any]] = []
        self._number = -1

    def build(self, asked: PlannedRequest, pieces: Sequence[Sequence[Piece]]) -> bytes:
        """Return the JSON of a complete answer."""
        for piece in pieces[0]:
            for part in piece.parts:
                self._take(part)
        if asked.logprobs is not None:
            tokens = [token for piece in pieces[0] for token in piece.tokens]
            for item in self._items:
                if item["type"] == "message":
                    item["content"][0]["logprobs"] = build_chat_logprobs(self._tokenizer, tokens)["content"]
        return msgspec.json.encode(self._describe(asked, pieces[0][-1].finish_reason))

    async def write_events(self, asked: PlannedRequest, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        try:
            for kind in ("response.created", "response.in_progress"):
                yield self._event(kind, response=self._describe(asked, None))
            async for _, piece in pieces:
                for part in piece.parts:
                    for event in self._follow(part):
                        yield event
                if piece.finish_reason:
                    for event in self._close_item():
                        yield event
                    answer = self._describe(asked, piece.finish_reason)
                    yield self._event(f"response.{answer['status']}", response=answer)
        except ServiceError as error:
            detail = error.to_json()["error"]
            yield self._event("error", message=detail["message"], code=detail["code"], param=detail["param"])

    def _take(self, part: AnswerPart) -> tuple[dict[str, Any], bool]:
        """Add a part to the items; returns its item and whether that is new."""
        kind = {Text: "message", Reasoning: "reasoning", CallStart: "function_call", CallArguments: "function_call"}[type(part)]
        is_new = isinstance(part, CallStart) or not self._items or self._items[-1]["type"] != kind
        if is_new:
            self._items.append(_new_item(kind, part.name if isinstance(part, CallStart) else ""))
        item = self._items[-1]
        if isinstance(part, CallArguments):
            item["arguments"] += part.text
        elif not isinstance(part, CallStart):
            item["content"][0]["text"] += part.text
        return item, is_new

    def _follow(self, part: AnswerPart) -> list[bytes]:
        """Return the events of one part."""
        last = self._items[-1]["type"] if self._items else None
        kind = {Text: "message", Reasoning: "reasoning"}.get(type(part), "function_call")
        events = self._close_item() if last is not None and (kind != last or isinstance(part, CallStart)) else []
        item, is_new = self._take(part)
        place = len(self._items) - 1
        if is_new:
            events.append(self._event("response.output_item.added", output_index=place, item=_empty(item)))
            if item["type"] != "function_call":
                part_type = {**item["content"][0], "text": ""}
                events.append(
                    self._event("response.content_part.added", item_id=item["id"], output_index=place, content_index=0, part=part_type)
                )
        if not isinstance(part, CallStart):
            more: dict[str, Any] = {} if item["type"] == "function_call" else {"content_index": 0}
            more |= {"logprobs": []} if item["type"] == "message" else {}
            name = f"{_DELTAS[item['type']]}.delta"
            events.append(self._event(name, item_id=item["id"], output_index=place, delta=part.text, **more))
        return events

    def _close_item(self) -> list[bytes]:
        """Return the events that end the last item."""
        if not self._items or self._items[-1]["status"] == "completed":
            return []
        item, place = self._items[-1], len(self._items) - 1
        item["status"] = "completed"
        where = {"item_id": item["id"], "output_index": place}
        name = f"{_DELTAS[item['type']]}.done"
        if item["type"] == "function_call":
            events = [self._event(name, **where, name=item["name"], arguments=item["arguments"])]
        else:
            content = item["content"][0]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            events = [
                self._event(name, **where, content_index=0, text=content["text"], **more),
                self._event("response.content_part.done", **where, content_index=0, part=content),
            ]
        return [*events, self._event("response.output_item.done", output_index=place, item=item)]

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        value = {"type": kind, "sequence_number": self._number, **fields}
        return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n".encode()

    def _describe(self, asked: PlannedRequest, reason: str | None) -> dict[str, Any]:
        """Build the response object; `reason` is None while the answer is not complete."""
        body, is_cut = self._body, reason == "length"
        status = "in_progress" if reason is None else "incomplete" if is_cut else "completed"
        for item in self._items if reason is not None else ():
            item["status"] = "completed"
        if is_cut and self._items:
            self._items[-1]["status"] = "incomplete"
        new_tokens, prompt_tokens = sum(text.num_tokens for text in asked.texts), sum(map(len, asked.prompts))
        usage = {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": new_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + new_tokens,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": asked.naming.model,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": msgspec.to_builtins(body.text) if body.text and body.text.format else {"format": {"type": "text"}},
            "tool_choice": msgspec.to_builtins(body.tool_choice) if body.tool_choice is not None else "auto",
            "tools": msgspec.to_builtins(body.tools),
            "top_p": body.top_p,
            "top_logprobs": body.top_logprobs,
            "truncation": "disabled",
            "usage": None if reason is None else usage,
            "user": None,
            "metadata": body.metadata,
        }


def _new_item(kind: str, name: str) -> dict[str, Any]:
    if kind == "function_call":
        ids = {"id": _new_id("fc"), "call_id": _new_id("call")}
        return {"type": kind, **ids, "name": name, "arguments": "", "status": "in_progress"}
    if kind == "reasoning":
        thought = [{"type": "reasoning_text", "text": ""}]
        return {"type": kind, "id": _new_id("rs"), "summary": [], "content": thought, "status": "in_progress"}
    content: list[dict[str, Any]] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
    return {"type": kind, "id": _new_id("msg"), "role": "assistant", "content": content, "status": "in_progress"}


def _empty(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "arguments": ""} if item["type"] == "function_call" else {**item, "content": []}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
