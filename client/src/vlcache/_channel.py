"""Where the service is, and how a channel to it behaves; the same for both clients."""

from vlcache._settings import Timeout

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
