"""Scripted workers and a real router in front of them, all in one event loop and over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import grpc
from vlcache.v1 import inference_pb2 as pb
from vlcache.v1 import inference_pb2_grpc
from vlcache.worker.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, worker_pb2

from router.config import RouterConfig
from router.router import Router
from shared.errors import FailedPreconditionError, NotFoundError, ServiceError
from shared.rpc.access import RoleInterceptor
from shared.rpc.identity import Identity
from shared.rpc.server import RpcServer
from shared.rpc.status import code_number
from tests.tasks import check_none_is_left

TIMEOUT_S = 60.0
FULL_BYTES, KEPT_BYTES, SENT_BYTES = 1000, 100, 120
# 2 layers x (K, V) x 2 heads x 8 values x 4 bytes
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a test's coroutine under a time limit and fails when it leaves tasks behind."""

    async def guarded() -> None:
        await asyncio.wait_for(main(), TIMEOUT_S)
        await check_none_is_left()

    asyncio.run(guarded())


class Log(list[Any]):
    """A list whose growth can be awaited."""

    def __init__(self) -> None:
        super().__init__()
        self._grown = asyncio.Event()

    def append(self, item: Any) -> None:
        super().append(item)
        self._grown.set()

    async def reaches(self, length: int) -> Any:
        """Waits for the `length`-th item and returns it."""
        while len(self) < length:
            self._grown.clear()
            await asyncio.wait_for(self._grown.wait(), TIMEOUT_S)
        return self[length - 1]


def served_model(name: str = "toy", **changes: Any) -> worker_pb2.ServedModel:
    values: dict[str, Any] = {
        "name": name,
        "compatibility": "same",
        "layout": worker_pb2.KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32"),
        "context_tokens": 4096,
        "max_images": 2,
        "template_tokens": 20,
        "max_tokens_per_image": 576,
        "max_marker_tokens_per_image": 6,
        "policies": ["vl_cache", "streaming"],
        "default_policy": "vl_cache",
        "default_retention": 0.1,
        "max_new_tokens": 64,
        "default_max_new_tokens": 16,
    }
    return worker_pb2.ServedModel(**(values | changes))


