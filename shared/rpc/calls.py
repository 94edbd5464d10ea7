"""Where a call about a request comes in at a worker: its log lines and its stages are those of the request."""

from __future__ import annotations

import grpc

from shared.telemetry.scope import Scope, enter
from shared.telemetry.span import Value
from shared.telemetry.tracer import Tracer

OK = grpc.StatusCode.OK.value[0]
NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


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
    if done.cancelled():
        return grpc.StatusCode.CANCELLED.name
    code = done.code()
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code
    return "" if number == OK else NAMES.get(number, grpc.StatusCode.UNKNOWN.name)
