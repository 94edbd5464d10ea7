"""What answers at an address that no gRPC call came through to."""

import contextlib
import enum
import socket
import ssl

TIMEOUT_S = 1.0
_MAX_BYTES = 2**16
_ASK_HTTP = b"GET /metrics HTTP/1.0\r\n\r\n"
# The kind of an HTTP/2 frame is its fourth byte; a server begins with SETTINGS.
_SETTINGS = 4


class Peer(enum.Enum):
    """Who is there."""

    NOBODY = "nobody"
    METRICS = "the metrics port of a vlcache process"
    HTTP = "an HTTP server"
    GRPC = "gRPC in plaintext"
    TLS = "TLS"
    OTHER = "something else"


def peer_at(address: str) -> Peer:
    """Finds out, in at most a few seconds; only for host:port. A name that does not resolve is nobody's."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:
        return Peer.OTHER
    try:
        said = _answer(address)
    except OSError:
        return Peer.NOBODY
    if said.startswith(b"HTTP/1"):
        return Peer.METRICS if b"vlcache_" in said else Peer.HTTP
    if len(said) > _SETTINGS and said[3] == _SETTINGS:
        return Peer.GRPC
    return Peer.TLS if _speaks_tls(address) else Peer.OTHER


def _connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S)


def _answer(address: str) -> bytes:
    """What it says to somebody who speaks HTTP. Raises OSError when nobody listens."""
    said = b""
    with _connected(address) as connection, contextlib.suppress(OSError):
        connection.sendall(_ASK_HTTP)
        while len(said) < _MAX_BYTES and (piece := connection.recv(_MAX_BYTES)):
            said += piece
    return said


def _speaks_tls(address: str) -> bool:
    """Nothing is told to it, so it need not be known."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with _connected(address) as connection, context.wrap_socket(connection):
            return True
    except OSError:
        return False
