"""The stream of events of one request, for threads."""

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import grpc

from vlcache._completion import Completion
from vlcache._errors import VlcacheError
from vlcache._events import Event
from vlcache._exchange import Exchange


class Stream(Iterator[Event]):
    """Iterates over the events of one request; made by `Client.stream`.

    The request is sent when the first event is asked for. Leaving the `with` block, or `close` from any thread,
    cancels it on the service. Iteration raises the errors of `VlcacheError`.
    """

    def __init__(self, send: Callable[..., Any], exchange: Exchange) -> None:
        self._send = send
        self._exchange = exchange
        self._call: Any = None
        self._watch: threading.Timer | None = None
        self._is_late = False
        self._closed = threading.Event()

    @property
    def request_id(self) -> str:
        """The id of the request, in every attempt and in the logs of the service."""
        return self._exchange.request.request_id

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __next__(self) -> Event:
        while not self._closed.is_set():
            event = self._receive()
            if event is not None:
                return event
        raise StopIteration

    def result(self) -> Completion:
        """Reads what is left and returns the whole answer. Raises Cancelled when the stream was closed before."""
        for _ in self:
            pass
        return self._exchange.completion()

    def close(self) -> None:
        """Cancels the request unless it has finished. May be called again."""
        self._closed.set()
        self._stop_watch()
        if self._call is not None:
            self._call.cancel()

    def _receive(self) -> Event | None:
        """The next event; None when there is none yet or no more."""
        try:
            response = next(self._open_call())
        except StopIteration:
            self.close()
            self._exchange.check_finished()
            return None
        except grpc.RpcError as error:
            self._back_off(error)
            return None
        event = self._exchange.receive(response)
        if self._exchange.has_token:
            self._stop_watch()
        return event

    def _open_call(self) -> Any:
        if self._call is None:
            self._call = self._send(self._exchange.request, timeout=self._exchange.begin_attempt())
            self._start_watch()
            # Closed, or late, by another thread in between: that thread saw no call to cancel.
            if self._closed.is_set() or self._is_late:
                self._call.cancel()
        return self._call

    def _back_off(self, rpc_error: grpc.RpcError) -> None:
        """Waits for the next attempt; closes the stream and raises when there is to be none."""
        failure = self._failure(rpc_error)
        delay_s = self._exchange.backoff_s(failure)
        if delay_s is None:
            self.close()
            raise failure from rpc_error
        self._closed.wait(delay_s)
        self._call = None

    def _failure(self, rpc_error: grpc.RpcError) -> VlcacheError:
        if self._is_late:
            return self._exchange.first_token_late()
        if self._closed.is_set():
            return self._exchange.closed()
        return self._exchange.failure(rpc_error)

    def _start_watch(self) -> None:
        limit_s = self._exchange.first_token_left_s()
        if limit_s is not None and self._watch is None:
            self._watch = threading.Timer(limit_s, self._be_late)
            self._watch.daemon = True
            self._watch.start()

    def _stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    def _be_late(self) -> None:
        # Runs in the timer's thread: a blocking read has no time limit of its own, but a cancelled one ends.
        self._is_late = True
        if self._call is not None:
            self._call.cancel()
