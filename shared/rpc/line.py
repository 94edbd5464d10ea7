"""The way to one address of another service."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from shared.rpc.identity import Identity, Material, channel_credentials
from shared.rpc.options import Option

# As long as it takes: calls on a channel that was replaced end by themselves.
RETIREMENT_S = 365 * 24 * 3600.0


class Line:
    """A channel, and another one for new calls once this process has another certificate. Lives on one event loop."""

    def __init__(self, address: str, options: Sequence[Option], identity: Identity | None) -> None:
        """Connects at the first call.

        Args:
            identity: Of this process; None speaks plaintext.
        """
        self._address = address
        self._options = options
        self._identity = identity
        self._material: Material | None = None
        self._retired: dict[grpc.aio.Channel, asyncio.Task[None]] = {}
        self._channel = self._open()

    def channel(self) -> grpc.aio.Channel:
        """The channel for new calls; the same object until the certificate changes."""
        if self._identity is not None and self._identity.current() is not self._material:
            old, self._channel = self._channel, self._open()
            self._retired[old] = asyncio.create_task(self._retire(old))
        return self._channel

    async def close(self) -> None:
        """Cancels what still runs."""
        retired = dict(self._retired)
        for task in retired.values():
            task.cancel()
        await asyncio.gather(*retired.values(), return_exceptions=True)
        await asyncio.gather(*(channel.close() for channel in (*retired, self._channel)))

    def _open(self) -> grpc.aio.Channel:
        if self._identity is None:
            return grpc.aio.insecure_channel(self._address, options=self._options)
        self._material = self._identity.current()
        return grpc.aio.secure_channel(self._address, channel_credentials(self._material), options=self._options)

    async def _retire(self, channel: grpc.aio.Channel) -> None:
        await channel.close(grace=RETIREMENT_S)
        del self._retired[channel]
