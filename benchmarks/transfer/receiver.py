"""`python -m benchmarks.transfer.receiver MAX_TOKENS`: the decode worker's side, a process of its own.

Says where it listens in one JSON line and serves until its stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np

from benchmarks.transfer.decode_side import DecodeSide
from benchmarks.transfer.methods import SERVICE
from benchmarks.transfer.parcels import LAYOUT
from benchmarks.transfer.plain_socket import SocketReceiver
from benchmarks.transfer.tokens import TokenSource
from decode_worker.kv_receiver import SERVICE_NAME
from shared.rpc.server import RpcServer


class BenchmarkService:
    """What the sender needs besides the data plane: reservations, the bare stream and the token streams."""

    def __init__(self, side: DecodeSide, max_bytes: int) -> None:
        self._side = side
        self._tokens = TokenSource()
        self._buffer = np.ones(max_bytes, dtype=np.uint8).data

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service, without serializers: messages are bytes."""
        handlers = {
            "Reserve": grpc.unary_unary_rpc_method_handler(self.reserve),
            "Release": grpc.unary_unary_rpc_method_handler(self.release),
            "Bare": grpc.stream_unary_rpc_method_handler(self.bare),
            "Tokens": grpc.unary_stream_rpc_method_handler(self._tokens.stream),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def reserve(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """JSON arguments of `DecodeSide.reserve` in, a token out."""
        return await self._side.reserve(**json.loads(request))

    async def release(self, token: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Ends the reservation of that token."""
        self._side.release(token)
        return b""

    async def bare(self, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        """The least that a grpcio stream can do: every message is copied into a warm buffer."""
        received = 0
        async for message in messages:
            end = received + len(message)
            self._buffer[received:end] = message
            received = end
        return b""


async def serve(max_tokens: int) -> None:
    """Serves parcels of up to `max_tokens` kept tokens until stdin ends."""
    max_bytes = LAYOUT.full_bytes(max_tokens)
    side, plain = DecodeSide(max_tokens), SocketReceiver(max_bytes)
    service = BenchmarkService(side, max_bytes)

    def register(server: grpc.aio.Server) -> None:
        side.register(server)
        service.register(server)

    server = await RpcServer.start(
        name="transfer", host="127.0.0.1", port=0, register=register, services=[SERVICE_NAME]
    )
    hello: dict[str, Any] = {"address": server.address, "port": plain.port, "pid": os.getpid()}
    sys.stdout.write(json.dumps(hello) + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
