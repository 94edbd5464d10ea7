"""Channel and server options, in one place because both ends must agree on message sizes; and the allocator's."""

from __future__ import annotations

MIB = 1 << 20
# A public request carries its images; everything between services is small or chunked.
MAX_REQUEST_BYTES = 64 * MIB
MAX_CONTROL_BYTES = 4 * MIB

Option = tuple[str, int]


def message_limits(max_bytes: int) -> list[Option]:
    """Send and receive limits of `max_bytes` plus room for framing."""
    limit = max_bytes + 64 * 1024
    return [("grpc.max_receive_message_length", limit), ("grpc.max_send_message_length", limit)]


# The environment of a worker's process, to be set before it starts. glibc's defaults give the memory of every chunk
# back to the kernel and fault it in again (38 instead of 29 ms for 50 MB; larger values gain nothing more), and spread
# it over the heaps of many threads instead of using warm memory again (6 % more time).
MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * MIB),
    "MALLOC_TRIM_THRESHOLD_": str(64 * MIB),
    "MALLOC_TOP_PAD_": str(16 * MIB),
    "MALLOC_ARENA_MAX": "1",
}

# A reader that takes 1 MiB at a time gains a few percent where malloc is not tuned, and loses nothing elsewhere.
TRANSFER_OPTIONS: list[Option] = [
    ("grpc.experimental.tcp_read_chunk_size", MIB),
    ("grpc.experimental.tcp_min_read_chunk_size", MIB),
    ("grpc.experimental.tcp_max_read_chunk_size", 4 * MIB),
]

# Dead peers are noticed within about 20 s even when nothing is sent.
KEEPALIVE_OPTIONS: list[Option] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # of a peer whose kernel answers and whose process does not
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_KEEPALIVE_OPTIONS: list[Option] = [
    *KEEPALIVE_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
]

# A connection that has not said within this time that it speaks HTTP/2, and TLS where that is spoken, is closed.
LIMIT_OPTIONS: list[Option] = [("grpc.server_handshake_timeout_ms", 10_000)]
# Of a port that strangers reach. Who dribbles bytes of a call's header for ever loses the connection at the end of its
# age; so does an answer that takes longer than the grace. Clients connect again without noticing.
PUBLIC_OPTIONS: list[Option] = [
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 3_600_000),
    # calls of one connection at a time; further ones wait at their client
    ("grpc.max_concurrent_streams", 1024),
]

# gRPC's own backoff grows to two minutes; a worker that is back should be seen at once.
RECONNECT_OPTIONS: list[Option] = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


def client_options(max_bytes: int = MAX_CONTROL_BYTES) -> list[Option]:
    """Options of a channel between services."""
    return [*message_limits(max_bytes), *KEEPALIVE_OPTIONS, *RECONNECT_OPTIONS]


def server_options(max_bytes: int = MAX_CONTROL_BYTES) -> list[Option]:
    """Options of a server that accepts messages of up to `max_bytes`."""
    # so_reuseport would let a second server bind the same port unnoticed
    limits = [*message_limits(max_bytes), *LIMIT_OPTIONS]
    return [*limits, *SERVER_KEEPALIVE_OPTIONS, *TRANSFER_OPTIONS, ("grpc.so_reuseport", 0)]
