"""What is served over HTTP, and where."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from vlcache.v1 import inference_pb2 as pb

from router.http.chat import ChatCompletions
from router.http.errors import body_of, error_object, headers_of, known, status_of
from router.http.page import page_routes
from router.listing import served_models
from router.requests.reception import Reception
from router.workers.table import WorkerTable
from shared.errors import NotFoundError
from shared.version import VERSION

# The names of `grpc.health.v1`.
SERVING, NOT_SERVING = "SERVING", "NOT_SERVING"

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(
    chat: ChatCompletions, reception: Reception, table: WorkerTable, *, is_ready: Callable[[], bool], ui: bool
) -> Starlette:
    """The application; all but health and the page's files wants a token where the router does.

    Args:
        is_ready: What health says.
        ui: Whether the page is served.
    """
    pages = Pages(table, is_ready)

    def for_callers(endpoint: Endpoint) -> Endpoint:
        async def checked(request: Request) -> Response:
            reception.tenant_of(request.headers.items())
            return await endpoint(request)

        return _answering_errors(checked)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", for_callers(pages.models), methods=["GET"]),
            Route("/v1/models/{name:path}", for_callers(pages.model), methods=["GET"]),
            Route("/version", for_callers(pages.version), methods=["GET"]),
            Route("/health", pages.health, methods=["GET"]),
            *(page_routes() if ui else []),
        ],
        exception_handlers={HTTPException: _no_such_page},
    )


class Pages:
    """What is asked with GET."""

    def __init__(self, table: WorkerTable, is_ready: Callable[[], bool]) -> None:
        self._table = table
        self._is_ready = is_ready
        self._since = int(time.time())

    async def models(self, request: Request) -> Response:
        """Models that can be asked now."""
        return JSONResponse({"object": "list", "data": [self._model(model) for model in served_models(self._table)]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        for model in served_models(self._table):
            if model.name == name:
                return JSONResponse(self._model(model))
        raise NotFoundError(f"unknown model {name!r}", reason="UNKNOWN_MODEL")

    async def version(self, request: Request) -> Response:
        """Of the router."""
        return JSONResponse({"version": VERSION})

    async def health(self, request: Request) -> Response:
        """Whether a model can be asked; nothing about load."""
        ready = self._is_ready()
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"status": SERVING if ready else NOT_SERVING}, status)

    def _model(self, model: pb.Model) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            # when it was trained nobody here knows
            "created": self._since,
            "owned_by": "vlcache",
            # vLLM's name
            "max_model_len": model.context_tokens,
            "max_images": model.max_images,
            "policies": list(model.policies),
            "default_policy": model.default_policy,
            "default_retention": model.default_retention,
            "kv_bytes_per_token": model.kv_bytes_per_token,
        }


def _answering_errors(endpoint: Endpoint) -> Endpoint:
    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            failure = known(error, f"{request.method} {request.scope['path']}")
            return JSONResponse(body_of(failure), status_of(failure), headers_of(failure))

    return guarded


async def _no_such_page(request: Request, error: Exception) -> Response:
    """Wrong paths and methods."""
    assert isinstance(error, HTTPException)
    content = error_object(
        f"{request.method} {request.scope['path']}: {error.detail}",
        kind="invalid_request_error",
        code=HTTPStatus(error.status_code).name.lower(),
    )
    return JSONResponse(content, error.status_code, error.headers)
