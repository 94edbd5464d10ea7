"""Whose a call is, and that nobody without a token gets any further."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from router.accounting import Accounting
from router.admission.api_tokens import ApiTokens
from router.admission.tenants import METADATA_KEY, tenant_of
from shared.errors import PermissionDeniedError, ServiceError, UnauthenticatedError
from shared.rpc.access import HEALTH

TOKEN_KEY = "authorization"  # noqa: S105 - the name of a metadata entry
SCHEME = "bearer"

Metadata = Iterable[tuple[str, str | bytes]]


class Callers:
    """Tells the tenant of a call: by its token, or without tokens by what it says, which is then trusted."""

    def __init__(self, tokens: ApiTokens | None) -> None:
        self._tokens = tokens

    @property
    def known(self) -> bool:
        """Whether callers need a token."""
        return self._tokens is not None

    def tenant_of(self, metadata: Metadata) -> str:
        """Whose call has this metadata.

        Raises:
            UnauthenticatedError: A token is needed, and there is none, or nobody's.
            PermissionDeniedError: The token is another tenant's than the one named.
            InvalidRequestError: The name has a wrong form, or there are several.
        """
        if self._tokens is None:
            return tenant_of(metadata)
        metadata = list(metadata)
        tenant = self._tokens.tenant_of(_token_in(metadata))
        if tenant is None:
            raise UnauthenticatedError("the token is unknown", reason="BAD_TOKEN")
        if any(key == METADATA_KEY for key, _ in metadata) and tenant_of(metadata) != tenant:
            raise PermissionDeniedError("the token is another tenant's", reason="TENANT")
        return tenant


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without a token but those for health. To stand behind `ErrorInterceptor`."""

    def __init__(self, callers: Callers, accounting: Accounting) -> None:
        self._callers = callers
        self._accounting = accounting

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        if not handler_call_details.method.startswith(HEALTH):
            try:
                self._callers.tenant_of(handler_call_details.invocation_metadata or ())
            except ServiceError as error:
                self._accounting.refused(error)
                return _refusing(error)
        return await continuation(handler_call_details)


def _token_in(metadata: Metadata) -> str:
    values = [value for key, value in metadata if key == TOKEN_KEY]
    scheme, _, token = str(values[0]).partition(" ") if len(values) == 1 else ("", "", "")
    if scheme.lower() != SCHEME or not token:
        raise UnauthenticatedError(f"a token is needed, as {TOKEN_KEY}: Bearer TOKEN", reason="NO_TOKEN")
    return token


def _refusing(error: ServiceError) -> grpc.RpcMethodHandler:
    """Ends a call of any kind before its first message is read: strangers do not fill the memory."""

    def refuse(request: Any, context: grpc.aio.ServicerContext) -> Any:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)
