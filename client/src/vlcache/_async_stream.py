"""The stream of events of one request, for asyncio."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

import grpc

from vlcache._completion import Completion
from vlcache._events import Event
from vlcache._exchange import Exchange


class AsyncStream(AsyncIterator[Event]):
    """Iterates over the events of one request; made by `AsyncClient.stream`.

    The request is sent when the first event is asked for. Leaving the `async with` block, or `close` from any
    task of the same loop, cancels it on the service. Iteration raises the errors of `VlcacheError`.
    """

    def __init__(self, send: Callable[..., Any], exchange: Exchange) -> None:
        self._send = send
        self._exchange = exchange
        self._call: Any = None
        self._is_closed = False

    @property
    def request_id(self) -> str:
        """The id of the request, in every attempt and in the logs of the service."""
        return self._exchange.request.request_id

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __anext__(self) -> Event:
        while not self._is_closed:
            event = await self._receive()
            if event is not None:
                return event
        raise StopAsyncIteration

    async def result(self) -> Completion:
        """Reads what is left and returns the whole answer. Raises Cancelled when the stream was closed before."""
        async for _ in self:
            pass
        return self._exchange.completion()

    def close(self) -> None:
        """Cancels the request unless it has finished. May be called again."""
        self._is_closed = True
        if self._call is not None:
            self._call.cancel()

    async def _receive(self) -> Event | None:
        """The next event; None when there is none yet or no more."""
        try:
            response = await self._read()
        except grpc.RpcError as rpc_error:
            await self._back_off(rpc_error)
            return None
        if response is grpc.aio.EOF:
            self.close()
            self._exchange.check_finished()
            return None
        return self._exchange.receive(response)

    async def _read(self) -> Any:
        call = self._open_call()
        try:
            return await asyncio.wait_for(call.read(), self._exchange.first_token_left_s())
        except asyncio.TimeoutError:
            self.close()
            raise self._exchange.first_token_late() from None
        except asyncio.CancelledError:
            # A read that ends because another task closed the stream looks like a cancelled task.
            if self._is_closed:
                raise self._exchange.closed() from None
            raise

    def _open_call(self) -> Any:
        if self._call is None:
            self._call = self._send(self._exchange.request, timeout=self._exchange.begin_attempt())
        return self._call

    async def _back_off(self, rpc_error: grpc.RpcError) -> None:
        """Waits for the next attempt; closes the stream and raises when there is to be none."""
        failure = self._exchange.failure(rpc_error)
        delay_s = self._exchange.backoff_s(failure)
        if delay_s is None:
            self.close()
            raise failure from rpc_error
        await asyncio.sleep(delay_s)
        self._call = None
