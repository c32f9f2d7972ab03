"""HTTP routes: OpenAI's models, completions and chat completions; health, metrics, status, and the status page."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from launcher.server.completion import Service
from launcher.server.engine_client import EngineClient
from launcher.server.errors import ServiceError, server_failed
from launcher.server.guard import App, Guard, Limits
from launcher.server.page_files import CONTENT_SECURITY_POLICY, PageFile, read_page_files
from launcher.server.request_planner import PlannedRequest
from parallel.errors import RequestError

_ROUTES = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics", "/status", "/version", "/")


def build_app(service: Service, limits: Limits, allowed_origins: Sequence[str] = ()) -> App:
    """Build the ASGI application. `allowed_origins` lists the CORS origins allowed to send requests; by default browsers block all
    others."""
    app = FastAPI(title="tandem", version=service.front.served.version, docs_url=None, redoc_url=None, openapi_url=None)
    front = service.front

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe_model(front)]}

    @app.get("/v1/models/{name:path}")
    async def describe_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _describe_model(front)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(await service.plan_completion(await request.body()), request)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(await service.plan_chat(await request.body()), request)

    async def answer(asked: PlannedRequest, request: Request) -> Response:
        if asked.is_stream:
            return service.stream(asked, request)
        return Response(await service.run(asked, request), media_type="application/json")

    @app.get("/health")
    async def health() -> JSONResponse:
        word = front.health
        return JSONResponse({"status": word}, 200 if word == "ok" else 503)

    @app.get("/version")
    async def tell_version() -> dict[str, str]:
        return {"version": front.served.version}

    @app.get("/status")
    async def status() -> dict[str, Any]:
        return front.describe()

    @app.get("/metrics")
    async def metrics() -> Response:
        front.update_metrics()
        return Response(front.metrics.write(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, file in read_page_files().items():
        app.add_api_route(path, _give_file(file), methods=["GET"])

    @app.exception_handler(ServiceError)
    async def refuse(request: Request, error: ServiceError) -> JSONResponse:
        return JSONResponse(error.to_json(), error.status, error.headers)

    @app.exception_handler(RequestError)
    async def refuse_prompt(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(ServiceError(400, str(error)).to_json(), 400)

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


def _describe_model(front: EngineClient) -> dict[str, Any]:
    served = front.served
    return {
        "id": served.name,
        "object": "model",
        "created": front.created,
        "owned_by": "tandem",
        "max_model_len": served.job.context_tokens,
    }


def _give_file(file: PageFile) -> Any:
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    async def give() -> Response:
        return Response(file.content, media_type=file.content_type, headers=headers)

    return give
