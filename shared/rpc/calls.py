"""Where a call about a request comes in at a worker: its log lines and its stages are those of the request."""

from __future__ import annotations

import grpc

from shared.telemetry.scope import Scope, enter
from shared.telemetry.span import Value
from shared.telemetry.tracer import Tracer


def enter_call(
    context: grpc.aio.ServicerContext, tracer: Tracer, name: str, request_id: str, **attributes: Value
) -> None:
    """Enters the scope of a call whose span ends with it.

    Args:
        name: Of the call.
    """
    span = tracer.begin(name, context.invocation_metadata() or (), {"request_id": request_id, **attributes})
    # called however the call ends, also when a handler that was cancelled is never resumed
    context.add_done_callback(lambda done: span.end(_failure(done)))
    enter(Scope(request_id=request_id, span=span))


def _failure(done: grpc.aio.ServicerContext) -> str:
    """Name of the code that a call has failed with; empty where it has not."""
    code = done.code()
    if code is not None and code is not grpc.StatusCode.OK:
        return code.name
    # one that its caller has left is over before it is done
    return "" if done.done() else grpc.StatusCode.CANCELLED.name
