"""The status with which a call that streams requests has really ended."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc

Value = TypeVar("Value")


class FirstStatus:
    """Remembers the first status of a call; to be made right after the call.

    When a server refuses a stream while the client writes, the write fails, and grpcio sets "INTERNAL: Internal error
    from Core" (grpc/grpc issue 36066). Mostly the true status then replaces it, but in about one refusal of a hundred
    it comes first and is lost. A done callback is called once, with whatever came first.
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        self._error: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._keep)

    def of(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """What `error`, raised by the call, should have been."""
        return self._error if self._error and error.code() is grpc.StatusCode.INTERNAL else error

    def _keep(self, call: grpc.aio.Call) -> None:
        code, details, trailing = _known(call.code()), _known(call.details()), _known(call.trailing_metadata())
        if code is not None and code is not grpc.StatusCode.OK:
            self._error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)


def _known(value: Coroutine[Any, Any, Value]) -> Value | None:
    """The result of a coroutine that has nothing to wait for any more."""
    try:
        value.send(None)
    except StopIteration as done:
        return done.value
    value.close()
    return None