class FakeWorker:
    """What both roles share: who they are, where they listen."""

    role = ""

    def __init__(self, name: str, *, model: worker_pb2.ServedModel | None = None) -> None:
        self.info = worker_pb2.WorkerInfo(
            name=name, role=self.role, epoch=f"{name}-1", state="ready", model=model or served_model(), version="0"
        )
        self.polls = Log()
        self.answers_polls = True
        self.identity: Identity | None = None

    async def start(self, port: int = 0) -> None:
        secure = self.identity is not None
        self.server = await RpcServer.start(
            name=self.info.name,
            host="127.0.0.1",
            port=port,
            register=self.register,
            services=[],
            credentials=self.identity.server_credentials(demand_client_cert=True) if secure else None,
            guards=[RoleInterceptor()] if secure else [],
        )
        self.address = self.server.address

    async def stop(self) -> None:
        await self.server.stop(0)

    async def restart(self) -> None:
        """Dies and comes back under the same address with another epoch."""
        await self.stop()
        self.info.epoch += "'"
        await self.start(int(self.address.rpartition(":")[2]))

    def register(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    async def GetWorkerInfo(self, request: Any, context: Any) -> worker_pb2.WorkerInfo:  # noqa: N802
        self.polls.append(self.info.state)
        if not self.answers_polls:
            await forever()
        return self.info

    def check_epoch(self, epoch: str) -> None:
        if epoch != self.info.epoch:
            raise FailedPreconditionError("the worker was restarted", reason="EPOCH")


def first_token(text: str = "A", reason: int = 0) -> prefill_pb2.PrefillEvent:
    token = prefill_pb2.FirstToken(token_id=1, text=text, finish_reason=reason, prompt_tokens=50, visual_tokens=40)
    return prefill_pb2.PrefillEvent(first_token=token)


def next_token(text: str, token_id: int, reason: int = 0) -> prefill_pb2.PrefillEvent:
    """A token that was decoded ahead."""
    token = prefill_pb2.NextToken(text=text, token_id=token_id, finish_reason=reason)
    return prefill_pb2.PrefillEvent(next_token=token)


def compression() -> prefill_pb2.PrefillEvent:
    message = pb.Compression(
        policy="vl_cache", realised_retention=0.1, full_bytes=FULL_BYTES, kept_bytes=KEPT_BYTES, prompt_tokens=50
    )
    return prefill_pb2.PrefillEvent(compression=message)


def transfer() -> prefill_pb2.PrefillEvent:
    return prefill_pb2.PrefillEvent(transfer=pb.Transfer(transport="memory", sent_bytes=SENT_BYTES, seconds=0.01))


def retained() -> prefill_pb2.PrefillEvent:
    """The parcel stays; the worker fills in its lease."""
    return prefill_pb2.PrefillEvent(retained=prefill_pb2.Retained())


def prompt_done() -> list[Any]:
    """What a prefill worker says when all goes well."""
    return [first_token(), compression(), retained(), transfer()]


class FakePrefill(FakeWorker, prefill_pb2_grpc.PrefillServiceServicer):
    """Says what its script says; a script is a list of events, errors to raise, and awaitables to wait for.

    Parcels that its events retain can be resent until they are released, or their call is cancelled. One that
    `hears_cancels` too late has always just made the parcel, and said so to nobody.
    """

    role = "prefill"

    def __init__(self, name: str = "prefill-0", **options: Any) -> None:
        super().__init__(name, **options)
        self.info.arena_socket = f"/run/{name}.sock"
        self.script: Callable[[prefill_pb2.PrefillRequest], list[Any]] = lambda _: prompt_done()
        self.on_resend: Callable[[prefill_pb2.ResendRequest], Awaitable[None] | None] = lambda _: None
        self.requests, self.resends = Log(), Log()
        self.renewals, self.parcel_releases = Log(), Log()
        self.cancelled = Log()
        self.time_left_s = 0.0
        self.parcels: set[bytes] = set()
        self.parcel_lease_s = 30.0
        self.given_up: set[bytes] = set()
        self.hears_cancels = True

    def register(self, server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)

    async def Prefill(self, request: Any, context: Any) -> AsyncIterator[prefill_pb2.PrefillEvent]:  # noqa: N802
        self.check_epoch(request.epoch)
        self.requests.append(request)
        self.time_left_s = context.time_remaining()
        try:
            for step in self.script(request):
                if isinstance(step, ServiceError):
                    raise step
                if isinstance(step, prefill_pb2.PrefillEvent):
                    yield self._retaining(step, request)
                else:
                    await step
        except (asyncio.CancelledError, GeneratorExit):
            if self.hears_cancels:
                self.parcels.discard(request.parcel)
            else:
                self._retain(request)
            self.cancelled.append(request.request.request_id)
            raise

    def _retain(self, request: prefill_pb2.PrefillRequest) -> None:
        if request.parcel not in self.given_up:
            self.parcels.add(request.parcel)

    def _retaining(
        self, event: prefill_pb2.PrefillEvent, request: prefill_pb2.PrefillRequest
    ) -> prefill_pb2.PrefillEvent:
        if event.HasField("retained"):
            self._retain(request)
            event.retained.lease_s = self.parcel_lease_s
        return event

    async def Resend(self, request: Any, context: Any) -> prefill_pb2.ResendResponse:  # noqa: N802
        self.resends.append(request)
        if request.parcel not in self.parcels:
            raise NotFoundError("the parcel is gone", reason="NO_PARCEL", stage="transfer")
        waiting = self.on_resend(request)
        if waiting is not None:
            await waiting
        return prefill_pb2.ResendResponse(transfer=transfer().transfer)

    async def RenewParcels(self, request: Any, context: Any) -> prefill_pb2.RenewParcelsResponse:  # noqa: N802
        self.renewals.append(list(request.parcels))
        gone = [parcel for parcel in request.parcels if parcel not in self.parcels]
        return prefill_pb2.RenewParcelsResponse(gone=gone)

    async def ReleaseParcels(self, request: Any, context: Any) -> prefill_pb2.ReleaseParcelsResponse:  # noqa: N802
        self.parcels.difference_update(request.parcels)
        self.given_up.update(request.parcels)
        self.parcel_releases.append(list(request.parcels))
        return prefill_pb2.ReleaseParcelsResponse()


class FakeDecode(FakeWorker, decode_pb2_grpc.DecodeServiceServicer):
    """Promises memory by its `admit`, and answers an attachment with its `script`."""

    role = "decode"

    def __init__(self, name: str = "decode-0", **options: Any) -> None:
        super().__init__(name, **options)
        self.info.kv.capacity = 1 << 20
        self.admit: Callable[[decode_pb2.ReserveRequest], Awaitable[None] | None] = lambda _: None
        self.script: Callable[[Stream, int, bytes], Awaitable[None]] = say("B", "C")
        self.reserves, self.releases, self.streams = Log(), Log(), Log()
        self.attached, self.cancels = Log(), Log()
        self.delivered = Log()
        """What each attachment brought."""
        self.live: set[bytes] = set()
        self._tokens = (f"token-{number}".encode() for number in itertools.count(1))

    def register(self, server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

    async def Reserve(self, request: Any, context: Any) -> decode_pb2.ReserveResponse:  # noqa: N802
        self.check_epoch(request.epoch)
        self.reserves.append(request)
        waiting = self.admit(request)
        if waiting is not None:
            await waiting
        token = next(self._tokens)
        self.live.add(token)
        reserved = (request.kept_tokens_bound + request.max_new_tokens) * TOKEN_BYTES
        return decode_pb2.ReserveResponse(token=token, transport="memory", reserved_bytes=reserved, lease_s=30)

    async def Release(self, request: Any, context: Any) -> decode_pb2.ReleaseResponse:  # noqa: N802
        self.live.discard(request.token)
        self.releases.append(request.token)
        return decode_pb2.ReleaseResponse()

    async def StreamTokens(  # noqa: N802
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[decode_pb2.TokenStreamResponse]:
        stream = Stream(self)
        self.streams.append(stream)
        reading = asyncio.create_task(stream.read(requests))
        try:
            while (message := await stream.outbox.get()) is not None:
                yield message
        finally:
            reading.cancel()
            await asyncio.gather(reading, *stream.sequences.values(), return_exceptions=True)


class Stream:
    """One opened token stream, seen by the decode worker."""

    def __init__(self, worker: FakeDecode) -> None:
        self.worker = worker
        self.outbox: asyncio.Queue[decode_pb2.TokenStreamResponse | None] = asyncio.Queue()
        self.delivered: dict[int, list[int]] = {}
        self.choices: dict[int, int] = {}
        self.sequences: dict[int, asyncio.Task[None]] = {}

    async def read(self, requests: AsyncIterator[decode_pb2.TokenStreamRequest]) -> None:
        try:
            async for request in requests:
                if request.HasField("attach"):
                    handle, token = request.attach.handle, request.attach.token
                    self.delivered[handle] = list(request.attach.delivered)
                    self.choices[handle] = request.attach.choice
                    self.worker.delivered.append(self.delivered[handle])
                    self.sequences[handle] = asyncio.create_task(self._answer(handle, token))
                    self.worker.attached.append(handle)
                else:
                    self.sequences[request.cancel.handle].cancel()
                    self.worker.cancels.append(request.cancel.handle)
        finally:
            for task in self.sequences.values():
                task.cancel()

    async def _answer(self, handle: int, token: bytes) -> None:
        await self.worker.script(self, handle, token)
        self.worker.live.discard(token)

    def send(self, *updates: decode_pb2.SequenceUpdate) -> None:
        self.outbox.put_nowait(decode_pb2.TokenStreamResponse(updates=updates))

    def say_draining(self) -> None:
        """As a worker that leaves does."""
        self.outbox.put_nowait(decode_pb2.TokenStreamResponse(draining=True))

    def fail(self, handle: int, error: ServiceError) -> None:
        """Ends one sequence by an error."""
        message = decode_pb2.SequenceError(code=code_number(error), reason=error.reason, message=error.message)
        self.send(decode_pb2.SequenceUpdate(handle=handle, error=message))

    def end(self) -> None:
        """Ends the stream as a worker that stops does."""
        self.outbox.put_nowait(None)


def say(*texts: str) -> Callable[[Stream, int, bytes], Awaitable[None]]:
    """A script: one update per text, the last with finish reason LENGTH."""

    async def script(stream: Stream, handle: int, token: bytes) -> None:
        for number, text in enumerate(texts, start=2):
            reason = pb.FINISH_REASON_LENGTH if number == len(texts) + 1 else 0
            stream.send(decode_pb2.SequenceUpdate(handle=handle, token_ids=[number], text=text, finish_reason=reason))

    return script


ANSWER = "ABCDEFGH"


def go_on(
    *, until: int = len(ANSWER), then: Callable[[Stream, int], Awaitable[None]] | None = None
) -> Callable[[Stream, int, bytes], Awaitable[None]]:
    """A script: a token for each letter of `ANSWER`, whose ids count from 1, behind what was delivered.

    Args:
        until: Tokens that the client has when the script is over.
        then: What happens then, unless the answer is complete.
    """

    async def script(stream: Stream, handle: int, token: bytes) -> None:
        for number in range(len(stream.delivered[handle]) + 1, until + 1):
            reason = pb.FINISH_REASON_LENGTH if number == len(ANSWER) else 0
            text = ANSWER[number - 1]
            stream.send(decode_pb2.SequenceUpdate(handle=handle, token_ids=[number], text=text, finish_reason=reason))
        if then is not None:
            await then(stream, handle)

    return script


async def hang(stream: Stream, handle: int, token: bytes) -> None:
    """A script that says nothing until it is cancelled."""
    await asyncio.get_running_loop().create_future()


def forever() -> Awaitable[None]:
    """A step of a prefill script that never ends."""
    return asyncio.get_running_loop().create_future()


class Bench:
    """A router with its fakes, and the client's end of the channel."""

    def __init__(self, router: Router, channel: grpc.aio.Channel, prefill: list[FakePrefill], decode: list[FakeDecode]):
        self.router, self.channel = router, channel
        self.prefill, self.decode = prefill, decode
        self.stub = inference_pb2_grpc.InferenceServiceStub(channel)

    def ask(self, *, timeout: float | None = None, tenant: str | None = None, **fields: Any) -> Any:
        """Starts a request; iterate or `read` the call."""
        metadata = () if tenant is None else (("vlcache-tenant", tenant),)
        return self.stub.Generate(ask(**fields), timeout=timeout, metadata=metadata)

    async def answer(self, **fields: Any) -> list[pb.GenerateResponse]:
        """The events of a whole answer."""
        return [event async for event in self.ask(**fields)]

    async def becomes(self, ready: Callable[[], bool]) -> None:
        """Waits for a state of the worker table."""
        while True:
            change = self.router.table.next_change()
            if ready():
                return
            await asyncio.wait_for(change.wait(), TIMEOUT_S)

    async def becomes_waiting(self, count: int) -> None:
        """Waits until `count` requests wait for memory; each failed round of the head is a chance to look."""
        rounds = 0
        while self.metric("num_requests_waiting") != count:
            rounds += 1
            await self.decode[0].reserves.reaches(len(self.decode[0].reserves) + 1)
            assert rounds < 100

    async def idle(self) -> None:
        """Waits until no request is in flight and every clean-up has ended; then everything must be zero."""
        await asyncio.wait_for(self.router.generations.idle(), TIMEOUT_S)
        self.router.check_integrity()
        await self.router.settle(TIMEOUT_S)
        self.router.check_integrity()

    def worker(self, name: str) -> Any:
        return next(worker for worker in self.router.table.workers() if worker.info.name == name)

    def metric(self, sample: str, /, **labels: str) -> float | None:
        fixed = {"role": "router", "worker": "router", "model": ""}
        return self.router.metrics.registry.get_sample_value(f"vlcache_{sample}", fixed | labels)


@contextlib.asynccontextmanager
async def bench(
    prefill: list[FakePrefill] | None = None, decode: list[FakeDecode] | None = None, **settings: Any
) -> AsyncIterator[Bench]:
    """Starts workers and router, waits until all are seen, and checks at the end that nothing is left."""
    prefill = [FakePrefill()] if prefill is None else prefill
    decode = [FakeDecode()] if decode is None else decode
    workers: list[FakeWorker] = [*prefill, *decode]
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.stop)
        router = Router(config_for(workers, **settings))
        await router.start()
        stack.push_async_callback(router.stop)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(router.address))
        started = Bench(router, channel, prefill, decode)
        await started.becomes(lambda: len(list(router.table.workers())) == len(workers))
        yield started
        await started.idle()
        assert not any(worker.live for worker in decode), "decode memory is still held"
        assert not any(worker.parcels for worker in prefill), "parcels are still retained"


def config_for(workers: list[FakeWorker], **settings: Any) -> RouterConfig:
    """A router's configuration for these workers, quick enough for tests."""
    registry = "static://" + ",".join(worker.address for worker in workers)
    return RouterConfig(registry=registry, **{"poll_interval_s": 0.05, "drain_s": 5.0, **settings})


def ask(text: str = "what is it?", *, images: int = 0, role: str = "user", **fields: Any) -> pb.GenerateRequest:
    """A request with one message."""
    parts = [pb.Part(image=pb.Image(data=b"png")) for _ in range(images)]
    message = pb.Message(role=role, parts=[*parts, pb.Part(text=text)])
    return pb.GenerateRequest(**({"messages": [message]} | fields))


async def first_to_log(logs: list[Log]) -> None:
    """Waits until one of the logs has something."""
    waits = [asyncio.ensure_future(each.reaches(1)) for each in logs]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)


async def rest(call: Any) -> list[pb.GenerateResponse]:
    """What is still to come of a call that was read from."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


def kinds(events: list[pb.GenerateResponse]) -> list[str]:
    """The names of the events in order."""
    return [str(event.WhichOneof("event")) for event in events]


def text_of(events: list[pb.GenerateResponse]) -> str:
    """The answer."""
    return "".join(event.delta.text for event in events if event.HasField("delta"))
