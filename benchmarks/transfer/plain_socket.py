"""The rival without gRPC: one TCP connection, sendall and recv_into, both over warm buffers."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path

import numpy as np

_SIZE = struct.Struct("<Q")
_DONE = b"!"
# BBR paces what loopback need not pace; Reno is allowed to unprivileged processes almost everywhere
WANTED_CONGESTION_CONTROL = b"reno"
DEFAULT_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")


class SocketReceiver:
    """Reads whatever comes into one warm buffer and answers when it is complete, in a thread."""

    def __init__(self, max_bytes: int) -> None:
        self._buffer = np.ones(max_bytes, dtype=np.uint8).data
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, name="socket", daemon=True).start()

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        with peer:
            while header := peer.recv(_SIZE.size, socket.MSG_WAITALL):
                _fill(peer, self._buffer[: _SIZE.unpack(header)[0]])
                peer.sendall(_DONE)


class SocketSender:
    """The other end."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, WANTED_CONGESTION_CONTROL)

    @property
    def congestion_control(self) -> str:
        """What the kernel uses on this connection."""
        name = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        return name.rstrip(b"\0").decode()

    def send(self, body: memoryview) -> None:
        """Returns when the receiver has everything."""
        self._socket.sendall(_SIZE.pack(len(body)))
        self._socket.sendall(body)
        self._socket.recv(len(_DONE))

    def close(self) -> None:
        """Ends the receiver's thread too."""
        self._socket.close()


def default_congestion_control() -> str:
    """What connections use that ask for nothing, as gRPC's."""
    return DEFAULT_CONGESTION_CONTROL.read_text().strip()


def _fill(peer: socket.socket, buffer: memoryview) -> None:
    while buffer:
        received = peer.recv_into(buffer)
        if not received:
            raise ConnectionError("the sender went away")
        buffer = buffer[received:]
