"""The FastAPI app: routes, middleware, and the errors of both."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from vlmport import __version__
from vlmport.errors import VlmportError, cut
from vlmport.serve import caption, chat, responses
from vlmport.serve.api_errors import ErrorBody, RequestError, response_of
from vlmport.serve.caption import CaptionRequest
from vlmport.serve.docs_page import HEADERS, docs_page
from vlmport.serve.guard import Guard, Watcher
from vlmport.serve.log import Log
from vlmport.serve.metrics import CONTENT_TYPE, Metrics
from vlmport.serve.models import Load, Models
from vlmport.serve.page import add_page
from vlmport.serve.remote_images import Policy, RemoteImages
from vlmport.serve.responses_schemas import ResponsesRequest
from vlmport.serve.schemas import ChatRequest
from vlmport.serve.service import Service, read_json
from vlmport.serve.settings import Settings
from vlmport.serve.waiting import while_there

SEND_SECONDS = 60.0  # a client that reads nothing for this time has left
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request can't be served."},
    "5XX": {"model": ErrorBody, "description": "The server can't serve the request."},
}


def create_app(
    sources: Mapping[str, str],
    settings: Settings | None = None,
    *,
    log: Log | None = None,
    load: Load | None = None,
) -> FastAPI:
    """Make the app of a server.

    Args:
        sources: name in the API → a built-in name, a bundle, a checkpoint or a Hub id.
        settings: what is allowed and limited.
        log: where requests are logged.
        load: opens a source; `vlmport.load` by default.

    Raises OptionError for a host of allow_images_from that is none.
    """
    settings, log, metrics = settings or Settings(), log or Log(), Metrics()
    policy = Policy(settings.allow_images_from, max_bytes=settings.max_image_bytes)
    remote = RemoteImages(policy)
    models = Models(sources, settings, load=load, watch=metrics.watch)
    metrics.of_models(lambda: [(one.name, one.scheduler.stats()) for one in models.open_models])
    service = Service(settings, models, remote, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await models.close(0)
        remote.close()

    app = FastAPI(
        title="vlmport",
        version=__version__,
        description="Vision-language models, with OpenAI's API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry={"auto_configure": False},  # the environment must not make it report requests
        responses=ERRORS,
    )
    app.state.service = service
    app.add_middleware(Guard, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(Watcher, log=log, metrics=metrics)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(VlmportError, _our_error)
    _add_operations(app, service)
    _add_chat(app, service)
    _add_responses(app, service)
    _add_caption(app, service)
    add_page(app, service)
    _document(app)
    return app


def _our_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, VlmportError)
    return response_of(error)


def _http_error(request: Request, error: Exception) -> Response:
    """Answer for an error of Starlette: no such path or method, a body that is not whole."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, VlmportError):
        return response_of(error.__cause__)
    if error.status_code == 405:
        response = response_of(
            RequestError(
                f"{request.method} {request.url.path}: this path has other methods",
                hint="/docs lists the paths",
                code="server.wrong-method",
            )
        )
        response.headers.update(error.headers or {})
        return response
    if error.status_code == 404:
        return response_of(
            RequestError(
                f"{request.url.path[:200]}: no such path",
                hint="/docs lists the paths; the base URL of OpenAI's clients ends in /v1",
                code="server.no-such-path",
            )
        )
    return response_of(
        RequestError(str(error.detail)[:300], hint="see /docs", code="server.wrong-value")
    )


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """Tell that the process answers."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", tags=["operation"])
    async def ready() -> Response:
        """Tell whether requests are taken: not while the server shuts down."""
        if service.models.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    async def measured() -> Response:
        """Measurements in the format of Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", tags=["OpenAI"])
    async def list_models() -> dict[str, Any]:
        """List the models."""
        models = service.models
        return {"object": "list", "data": [_model(name, models) for name in models.sources]}

    @app.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def get_model(name: str) -> dict[str, Any]:
        """Describe a model."""
        service.models.check_name(name)
        return _model(name, service.models)

    @app.get("/docs", include_in_schema=False)
    async def documented() -> Response:
        """All paths and their fields."""
        return HTMLResponse(docs_page(app.openapi()), headers=HEADERS)


def _model(name: str, models: Models) -> dict[str, Any]:
    """Describe a model as OpenAI does; precision and device are known once it is open."""
    told = {"id": name, "object": "model", "created": models.created, "owned_by": "vlmport"}
    for one in models.open_models:
        if one.name == name:
            return {**told, "vlmport": {"precision": one.vlm.precision, "device": one.vlm.device}}
    return told


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", tags=["OpenAI"], openapi_extra=_json_body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer messages, with OpenAI's fields; as a stream of events with `stream`."""
        body = await read_json(request, ChatRequest)
        request.state.logged = {"model": cut(body.model, 80), "stream": bool(body.stream)}
        async with while_there(request):
            started = await chat.start(body, service)
        request.state.job = started.job
        if body.stream:
            return event_stream(await chat.open_stream(started, request))
        return JSONResponse(await chat.complete(started, request))


def _add_responses(app: FastAPI, service: Service) -> None:
    @app.post("/v1/responses", tags=["OpenAI"], openapi_extra=_json_body(ResponsesRequest))
    async def create_response(request: Request) -> Response:
        """Answer messages, with the fields of OpenAI's Responses API."""
        body = await read_json(request, ResponsesRequest)
        request.state.logged = {"model": cut(body.model, 80), "stream": bool(body.stream)}
        async with while_there(request):
            reply = await responses.start(body, service)
        request.state.job = reply.started.job
        if body.stream:
            return event_stream(await responses.open_stream(reply, request))
        return JSONResponse(await responses.complete(reply, request))


def _add_caption(app: FastAPI, service: Service) -> None:
    image = {"schema": {"type": "string", "format": "binary"}}
    files = {
        "type": "object",
        "properties": {"image": {"type": "string", "format": "binary"}},
        "required": ["image"],
    }
    content = {
        "multipart/form-data": {"schema": files},
        "application/json": {"schema": {"$ref": "#/components/schemas/CaptionRequest"}},
        "image/*": image,
    }
    body = {"requestBody": {"required": True, "content": content}}

    @app.post("/caption", tags=["captions"], openapi_extra=body)
    async def caption_image(request: Request) -> dict[str, Any]:
        """Caption an image; of a form with several files, each."""
        return await caption.caption(request, service)


def event_stream(chunks: AsyncIterator[Mapping[str, Any] | str]) -> Response:
    """Send chunks as server-sent events."""

    async def events() -> AsyncIterator[ServerSentEvent]:
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                name = chunk.get("type") if isinstance(chunk, Mapping) else None
                data = chunk if isinstance(chunk, str) else json.dumps(chunk)
                yield ServerSentEvent(data=data, event=name, sep="\n")

    return EventSourceResponse(events(), sep="\n", send_timeout=SEND_SECONDS)


BODIES: list[Any] = [ChatRequest, ResponsesRequest, CaptionRequest]


def _json_body(kind: type) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def _document(app: FastAPI) -> None:
    """Put the bodies, which are read by hand, into the app's OpenAPI document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, bodies = models_json_schema(
                [(kind, "validation") for kind in BODIES],
                ref_template="#/components/schemas/{model}",
            )
            made.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document
