"""HTTP routes: the APIs of OpenAI and Anthropic, tokenization, health, metrics, status, and the status page."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from launcher.server.completion import Service
from launcher.server.completion_writer import AnswerWriter, CompletionWriter
from launcher.server.engine_client import EngineClient
from launcher.server.errors import ServiceError, server_failed
from launcher.server.guard import App, Guard, Limits
from launcher.server.messages_writer import MessagesWriter, build_error
from launcher.server.openapi import describe_routes
from launcher.server.page_files import CONTENT_SECURITY_POLICY, PageFile, read_page_files
from launcher.server.request_planner import PlannedRequest
from launcher.server.responses_writer import ResponsesWriter
from parallel.errors import RequestError

MESSAGES_ROUTE = "/v1/messages"
_ROUTES = (
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    MESSAGES_ROUTE,
    "/tokenize",
    "/detokenize",
    "/health",
    "/ping",
    "/metrics",
    "/status",
    "/version",
    "/openapi.json",
    "/",
)

_FOREIGN_ROUTES = ("/v1/embeddings", "/v1/score", "/v1/rerank", "/rerank", "/score", "/pooling", "/classify")
"""Routes of vLLM for models that do not generate text."""


def build_app(service: Service, limits: Limits, allowed_origins: Sequence[str] = ()) -> App:
    """Build the ASGI application. `allowed_origins` lists the CORS origins allowed to send requests; by default browsers block all
    others."""
    app = FastAPI(title="tandem", version=service.front.served.version, docs_url=None, redoc_url=None, openapi_url=None)
    front, writer = service.front, CompletionWriter(service.tokenizer)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe_model(front, name) for name in (front.served.name, *front.served.adapters)]}

    @app.get("/v1/models/{name:path}")
    async def describe_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _describe_model(front, name)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(await service.plan_completion(await request.body()), request, writer)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(await service.plan_chat(await request.body()), request, writer)

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        body, asked = await service.plan_response(await request.body())
        return await answer(asked, request, ResponsesWriter(body, service.tokenizer))

    @app.post(MESSAGES_ROUTE)
    async def message(request: Request) -> Response:
        return await answer(await service.plan_message(await request.body()), request, MessagesWriter())

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        return await service.tokenize(await request.body())

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        return await service.detokenize(await request.body())

    async def answer(asked: PlannedRequest, request: Request, writer: AnswerWriter) -> Response:
        if asked.is_stream:
            return service.stream(asked, request, writer)
        return Response(await service.run(asked, request, writer), media_type="application/json")

    @app.get("/health")
    async def health() -> JSONResponse:
        word = front.health
        return JSONResponse({"status": word}, 200 if word == "ok" else 503)

    for path in _FOREIGN_ROUTES:
        app.add_api_route(path, _refuse_foreign, methods=["POST"])

    @app.api_route("/ping", methods=["GET", "POST"])
    async def ping() -> Response:
        return Response(status_code=200 if front.health == "ok" else 503)

    @app.get("/openapi.json")
    async def describe_api() -> dict[str, Any]:
        return describe_routes(front.served.version)

    @app.get("/version")
    async def tell_version() -> dict[str, str]:
        return {"version": front.served.version}

    @app.get("/status")
    async def status() -> dict[str, Any]:
        return front.describe() | {"system_prompt": service.system_prompt}

    @app.get("/metrics")
    async def metrics() -> Response:
        front.update_metrics()
        return Response(front.metrics.write(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, file in read_page_files().items():
        app.add_api_route(path, _give_file(file), methods=["GET"])

    @app.exception_handler(ServiceError)
    async def refuse(request: Request, error: ServiceError) -> JSONResponse:
        content = build_error(error) if request.url.path == MESSAGES_ROUTE else error.to_json()
        return JSONResponse(content, error.status, error.headers)

    @app.exception_handler(RequestError)
    async def refuse_prompt(request: Request, error: RequestError) -> JSONResponse:
        return await refuse(request, ServiceError(400, str(error)))

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: f"there is no {request.method} {request.url.path[:100]} here", 405: f"{request.method} is not taken here"}
        message = words.get(error.status_code, str(error.detail))
        return JSONResponse(ServiceError(error.status_code, message).to_json(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:  # the guard logs the cause to standard error
        return JSONResponse(server_failed().to_json(), 500)

    def count(path: str, status: int) -> None:
        front.metrics.count_request(path if path in _ROUTES else "other", status)

    guard = Guard(app, limits, count)
    if not allowed_origins:
        return guard
    # CORS wraps the guard: pages must be able to read a rejection, and preflight requests carry no key.
    return CORSMiddleware(guard, allow_origins=list(allowed_origins), allow_methods=["*"], allow_headers=["*"])


def _describe_model(front: EngineClient, name: str) -> dict[str, Any]:
    """`name`: of the base model, or of a LoRA adapter, whose parent it is."""
    served = front.served
    return {
        "id": name,
        "object": "model",
        "created": front.created,
        "owned_by": "tandem",
        "root": name,
        "parent": None if name == served.name else served.name,
        "max_model_len": served.job.context_tokens,
    }


async def _refuse_foreign(request: Request) -> Response:
    raise ServiceError(404, f"{request.url.path} is not supported: this server only generates text", code="not_supported")


def _give_file(file: PageFile) -> Any:
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    async def give() -> Response:
        return Response(file.content, media_type=file.content_type, headers=headers)

    return give
