"""One server interceptor for all four kinds of RPC: errors become statuses, bugs become a generic INTERNAL."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from shared.errors import InternalError, ServiceError
from shared.rpc.handlers import behaviour_of, with_behaviour
from shared.rpc.status import to_status

log = logging.getLogger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of an aio server.

    A `ServiceError` ends the RPC with its status. Any other exception is a bug: its trace goes to the log, and the
    caller gets a text that leaks nothing. A cancelled handler stays cancelled.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        guard = self._guard_stream if handler.response_streaming else self._guard_unary
        return with_behaviour(handler, guard(behaviour_of(handler), handler_call_details.method))

    def _guard_unary(self, behaviour: Callable[..., Any], method: str) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                return await behaviour(request, context)
            except Exception as error:
                await self._abort(error, method, context)

        return call

    def _guard_stream(self, behaviour: Callable[..., Any], method: str) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                responses = behaviour(request, context)
                if inspect.isawaitable(responses):
                    await responses  # grpc's own health Watch writes to the context instead of yielding
                    return
                async for response in responses:
                    yield response
            except Exception as error:
                await self._abort(error, method, context)

        return call

    async def _abort(self, error: Exception, method: str, context: grpc.aio.ServicerContext) -> None:
        if isinstance(error, (grpc.aio.AbortError, grpc.aio.UsageError)):
            raise error
        if not isinstance(error, ServiceError):
            log.error("bug in %s", method, exc_info=error)
            error = InternalError("internal error; the server's log has the details")
        await context.abort_with_status(to_status(error, worker=self._worker))
