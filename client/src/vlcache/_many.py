"""Many requests at once, a few at a time, for threads."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterable
from typing import Literal

from vlcache._completion import Completion
from vlcache._errors import VlcacheError
from vlcache._progress import progress_bar
from vlcache._request import Request
from vlcache._stream import Stream

CONCURRENCY = 8
OnError = Literal["raise", "return"]
# What one request may end with, and others need not.
FAILURES = (VlcacheError, OSError, ValueError, TypeError)


def check_many(concurrency: int, on_error: str) -> None:
    """Raises ValueError when an option is out of its range."""
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")
    if on_error not in ("raise", "return"):
        raise ValueError(f'on_error must be "raise" or "return", got {on_error!r}')


def answer_many(
    send: Callable[[Request], Stream],
    requests: Iterable[Request],
    *,
    concurrency: int,
    progress: bool,
    on_error: OnError,
) -> list[Completion | Exception]:
    """The answers in the order of the requests. See `Client.generate_many`."""
    check_many(concurrency, on_error)
    asked = list(requests)
    streams = _Streams(send)
    with (
        progress_bar("requests", len(asked), shown=progress) as advance,
        concurrent.futures.ThreadPoolExecutor(concurrency, thread_name_prefix="vlcache") as pool,
    ):
        try:
            answers = [pool.submit(streams.answer, request, returned=on_error == "return") for request in asked]
            for answer in concurrent.futures.as_completed(answers):
                answer.result()
                advance()
        except BaseException:  # an error, or ctrl-C: whoever waits has left
            pool.shutdown(wait=False, cancel_futures=True)
            streams.close()
            raise
    return [answer.result() for answer in answers]


class _Streams:
    """The streams that are open, so that all can be closed at once; none is opened after that."""

    def __init__(self, send: Callable[[Request], Stream]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._open: set[Stream] = set()
        self._is_closed = False

    def answer(self, request: Request, *, returned: bool) -> Completion | Exception:
        """The whole answer. An error of this request is raised, or `returned` in its place."""
        try:
            return self._answer(request)
        except FAILURES as failure:
            if returned:
                return failure
            raise

    def close(self) -> None:
        """Cancels what is in flight."""
        with self._lock:
            self._is_closed = True
            for stream in self._open:
                stream.close()

    def _answer(self, request: Request) -> Completion:
        with self._send(request) as stream:
            with self._lock:
                self._open.add(stream)
                if self._is_closed:
                    stream.close()
            try:
                return stream.result()
            finally:
                with self._lock:
                    self._open.discard(stream)
