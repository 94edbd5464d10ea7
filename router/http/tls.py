"""TLS of the HTTP port, with the certificate of the gRPC port."""

from __future__ import annotations

import ssl

from shared.rpc.identity import Identity


def server_context(identity: Identity, *, demand_client_cert: bool) -> ssl.SSLContext:
    """A context of which every handshake uses the files as they are then.

    Args:
        demand_client_cert: Whether callers need a certificate of the CA; otherwise they are asked for none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED if demand_client_cert else ssl.CERT_NONE

    def choose(connection: ssl.SSLObject, server_name: str | None, context: ssl.SSLContext) -> None:
        connection.context = identity.current().server

    # called with or without a name
    context.sni_callback = choose
    return context
