"""Who may call what: the table of all RPCs between services, and what holds callers to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc

from shared.errors import PermissionDeniedError
from shared.rpc.handlers import behaviour_of, with_behaviour
from shared.rpc.identity import PREFILL, ROUTER, roles_in

# Open to whoever has got as far as a handler: with any certificate of the CA, and without a token.
HEALTH = "/grpc.health.v1.Health/"

_WORKERS = "/vlcache.worker.v1."
CALLERS: Mapping[str, str] = {
    f"{_WORKERS}{method}": role
    for method, role in {
        "PrefillService/GetWorkerInfo": ROUTER,
        "PrefillService/Prefill": ROUTER,
        "PrefillService/Resend": ROUTER,
        "PrefillService/RenewParcels": ROUTER,
        "PrefillService/ReleaseParcels": ROUTER,
        "DecodeService/GetWorkerInfo": ROUTER,
        "DecodeService/Reserve": ROUTER,
        "DecodeService/Release": ROUTER,
        "DecodeService/StreamTokens": ROUTER,
        # the prompt's worker keeps the promise of memory alive, and asks for more where a guard keeps more
        "DecodeService/Renew": PREFILL,
        "DecodeService/GrowReservation": PREFILL,
        "KVTransferService/PutKV": PREFILL,
        "KVTransferService/InstallKV": PREFILL,
    }.items()
}
"""The one role that may call each RPC. What is not here nobody may call."""


class RoleInterceptor(grpc.aio.ServerInterceptor):
    """Lets an RPC pass where the caller's certificate names the role that the table says.

    To stand behind `ErrorInterceptor`, on a port that demands certificates.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None or method.startswith(HEALTH):
            return handler
        behaviour = behaviour_of(handler)

        def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            check_caller(method, roles_of_peer(context))
            return behaviour(request, context)

        return with_behaviour(handler, call)


def check_caller(method: str, roles: frozenset[str]) -> None:
    """Holds a caller to the table.

    Raises:
        PermissionDeniedError: None of its roles may call the RPC.
    """
    if CALLERS.get(method) not in roles:
        raise PermissionDeniedError("the certificate of the caller is not for this call", reason="ROLE")


def roles_of_peer(context: grpc.aio.ServicerContext) -> frozenset[str]:
    """The roles in the certificate of the caller."""
    uris = context.auth_context().get("peer_uri", ())
    return roles_in(uri.decode(errors="replace") for uri in uris)
