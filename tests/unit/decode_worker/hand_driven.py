"""A whole decode worker without threads and sockets: steps, copies and deliveries happen when a test says so."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from vlcache.worker.v1 import decode_pb2 as pb

from decode_worker.config import DecodeConfig
from decode_worker.scheduler import DecodeScheduler, StepOutcome
from decode_worker.token_outbox import TokenOutbox
from decode_worker.worker import DecodeWorker, LoadedModel
from shared.errors import NotFoundError
from shared.model.identity import ModelIdentity
from tests.unit.decode_worker.marks import (
    EOS,
    FIRST_TOKEN,
    LAYOUT,
    Client,
    MarkingEngine,
    answer,
    manifest_for,
    num_kept,
    parcel_body,
    whole_answer,
)
from tests.unit.decode_worker.pools import Pool
from tests.unit.decode_worker.serving import EPOCH, frames

# more turns of the event loop than any chain of tasks of the worker takes
SETTLING = 12
# A call of nobody's trace.
CALL: Any = SimpleNamespace(invocation_metadata=tuple)


class HeldThread(Executor):
    """Work waits until it is told to run."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, work: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: work(*args, **more)))
        return future

    def run_next(self, error: Exception | None = None) -> None:
        """The oldest piece of work; with an error it fails instead."""
        future, work = self.waiting.popleft()
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(work())


class HeldScheduler(DecodeScheduler):
    """Its thread ends at once; `turn` does what the thread would."""

    def _loop(self) -> None:
        pass

    def turn(self) -> None:
        if self._joining or self._leaving or self._running:
            self._turn()


