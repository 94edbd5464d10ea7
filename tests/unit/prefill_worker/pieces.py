"""Scripted pieces around a real `PrefillRunner`, each with a stage to stop at."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import Any

from vlcache.v1 import inference_pb2 as public

from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.job import Compressed, Event, FirstToken, PrefillJob
from prefill_worker.kv_sender import Ticket
from prefill_worker.parcel.retained import RetainedParcels
from prefill_worker.parcel.store import ParcelStore
from prefill_worker.prompt import Prompt
from prefill_worker.runner import PrefillRunner
from prefill_worker.scheduler import PrefillScheduler
from shared.errors import RequestCancelledError
from shared.kv.arena import Arena
from shared.kv.manifest import Manifest, TransferId
from shared.kv.secret import SECRET_BYTES
from shared.kv.transport.base import Parcel, SendReport
from shared.model.grammars import Grammars
from shared.request.params import Budget
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.prefill_worker.compression.observing import prompt_shape
from tests.unit.prefill_worker.manifests import LAYOUT, manifest
from tests.unit.prefill_worker.prompts import raw_prompt

TOKENS = 40
BOUND = LAYOUT.full_bytes(Budget(retention=0.5).kept_tokens_bound(TOKENS, 0))
FIRST = FirstToken(
    token=5, text="a", finish_reason=public.FINISH_REASON_UNSPECIFIED, prompt_tokens=TOKENS, visual_tokens=0
)


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 - threads change it, too
        await asyncio.sleep(0.005)


class Stage:
    """Passes at once, waits for `open`, or raises; usable from a thread and from the event loop."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()
        self.error: Exception | None = None

    def block(self) -> None:
        self.open.clear()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.open.wait(10)
        if self.error is not None:
            raise self.error


class Pieces:
    """Everything around the runner, with a stage to stop at in each."""

    def __init__(
        self, arena_bytes: int = 4 * BOUND, max_waiting: int = 4, retained_bytes: int = 4 * BOUND, lease_s: float = 30.0
    ) -> None:
        self.building, self.computing, self.arriving, self.sending = Stage(), Stage(), Stage(), Stage()
        self.first, self.ships = FIRST, True
        self.sent: list[bytes] = []
        self.sent_as: list[TransferId] = []
        self.wants: Budget | None = None
        self.got: memoryview | None = None
        self.grants, self.asked = True, list[int]()
        self.kept_alive = 0
        self.arena = Arena(arena_bytes)
        self.store = ParcelStore(self.arena)
        self.retained = RetainedParcels(self.store, capacity=retained_bytes, lease_s=lease_s)
        self.metrics = PrefillMetrics(worker="p", model="m")
        self.scheduler = PrefillScheduler(max_waiting=max_waiting)
        self.runner = PrefillRunner(
            preprocess=self,  # type: ignore[arg-type]
            compute=self,  # type: ignore[arg-type]
            scheduler=self.scheduler,
            store=self.store,
            retained=self.retained,
            sender=self,  # type: ignore[arg-type]
            layout=LAYOUT,
            metrics=self.metrics,
            grammars=Grammars(None, vocabulary=1, eos_token_ids=()),
        )

    async def build(self, messages: Any, *, max_new_tokens: int, tenant: str) -> Prompt:
        await asyncio.get_running_loop().run_in_executor(None, self.building.pass_through)
        return raw_prompt([1] * TOKENS, prompt_shape(TOKENS))

    def run(
        self,
        job: PrefillJob,
        prompt: Prompt,
        body: memoryview,
        emit: Callable[[Event], None],
        more_room: Callable[[Budget], memoryview | None],
        early: Any,
    ) -> Any:
        emit(self.first)
        self.computing.pass_through()
        if self.wants is not None:
            self.got = more_room(self.wants)
            body = self.got or body
        if job.cancelled.is_set():
            raise RequestCancelledError("cancelled before layer 3")
        if not self.ships:
            return None
        made = manifest()
        emit(Compressed(message=public.Compression(kept_bytes=made.body_bytes)))
        return partial(self._complete, made, body)

    def _complete(self, made: Manifest, body: memoryview) -> Manifest:
        """The bytes arrive after the model thread is done, as they do from a GPU."""
        self.arriving.pass_through()
        body[: made.body_bytes] = b"k" * made.body_bytes
        return made

    @contextlib.asynccontextmanager
    async def keep_alive(self, ticket: Ticket) -> AsyncIterator[None]:
        self.kept_alive += 1
        try:
            yield
        finally:
            self.kept_alive -= 1

    @contextlib.asynccontextmanager
    async def early(self, ticket: Ticket, thread: Executor) -> AsyncIterator[None]:
        """Nothing leaves early."""
        yield None

    async def grow(self, ticket: Ticket, kept_tokens_bound: int) -> bool:
        self.asked.append(kept_tokens_bound)
        return self.grants

    async def send(self, parcel: Parcel, ticket: Ticket, early: None = None) -> SendReport:
        self.sending.reached.set()
        await until(self.sending.open.is_set)
        self.sending.pass_through()
        self.sent.append(bytes(parcel.body))
        self.sent_as.append(parcel.manifest.transfer)
        return SendReport(transport="grpc", sent_bytes=len(parcel.body), seconds=0.1)


def job(request_id: str = "r", attempt: int = 1, parcel: bytes | None = None) -> PrefillJob:
    """Its parcel is retained under a secret of its own, unless it is told another one."""
    return PrefillJob(
        transfer=TransferId(request_id=request_id, attempt=attempt, prefill_epoch="e"),
        messages=(),
        sampling=Sampling(max_new_tokens=8),
        budget=Budget(retention=0.5),
        policy=VLCache(),
        ticket=ticket(),
        parcel=secrets.token_bytes(SECRET_BYTES) if parcel is None else parcel,
    )


def ticket(decode_worker: str = "d") -> Ticket:
    return Ticket(decode_worker=decode_worker, address="x:1", token=b"t", transport="grpc", lease_s=30.0)


async def collect(pieces: Pieces, what: PrefillJob) -> list[Event]:
    return [event async for event in pieces.runner.stream(what)]


async def reached(stage: Stage) -> None:
    await asyncio.get_running_loop().run_in_executor(None, stage.reached.wait, 10)


async def idle(pieces: Pieces) -> None:
    await until(lambda: not pieces.runner._jobs)


def run(body: Callable[[Pieces], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        pieces = Pieces(**options)
        try:
            await asyncio.wait_for(body(pieces), 20)
            await asyncio.wait_for(idle(pieces), 20)
            pieces.runner.check_integrity()
            pieces.retained.clear()
            assert pieces.store.used_bytes == pieces.scheduler.outstanding_tokens == pieces.kept_alive == 0
        finally:
            for stage in (pieces.building, pieces.computing, pieces.arriving, pieces.sending):
                stage.open.set()
            pieces.runner.close()
            pieces.arena.close()

    asyncio.run(main())
