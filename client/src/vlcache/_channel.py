"""Where the service is, and how a channel to it behaves; the same for both clients."""

import ipaddress
import os
from pathlib import Path

import grpc

from vlcache._settings import Timeout, Tls

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 64 * 2**20

KEEPALIVE_INTERVAL_S = 30
KEEPALIVE_TIMEOUT_S = 10
FIRST_RECONNECT_BACKOFF_S = 0.1
LAST_RECONNECT_BACKOFF_S = 2


def channel_options(timeout: Timeout) -> list[tuple[str, int]]:
    """Arguments of a gRPC channel."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # A peer that vanished without a word is noticed while a call waits; idle channels stay silent.
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_S * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
        # Despite its name this is the time limit of one attempt to connect.
        ("grpc.min_reconnect_backoff_ms", max(1, round(timeout.connect_s * 1000))),
        # The default of 1 s would answer our own retries with the memory of the last failure.
        ("grpc.initial_reconnect_backoff_ms", round(FIRST_RECONNECT_BACKOFF_S * 1000)),
        ("grpc.max_reconnect_backoff_ms", LAST_RECONNECT_BACKOFF_S * 1000),
        # A proxy meant for the web does not know the way to a service of one's own.
        ("grpc.enable_http_proxy", 0),
    ]


def channel_credentials(tls: Tls | None) -> grpc.ChannelCredentials | None:
    """Of a channel; None for plaintext. Raises OSError when a file cannot be read."""
    if tls is None:
        return None
    return grpc.ssl_channel_credentials(_content(tls.ca), _content(tls.key), _content(tls.cert))


def check_secret(address: str, *, token: str | None, tls: Tls | None) -> None:
    """Raises ValueError when a token would be shown to everybody on the way."""
    if token is not None and tls is None and not stays_here(address):
        raise ValueError(f"a token is not sent in plaintext to {address}: connect with TLS (tls=Tls(ca=...))")


def stays_here(address: str) -> bool:
    """Whether what is sent to a gRPC address does not leave this machine."""
    scheme, colon, rest = address.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return True
    targets = rest if colon and scheme in ("ipv4", "ipv6") else address.removeprefix("dns:///").removeprefix("dns:")
    return all(_is_loopback(target.strip()) for target in targets.split(","))


def _is_loopback(target: str) -> bool:
    host = target[1:].partition("]")[0] if target.startswith("[") else target.rpartition(":")[0] or target
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _content(file: str | os.PathLike[str] | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()