class HandDriven:
    """The worker on an event loop that turns only inside these methods."""

    def __init__(self, pool: Pool, *, promised_tokens: int | None, max_num_seqs: int = 4) -> None:
        self.pool, self.clients = pool, list[Client]()
        self.engine, self.delivered = MarkingEngine(pool), deque[StepOutcome]()
        self.loop = asyncio.new_event_loop()
        config = DecodeConfig(
            model="marks", promised_tokens=promised_tokens, max_num_seqs=max_num_seqs, transport="grpc", lease_s=1e6
        )
        self._run(self._build, config)
        self.reservations = self.worker._reservations
        self.runner, self.parking = self.worker.runner, self.worker.runner._parking
        self.outboxes = [TokenOutbox(), TokenOutbox()]

    async def _build(self, config: DecodeConfig) -> None:
        identity = ModelIdentity(name="marks", compatibility="same", layout=LAYOUT, context_tokens=400, vocabulary=200)
        tokenizer = SimpleNamespace(decode=lambda tokens, **_: "".join(map(chr, tokens)))
        spec: Any = SimpleNamespace(eos_token_ids=frozenset({EOS}))
        model = LoadedModel(model=None, tokenizer=tokenizer, spec=spec, identity=identity)  # type: ignore[arg-type]
        with (
            mock.patch("decode_worker.runner.ThreadPoolExecutor", HeldThread),
            mock.patch("decode_worker.worker.DecodeScheduler", HeldScheduler),
        ):
            self.worker = DecodeWorker(config, model, self.pool, self.engine)
        self.thread: HeldThread = self.worker.runner._install_thread  # type: ignore[assignment]
        self.scheduler: HeldScheduler = self.worker.runner._scheduler  # type: ignore[assignment]
        self.scheduler._deliver = self.delivered.append

    def _run(self, work: Callable[..., Any], *args: Any) -> Any:
        async def main() -> Any:
            result = work(*args)
            result = await result if asyncio.iscoroutine(result) else result
            for _ in range(SETTLING):
                await asyncio.sleep(0)
            return result

        return self.loop.run_until_complete(main())

    def reserve(self, max_new_tokens: int, stream: int = 0, *, known: int = 0, announced: bool = True) -> Client:
        """Raises what the servicer raises.

        Args:
            known: Tokens of the answer beside the first that its reader has, if there are more.
            announced: Whether the reservation speaks of them.
        """
        seed = len(self.clients)
        known = min(known, len(whole_answer(seed, max_new_tokens)) - 1)
        request = pb.ReserveRequest(
            request_id=str(seed),
            attempt=1,
            compatibility="same",
            kept_tokens_bound=math.ceil(sum(num_kept(seed)) / 2),
            max_new_tokens=max_new_tokens,
            answers=[pb.ReservedAnswer(delivered_tokens=known + 1 if known and announced else 0)],
            prefill_epoch=EPOCH,
            epoch=self.worker.servicer._epoch,
        )
        response = self._run(self.worker.servicer.Reserve, request, CALL)
        (held,) = self.reservations.find(response.token).answers.values()
        self.clients.append(Client(seed, max_new_tokens, response.token, stream, held, known))
        return self.clients[-1]

    def put(self, client: Client) -> None:
        """Starts a delivery; the copy is left to the thread."""
        body = memoryview(parcel_body(client.seed, 0))

        async def sent() -> Any:
            for frame in frames(client.token, manifest_for(client), body):
                yield frame

        def start() -> None:
            receiver = self.worker.receiver
            client.put = self.loop.create_task(receiver.put(sent(), None))  # type: ignore[arg-type]

        self._run(start)

    def attach(self, client: Client) -> None:
        client.attached = True
        delivered = (FIRST_TOKEN, *answer(client.seed)[: client.known]) if client.known else ()
        self._run(self.runner.attach, client.held.reservation, self.outboxes[client.stream], client.seed, delivered)

    def ready(self, max_new_tokens: int, stream: int = 0) -> Client:
        """Reserved, delivered and attached."""
        client = self.reserve(max_new_tokens, stream)
        self.put(client)
        self.attach(client)
        self.copy()
        return client

    def turn(self) -> None:
        """The step thread."""
        self.scheduler.turn()

    def deliver(self) -> None:
        """The event loop hears of the oldest outcome."""
        self._run(self.runner.deliver, self.delivered.popleft())

    def copy(self, error: Exception | None = None) -> None:
        """The install thread."""

        def work() -> None:
            self.thread.run_next(error)

        self._run(work)

    def end(self, how: str, client: Client) -> None:
        client.left = True
        if how == "cancel":
            self._run(self.runner.cancel, self.outboxes[client.stream], client.seed)
        elif how == "release":
            self._run(self.worker.servicer.Release, pb.ReleaseRequest(token=client.token), None)
        elif how == "stream break":
            for other in self.clients:
                other.left |= other.attached and other.stream == client.stream
            self._run(self.runner.detach, self.outboxes[client.stream])
        elif how == "expiry":
            for other in self.clients:
                other.left |= not (other.attached and other.delivered)
            self._run(self.runner.expire, math.inf)
        elif how == "drain":
            for other in self.clients:
                other.left = True
            self._run(self._drain)

    def hear(self) -> None:
        """Reads both streams; asserts that each client heard the beginning of its answer, or all of it."""
        for stream, outbox in enumerate(self.outboxes):
            for update in outbox._updates:
                client = next(each for each in self.clients if (each.seed, each.stream) == (update.handle, stream))
                assert not client.finished, "nothing follows the last update"
                client.tokens += update.token_ids
                client.error = update.error.reason
                client.finished = bool(update.finish_reason or update.HasField("error"))
            outbox._updates = []
        for client in self.clients:
            assert client.tokens == client.expected[: len(client.tokens)]
            if client.finished and not client.error:
                assert client.tokens == client.expected

    def check(self) -> None:
        """What holds after every event."""
        self.hear()
        for client in self.clients:
            if client.put is not None and client.put.done() and not client.put.cancelled() and client.put.exception():
                client.put = None  # its sender knows, and may try again
        self.runner.check_integrity()
        parked = [held for held in self.reservations.answers if held.parked]
        assert all(held.allocation is None and not held.in_use for held in parked)
        assert [held for held in self.parking._queue if not held.ended] == sorted(parked, key=lambda held: held.arrival)
        if parked and not (self.parking._moving_out or self.runner._evicted):
            running = [held.arrival for held in self.runner._joined.values() if not held.ended]
            assert max(running, default=(-1, 0)) < parked[0].arrival, "a younger one runs while an older one waits"

    def round(self) -> None:
        """Everyone gets a turn."""
        self.turn()
        while self.delivered:
            self.deliver()
        while self.thread.waiting:
            self.copy()
        self.check()

    def finish(self, rounds: int) -> None:
        """Lets everyone who can finish do so: those that nobody reads or delivers are released."""
        for client in self.clients:
            if client.put is None and self._alive(client):
                self.end("release", client)
            if not client.attached and self._alive(client):
                self.attach(client)
        for _ in range(rounds):
            self.round()
            if not list(self.reservations):
                break
        self.check()
        assert self.pool.used_bytes == 0
        assert self.reservations.idle.is_set()
        assert self.reservations.parked_bytes == 0
        assert not self.runner._joined
        assert not self.runner._evicted
        assert not self.parking._copies
        assert not self.parking._moving_out
        for client in self.clients:
            assert client.left or client.error or client.tokens == client.expected, f"{client.seed} did not finish"

    def preemptions(self, reason: str) -> float:
        metrics = self.worker.metrics
        return metrics.labelled(metrics.preemptions, reason=reason)._value.get()

    def close(self) -> None:
        self._run(self.worker.close)
        self.loop.close()

    def _drain(self) -> None:
        """Starts one that waits for nobody; it ends when nothing is held."""
        self.drain = self.loop.create_task(self.worker.drain(0))

    def _alive(self, client: Client) -> bool:
        try:
            self.reservations.find(client.token)
        except NotFoundError:
            return False
        return True


@contextmanager
def hand_driven(pool: Pool, **settings: Any) -> Iterator[HandDriven]:
    driven = HandDriven(pool, **settings)
    try:
        yield driven
    finally:
        driven.close()
