"""First come, first served access to the one thread that runs the model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from shared.errors import ResourceExhaustedError
from shared.threads import run_to_end

Result = TypeVar("Result")


class PrefillScheduler:
    """Queues compute for the model thread. Lives on the event loop, which never computes itself."""

    def __init__(self, *, max_waiting: int) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._max_waiting = max_waiting
        self._tokens: list[int] = []
        self._ended = 0

    @property
    def running(self) -> int:
        """Prompts being computed: 0 or 1."""
        return min(1, len(self._tokens))

    @property
    def waiting(self) -> int:
        """Prompts in the queue."""
        return max(0, len(self._tokens) - 1)

    @property
    def outstanding_tokens(self) -> int:
        """Prompt tokens queued or being computed."""
        return sum(self._tokens)

    @property
    def ended(self) -> int:
        """Prompts that the thread has let go of since the start, however they ended."""
        return self._ended

    async def run(self, compute: Callable[[], Result], *, num_tokens: int, cancelled: threading.Event) -> Result:
        """Runs `compute` in the model thread.

        When the caller is cancelled, `cancelled` is set and the call still waits until the thread has let go: the
        memory that it writes to must not be given to anyone else before.

        Raises:
            ResourceExhaustedError: The queue is full.
        """
        if self.waiting >= self._max_waiting:
            raise ResourceExhaustedError("this worker's queue is full", reason="QUEUE_FULL", retry_after_s=1.0)
        self._tokens.append(num_tokens)
        try:
            return await run_to_end(self._thread, compute, on_cancel=cancelled.set)
        finally:
            self._tokens.remove(num_tokens)
            self._ended += 1

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        self._thread.shutdown(wait=True, cancel_futures=True)
