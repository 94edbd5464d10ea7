"""The life of one prefill: [constraint ->] preprocess -> room for the parcel -> model thread -> transfer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from prefill_worker.compression.eviction import parcel_bound
from prefill_worker.compression.windows import check_policy
from prefill_worker.compute import Completion, PrefillCompute
from prefill_worker.job import Event, PrefillJob, Transferred
from prefill_worker.kv_sender import KVSender, Ticket
from prefill_worker.parcel.kept_tokens import check_explainable
from prefill_worker.parcel.retained import RetainedParcels
from prefill_worker.parcel.room import ParcelRoom
from prefill_worker.parcel.shipper import ParcelShipper
from prefill_worker.parcel.store import ParcelStore
from prefill_worker.preprocess.pool import PreprocessPool
from prefill_worker.prompt import Prompt
from prefill_worker.scheduler import PrefillScheduler
from shared.errors import DuplicateRequestError, UnavailableError, at_stage
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest
from shared.kv.transport.early_stream import EarlyStream
from shared.model.grammars import Grammars
from shared.request.params import Budget
from shared.telemetry.metrics import PrefillMetrics
from shared.telemetry.scope import current
from shared.threads import run_to_end

Result = TypeVar("Result")

# Ends the event queue of a request.
_END = None


class PrefillRunner:
    """Owner of the requests in flight. Lives on the event loop."""

    def __init__(
        self,
        *,
        preprocess: PreprocessPool,
        compute: PrefillCompute,
        scheduler: PrefillScheduler,
        store: ParcelStore,
        retained: RetainedParcels,
        sender: KVSender,
        layout: KVLayout,
        metrics: PrefillMetrics,
        grammars: Grammars,
    ) -> None:
        self._preprocessing = preprocess
        self._compute = compute
        self._scheduler = scheduler
        self._store = store
        self._retained = retained
        self._sender = sender
        self._shipper = ParcelShipper(sender, retained, metrics)
        self._layout = layout
        self._metrics = metrics
        self._grammars = grammars
        # waits for bytes and sums them up while the model thread computes the next prompt
        self._parcel_thread = ThreadPoolExecutor(1, thread_name_prefix="parcel")
        self._jobs: dict[tuple[str, int], tuple[PrefillJob, asyncio.Task[None]]] = {}
        self._resends: set[asyncio.Task[Transferred]] = set()

    async def stream(self, job: PrefillJob) -> AsyncIterator[Event]:
        """Runs a job and yields its events. Leaving early cancels the work; its memory follows when it is safe.

        Raises:
            ServiceError: What ended the job.
            DuplicateRequestError: The same attempt is running already, or its parcel's secret is in use.
        """
        key = (job.transfer.request_id, job.transfer.attempt)
        if key in self._jobs:
            raise DuplicateRequestError(f"request {job.transfer.request_id!r} is already being prefilled")
        self._retained.expect(job.parcel)
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        task = asyncio.create_task(self._run(job, events.put_nowait))
        self._jobs[key] = (job, task)
        task.add_done_callback(partial(self._forget, key))
        try:
            while (event := await events.get()) is not _END:
                yield event
            await _outcome(task)
        finally:
            if not task.done():
                job.cancelled.set()
                task.cancel()

    async def resend(self, secret: bytes, attempt: int, ticket: Ticket) -> Transferred:
        """Sends a retained parcel to another reservation.

        Raises:
            NotFoundError: It is not retained any more.
            ServiceError: The transfer failed.
        """
        task = asyncio.create_task(self._shipper.resend(secret, attempt, ticket))
        self._resends.add(task)
        task.add_done_callback(self._resends.remove)
        task.add_done_callback(_look)
        try:
            return await _outcome(task)
        finally:
            task.cancel()

    @property
    def orphan_bytes(self) -> int:
        """Bytes of parcels that have ended, or that no call fills: what nobody will ever send."""
        filling = 0 if self._jobs else self._retained.filling_bytes
        return filling + self._retained.lingering_bytes

    def expire(self, now: float) -> None:
        """Gives up the retained parcels that nobody renewed."""
        expired = self._retained.expire(now)
        self._metrics.labelled(self._metrics.lease_expired, side="prefill").inc(expired)

    async def drain(self, timeout_s: float) -> None:
        """Lets what is in flight finish for `timeout_s`, then cancels it; afterwards nothing is retained either."""
        tasks: set[asyncio.Task[Any]] = {*self._resends, *(task for _, task in self._jobs.values())}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            for job, _ in self._jobs.values():
                job.cancelled.set()
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        self._retained.clear()

    def close(self) -> None:
        """Ends the threads of a drained worker."""
        self._parcel_thread.shutdown()
        self._scheduler.close()
        self._grammars.close()

    def check_integrity(self) -> None:
        """Asserts that an idle worker holds nothing but what it retains."""
        self._store.check_integrity()
        self._grammars.check_integrity()
        self._retained.check_integrity(idle=not self._jobs)
        if not self._jobs:
            assert self._retained.filling_bytes == 0, "a slot outlived its request"
            assert self._scheduler.outstanding_tokens == 0

    def _forget(self, key: tuple[str, int], task: asyncio.Task[None]) -> None:
        job, _ = self._jobs.pop(key)
        self._retained.expect_no_more(job.parcel)
        _look(task)

    async def _run(self, job: PrefillJob, emit: Callable[[Event | None], None]) -> None:
        try:
            async with self._sender.keep_alive(job.ticket):
                await self._run_stages(job, emit)
        finally:
            emit(_END)

    async def _run_stages(self, job: PrefillJob, emit: Callable[[Event | None], None]) -> None:
        with at_stage("preprocess"):
            check_policy(job.policy, self._layout)
            # first of all: what is refused has cost nothing
            job = replace(job, grammar=await self._grammars.of(job.sampling.constraint))
            prompt = await self._preprocess(job)
            if job.explain:
                check_explainable(prompt.shape.num_tokens + job.policy.look_ahead, self._layout)
        with at_stage("prefill"):
            room = await ParcelRoom.reserve(self._store, self._parcel_bound(job, prompt))
            try:
                async with self._sender.early(job.ticket, self._parcel_thread) as early:
                    manifest = await self._compute_parcel(job, prompt, room, emit, early)
                    if manifest is not None:
                        await self._shipper.ship(room, manifest, job, emit, early)
            finally:
                room.free()

    async def _compute_parcel(
        self,
        job: PrefillJob,
        prompt: Prompt,
        room: ParcelRoom,
        emit: Callable[[Event | None], None],
        early: EarlyStream | None,
    ) -> Manifest | None:
        """Writes the parcel; None where the first tokens end the answer."""
        loop = asyncio.get_running_loop()

        def emit_here(event: Event) -> None:
            loop.call_soon_threadsafe(emit, event)

        def more_room(budget: Budget) -> memoryview | None:
            growing = self._grow(room, replace(job, budget=budget), prompt)
            return room.body if asyncio.run_coroutine_threadsafe(growing, loop).result() else None

        def work() -> Completion | None:
            waited_s = time.monotonic() - asked
            self._metrics.queue_time.observe(waited_s)
            current().span.stage("prefill_queue", waited_s, {})
            return self._compute.run(job, prompt, room.body, emit_here, more_room, early)

        asked = time.monotonic()
        complete = await self._scheduler.run(work, num_tokens=prompt.shape.num_tokens, cancelled=job.cancelled)
        if complete is None:
            return None
        with at_stage("select"):
            return await run_to_end(self._parcel_thread, complete)

    async def _grow(self, room: ParcelRoom, job: PrefillJob, prompt: Prompt) -> bool:
        return await room.grow(self._parcel_bound(job, prompt), self._sender, job.ticket, _rows_bound(job, prompt))

    def _parcel_bound(self, job: PrefillJob, prompt: Prompt) -> int:
        return parcel_bound(job.policy, self._layout, _rows_bound(job, prompt))

    async def _preprocess(self, job: PrefillJob) -> Prompt:
        started = time.monotonic()
        max_new_tokens = job.sampling.max_new_tokens
        prompt = await self._preprocessing.build(job.messages, max_new_tokens=max_new_tokens, tenant=job.tenant)
        self._metrics.observe_stage(
            "preprocess",
            time.monotonic() - started,
            prompt_tokens=prompt.shape.num_tokens,
            visual_tokens=prompt.shape.num_visual,
        )
        for pixels in prompt.pixels:
            self._metrics.image_pixels.observe(pixels)
        return prompt


def _rows_bound(job: PrefillJob, prompt: Prompt) -> int:
    visual = prompt.shape.num_visual
    return job.rows_bound(prompt.shape.num_tokens - visual, visual)


async def _outcome(task: asyncio.Task[Result]) -> Result:
    """What a task ends with.

    Raises:
        UnavailableError: A drain has cancelled it; the caller is not cancelled with it.
    """
    await asyncio.wait([task])
    if task.cancelled():
        raise UnavailableError("the worker is shutting down", reason="DRAINING")
    return task.result()


def _look(task: asyncio.Task[Any]) -> None:
    """The caller may be gone; asyncio would complain that nobody looked."""
    if not task.cancelled():
        task.exception()
