"""Handlers of gRPC's four kinds, taken apart and put together again by interceptors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

Behaviour = Callable[..., Any]
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def behaviour_of(handler: grpc.RpcMethodHandler) -> Behaviour:
    """The function that answers."""
    return next(behaviour for kind in KINDS if (behaviour := getattr(handler, kind)) is not None)


def with_behaviour(handler: grpc.RpcMethodHandler, behaviour: Behaviour) -> grpc.RpcMethodHandler:
    """The same handler, answered by another function."""
    kind = next(kind for kind in KINDS if getattr(handler, kind) is not None)
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
