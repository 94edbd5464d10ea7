"""A request's body, read with limits: strangers neither fill the memory nor hold a connection by dribbling."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import Receive

from router.http.errors import BODY_TIMEOUT
from shared.errors import DeadlineExceededError, RequestCancelledError, TooLargeError
from shared.rpc.options import MAX_REQUEST_BYTES, MIB

BODY_TIMEOUT_S = 120.0


async def read_body(headers: Mapping[str, str], receive: Receive) -> bytes:
    """The whole body.

    Raises:
        TooLargeError: It has more than `MAX_REQUEST_BYTES`, or says so.
        DeadlineExceededError: It has not come within `BODY_TIMEOUT_S`.
        RequestCancelledError: The client has left.
    """
    said = headers.get("content-length", "")
    if said.isdecimal() and int(said) > MAX_REQUEST_BYTES:
        raise _too_large()
    try:
        return await asyncio.wait_for(_read(receive), BODY_TIMEOUT_S)
    except asyncio.TimeoutError as error:
        text = f"the body did not come within {BODY_TIMEOUT_S:g} s"
        raise DeadlineExceededError(text, reason=BODY_TIMEOUT) from error


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestCancelledError("the client left before its request was complete")
        body += message.get("body", b"")
        if len(body) > MAX_REQUEST_BYTES:
            raise _too_large()
        if not message.get("more_body", False):
            return bytes(body)


def _too_large() -> TooLargeError:
    return TooLargeError(f"a request has at most {MAX_REQUEST_BYTES // MIB} MiB")
