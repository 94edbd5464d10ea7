"""What a service may answer to whom nobody would be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable
from typing import Any

import grpc

# What is wrong with a request is said in these; anything else says that something is wrong with us.
REFUSALS = frozenset(
    {
        "INVALID_ARGUMENT",
        "OUT_OF_RANGE",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "FAILED_PRECONDITION",
        "RESOURCE_EXHAUSTED",
        "ABORTED",
        "DATA_LOSS",
    }
)
CODES = {code.value[0]: code.name for code in grpc.StatusCode}


async def taken(answering: Awaitable[Any], seen: Counter[str], *also: str) -> Any:
    """The answer; None when it was refused. Counts both.

    Args:
        also: Codes beside `REFUSALS` that say nothing bad here.
    """
    try:
        answer = await answering
        seen["OK"] += 1
        return answer
    except grpc.aio.AioRpcError as error:
        first = getattr(answering, "first_status", None)
        status = first.of(error) if first else error
        assert status.code().name in REFUSALS.union(also), f"{status.code().name}: {status.details()}"
        assert status.details()
        seen[status.code().name] += 1
        return None
