"""Preprocessing in processes of its own: it would hold the GIL, and what strangers send may end it."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from vlcache.v1 import inference_pb2 as pb

from prefill_worker.preprocess.handle import PreprocessProcess
from prefill_worker.preprocess.processed import ProcessedPrompt
from prefill_worker.preprocess.wire import FrameError, request_frame
from prefill_worker.prompt import Prompt
from shared.errors import InvalidRequestError, ResourceExhaustedError, ServiceError, UnavailableError
from shared.model.spec import VLMSpec
from shared.telemetry.metrics import PrefillMetrics
from shared.telemetry.scope import NOBODY, current, enter

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

START_TIMEOUT_S = 120.0
# Between two starts where the first has failed.
RELAUNCH_S = 1.0


class PreprocessStartError(Exception):
    """No preprocessing process came up: the worker cannot serve."""


class _Work:
    """A request that waits, or is in a process."""

    def __init__(self, messages: Sequence[pb.Message], max_new_tokens: int) -> None:
        self.messages = messages
        self.max_new_tokens = max_new_tokens
        self.scope = current()
        self.num_bytes = sum(message.ByteSize() for message in messages)
        self.reply: asyncio.Future[ProcessedPrompt] = asyncio.get_running_loop().create_future()

    def succeed(self, processed: ProcessedPrompt) -> None:
        """Gives the answer to whoever still waits for it."""
        if not self.reply.done():
            self.reply.set_result(processed)

    def fail(self, error: ServiceError) -> None:
        """Tells whoever still waits why there is no answer."""
        if not self.reply.done():
            self.reply.set_exception(error)


class PreprocessPool:
    """Owner of the preprocessing processes and of the requests that wait for one. Lives on the event loop.

    A request that takes too long, or at which its process ends, fails alone: the process is replaced, and meanwhile
    the others go on.

    Args:
        launch: Starts a process.
        timeout_s: What a request may take once it is in a process.
        max_waiting: Requests that wait at most.
        max_waiting_bytes: What these may have together; one alone may have more.
    """

    def __init__(
        self,
        launch: Callable[[], PreprocessProcess],
        spec: VLMSpec,
        metrics: PrefillMetrics,
        *,
        processes: int,
        timeout_s: float,
        max_waiting: int,
        max_waiting_bytes: int,
    ) -> None:
        self._launch = launch
        self._spec = spec
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting: deque[_Work] = deque()
        self._waiting_bytes = 0
        self._arrived = asyncio.Event()
        self._first = [launch() for _ in range(processes)]
        self._places = [asyncio.get_running_loop().create_task(self._keep(process)) for process in self._first]

    def wait_ready(self) -> None:
        """Blocks until the first of the processes is ready; before anything is served.

        Raises:
            PreprocessStartError: None came up.
        """
        peers = [process.peer for process in self._first]
        readable, _, _ = select.select(peers, [], [], START_TIMEOUT_S)
        # the end of one is readable, too, and says nothing
        if not readable or not all(peer.recv(1, socket.MSG_PEEK) for peer in readable):
            raise PreprocessStartError("the preprocessing processes do not start; see their log")

    async def build(self, messages: Sequence[pb.Message], *, max_new_tokens: int, tenant: str = "") -> Prompt:
        """Checks and tokenises a conversation. Leaving early gives up its place.

        Raises:
            InvalidRequestError: Bad roles, texts or images, or images that a process could not cope with.
            ContextTooLongError: Prompt and answer do not fit the context.
            ResourceExhaustedError: Too many wait.
        """
        work = _Work(messages, max_new_tokens)
        self._enqueue(work)
        try:
            processed = await work.reply
        finally:
            if work in self._waiting:
                self._remove(work)
        return Prompt.of(processed, spec=self._spec, tenant=tenant)

    async def close(self) -> None:
        """Ends the processes, and with an error whatever they have not answered."""
        # a place that has not begun would leave its process behind
        await asyncio.sleep(0)
        for place in self._places:
            place.cancel()
        await asyncio.gather(*self._places, return_exceptions=True)
        for work in tuple(self._waiting):
            self._remove(work)
            work.fail(_closed())

    def check_integrity(self) -> None:
        """Asserts that the count of bytes is that of the requests."""
        assert self._waiting_bytes == sum(work.num_bytes for work in self._waiting)

    def _enqueue(self, work: _Work) -> None:
        too_many = len(self._waiting) >= self._max_waiting
        too_large = self._waiting and self._waiting_bytes + work.num_bytes > self._max_waiting_bytes
        if too_many or too_large:
            raise ResourceExhaustedError(
                "too many requests wait for preprocessing", reason="QUEUE_FULL", retry_after_s=1.0
            )
        self._waiting.append(work)
        self._waiting_bytes += work.num_bytes
        self._arrived.set()

    def _remove(self, work: _Work) -> None:
        self._waiting.remove(work)
        self._waiting_bytes -= work.num_bytes

    async def _next(self) -> _Work:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        work = self._waiting[0]
        self._remove(work)
        return work

    async def _keep(self, process: PreprocessProcess) -> None:
        """One place of the pool: a process, and its successor whenever one has to go."""
        while True:
            try:
                reason = await self._use(process)
            finally:
                await process.end()
            log.warning("a preprocessing process was replaced: %s", reason)
            enter(NOBODY)
            self._metrics.labelled(self._metrics.preprocess_replaced, reason=reason).inc()
            process = self._launch()

    async def _use(self, process: PreprocessProcess) -> str:
        """Gives requests to a process until it must go; says why."""
        try:
            await _within(START_TIMEOUT_S, process.ready())
        except (asyncio.TimeoutError, EOFError, OSError, FrameError):
            await asyncio.sleep(RELAUNCH_S)
            return "start"
        while (reason := await self._give(process, await self._next())) is None:
            continue
        return reason

    async def _give(self, process: PreprocessProcess, work: _Work) -> str | None:
        """One request; the reason if the process must go."""
        enter(work.scope)
        if not process.alive:
            # while it was idle: the request has no part in that
            self._waiting.appendleft(work)
            self._waiting_bytes += work.num_bytes
            self._arrived.set()
            return "ended"
        try:
            request = request_frame(work.messages, max_new_tokens=work.max_new_tokens, request_id=work.scope.request_id)
            processed = await _within(self._timeout_s, process.ask(request))
            processed.check(vocabulary=self._spec.vocabulary)
        except asyncio.TimeoutError:
            work.fail(_too_slow(self._timeout_s))
            return "timeout"
        except (EOFError, OSError, FrameError, ValueError):
            work.fail(_crashed())
            return "crash"
        except ServiceError as error:
            work.fail(error)
        except asyncio.CancelledError:
            work.fail(_closed())
            raise
        else:
            work.succeed(processed)
        return None


async def _within(timeout_s: float, asking: Coroutine[Any, Any, Answer]) -> Answer:
    """As `asyncio.wait_for`, which may swallow a cancellation before Python 3.12.

    Raises:
        asyncio.TimeoutError: There was no answer in time.
    """
    task = asyncio.ensure_future(asking)
    try:
        await asyncio.wait([task], timeout=timeout_s)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            # until it has let go of the socket
            await asyncio.wait([task])


def _too_slow(timeout_s: float) -> InvalidRequestError:
    return InvalidRequestError(
        f"the request takes longer than {timeout_s:g} s to preprocess", reason="PREPROCESS_TIMEOUT"
    )


def _crashed() -> InvalidRequestError:
    # not retryable: what has ended one process would end the next
    return InvalidRequestError("preprocessing broke down at this request", reason="PREPROCESS_CRASH")


def _closed() -> UnavailableError:
    return UnavailableError("the worker is shutting down", reason="DRAINING")
