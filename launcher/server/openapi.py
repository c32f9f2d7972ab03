"""The description of the HTTP API, GET /openapi.json, derived from the types of request bodies."""

from functools import cache
from typing import Any

from msgspec.json import schema_components

from launcher.server.api_requests import ChatRequest, CompletionRequest
from launcher.server.messages_requests import MessagesRequest
from launcher.server.responses_requests import ResponsesRequest
from launcher.server.token_requests import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest

_BODIES: dict[str, tuple[tuple[type, ...], str]] = {
    "/v1/completions": ((CompletionRequest,), "Continue one or many prompts"),
    "/v1/chat/completions": ((ChatRequest,), "Answer a conversation"),
    "/v1/responses": ((ResponsesRequest,), "Answer an input, in the form of OpenAI's Responses API"),
    "/v1/messages": ((MessagesRequest,), "Answer a conversation, in the form of Anthropic's Messages API"),
    "/tokenize": ((TokenizeRequest, TokenizeChatRequest), "Convert a text or a conversation to token ids"),
    "/detokenize": ((DetokenizeRequest,), "Convert token ids to text"),
}
_READS = {
    "/v1/models": "The served model",
    "/health": "200 while every rank responds, otherwise 503",
    "/ping": "The same, without a body",
    "/metrics": "Metrics for Prometheus",
    "/status": "State of ranks and requests",
    "/version": "Version of the server",
}
_ANSWER = {"200": {"description": "the answer"}, "400": {"description": "the request cannot be answered; error.message says why"}}


@cache
def describe_routes(version: str) -> dict[str, Any]:
    """Build the OpenAPI 3.1 document."""
    kinds = [kind for some, _ in _BODIES.values() for kind in some]
    schemas, components = schema_components(kinds, ref_template="#/components/schemas/{name}")
    by_kind = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Any] = {path: {"get": {"summary": words, "responses": {"200": _ANSWER["200"]}}} for path, words in _READS.items()}
    for path, (some, words) in _BODIES.items():
        schema = by_kind[some[0]] if len(some) == 1 else {"anyOf": [by_kind[kind] for kind in some]}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"summary": words, "requestBody": body, "responses": _ANSWER}}
    return {"openapi": "3.1.0", "info": {"title": "tandem", "version": version}, "paths": paths, "components": {"schemas": components}}
