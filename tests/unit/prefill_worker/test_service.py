"""A whole prefill worker behind real gRPC, with a decode worker that only takes parcels."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest
from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, kv_pb2_grpc, prefill_pb2_grpc, worker_pb2
from vlcache.worker.v1 import prefill_pb2 as pb

from prefill_worker.compression.registry import CHOICES
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import LoadedModel, PrefillWorker, load_model
from shared.kv.manifest import Manifest
from shared.kv.transport.frames import CHUNK_BYTES
from shared.rpc.server import RpcServer
from tests.unit.decode_worker.tiny import CONTEXT, LAYERS, VISUAL_TOKENS
from tests.unit.prefill_worker.pieces import until
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user


class Sink(kv_pb2_grpc.KVTransferServiceServicer, decode_pb2_grpc.DecodeServiceServicer):
    """Takes every parcel."""

    def __init__(self) -> None:
        self.parcels: list[tuple[bytes, Manifest, bytes]] = []

    async def PutKV(self, frames: AsyncIterator[kv_pb2.PutKVRequest], context: Any) -> kv_pb2.PutKVResponse:  # noqa: N802
        received = [frame async for frame in frames]
        header = received[0].header
        assert all(len(frame.chunk.data) <= CHUNK_BYTES for frame in received[1:])
        body = b"".join(frame.chunk.data for frame in received[1:])
        self.parcels.append((header.token, Manifest.from_proto(header.manifest), body))
        return kv_pb2.PutKVResponse(received_bytes=len(body))

    async def Renew(self, request: Any, context: Any) -> decode_pb2.RenewResponse:  # noqa: N802
        return decode_pb2.RenewResponse()

    def register(self, server: grpc.aio.Server) -> None:
        kv_pb2_grpc.add_KVTransferServiceServicer_to_server(self, server)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)


class Stack:
    """The worker, a stub to talk to it, and the sink."""

    def __init__(self, worker: PrefillWorker, stub: Any, sink: Sink, sink_address: str, info: Any) -> None:
        self.worker, self.stub, self.sink, self.info = worker, stub, sink, info
        self._sink_address = sink_address

    def request(self, *parts: str | bytes, **changes: Any) -> pb.PrefillRequest:
        sampling = public.SamplingParams(max_new_tokens=8, ignore_eos=True)
        message = public.GenerateRequest(request_id="r", messages=[user(*parts)], sampling=sampling)
        ticket = pb.Ticket(
            decode_worker="d", decode_address=self._sink_address, token=b"t" * 16, transport="grpc", lease_s=30
        )
        return pb.PrefillRequest(
            **({"request": message, "attempt": 1, "ticket": ticket, "epoch": self.info.epoch} | changes)
        )

    async def prefill(self, request: pb.PrefillRequest) -> list[pb.PrefillEvent]:
        return [event async for event in self.stub.Prefill(request)]


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(PrefillConfig(model=str(checkpoint), dtype="fp32"))


def run(
    loaded: LoadedModel, directory: Path, body: Callable[[Stack], Awaitable[None]], *, cascade: bool = False
) -> None:
    async def main() -> None:
        sockets = directory / "arenas"
        config = PrefillConfig(model="tiny", arena_mib=1, socket_dir=sockets, max_images=2, cascade=cascade)
        worker, sink = PrefillWorker(config, loaded), Sink()
        server = await RpcServer.start(name="p", host="127.0.0.1", port=0, register=worker.register, services=[])
        sink_server = await RpcServer.start(name="d", host="127.0.0.1", port=0, register=sink.register, services=[])
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = prefill_pb2_grpc.PrefillServiceStub(channel)
                info = await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
                await asyncio.wait_for(body(Stack(worker, stub, sink, sink_server.address, info)), 20)
        finally:
            await worker.drain(5)
            await server.stop(0)
            await worker.close()
            await sink_server.stop(0)

    asyncio.run(main())


def test_a_request_becomes_a_token_a_report_and_a_parcel(loaded: LoadedModel, tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        events = await stack.prefill(stack.request(encoded(picture(1)), QUESTION))
        assert [event.WhichOneof("event") for event in events] == ["first_token", "compression", "retained", "transfer"]
        assert events[0].first_token.visual_tokens == VISUAL_TOKENS
        ((token, manifest, parcel),) = stack.sink.parcels
        assert token == b"t" * 16
        manifest.check_digest(memoryview(parcel))
        assert manifest.transfer.prefill_epoch == stack.info.epoch
        assert manifest.compatibility == stack.info.model.compatibility
        assert events[1].compression.kept_bytes == len(parcel)
        assert events[3].transfer.sent_bytes > len(parcel)
        stack.worker.runner.check_integrity()

    run(loaded, tmp_path, body)


def test_a_worker_that_cascades_sends_the_same_from_less(loaded: LoadedModel, tmp_path: Path) -> None:
    sent: list[tuple[bytes, float]] = []

    async def body(stack: Stack) -> None:
        await stack.prefill(stack.request(encoded(picture(1)), encoded(picture(2)), QUESTION))
        ((_, _, parcel),) = stack.sink.parcels
        exported = generate_latest(stack.worker.metrics.registry).decode()
        (peak,) = (line for line in exported.splitlines() if line.startswith("vlcache_kv_prefill_peak_ratio_sum"))
        sent.append((parcel, float(peak.split()[-1])))

    for cascade in (False, True):
        run(loaded, tmp_path, body, cascade=cascade)
    (whole, all_of_it), (same, less) = sent
    assert whole == same
    assert all_of_it == pytest.approx(1)
    assert 1 / LAYERS < less < 0.9


def test_what_a_worker_says_about_itself(loaded: LoadedModel, tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        model = stack.info.model
        assert (stack.info.role, stack.info.state, stack.info.kv.retained) == ("prefill", "ready", 0)
        assert (model.name, model.context_tokens, model.max_images) == (loaded.identity.name, CONTEXT, 2)
        assert (list(model.policies), model.default_policy, model.default_retention) == (
            sorted(CHOICES),
            "vl_cache",
            0.1,
        )
        assert model.max_tokens_per_image - model.max_marker_tokens_per_image == VISUAL_TOKENS
        assert model.max_marker_tokens_per_image > 0
        assert stack.info.arena_socket.startswith(str(tmp_path))

    run(loaded, tmp_path, body)


def wired(**wire: Any) -> public.GenerateRequest:
    compression = public.CompressionParams(retention=1, wire=public.WireParams(**wire))
    sampling = public.SamplingParams(max_new_tokens=8, ignore_eos=True)
    return public.GenerateRequest(
        request_id="r", messages=[user(encoded(picture(1)), QUESTION)], sampling=sampling, compression=compression
    )


def test_an_encoded_parcel_is_what_is_sent_and_counted(loaded: LoadedModel, tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        events = await stack.prefill(stack.request(request=wired(bits=4, key_channels=0.5, group=8, residual=0)))
        ((_, manifest, parcel),) = stack.sink.parcels
        manifest.check_digest(memoryview(parcel))
        assert manifest.encoding is not None
        kept, sent = events[1].compression.kept_bytes, events[3].transfer.sent_bytes
        assert kept == manifest.layout.body_bytes(manifest.num_kept) == events[1].compression.full_bytes
        assert len(parcel) < sent < len(parcel) + 1000 < kept / 2
        metrics = stack.worker.metrics
        assert metrics.labelled(metrics.transfer_bytes, transport="grpc")._value.get() == sent

    run(loaded, tmp_path, body)


@pytest.mark.parametrize(
    ("parts", "changes", "code"),
    [
        (("hi",), {"epoch": "another"}, grpc.StatusCode.FAILED_PRECONDITION),
        (("",), {}, grpc.StatusCode.INVALID_ARGUMENT),
        (("hi", b"GIF89a"), {}, grpc.StatusCode.INVALID_ARGUMENT),
        (("x" * 40_000,), {}, grpc.StatusCode.OUT_OF_RANGE),
        (("hi " * 600,), {}, grpc.StatusCode.OUT_OF_RANGE),
        (
            ("hi",),
            {"ticket": pb.Ticket(decode_address="127.0.0.1:1", transport="grpc", lease_s=30)},
            grpc.StatusCode.UNAVAILABLE,
        ),
        (("hi",), {"ticket": pb.Ticket(transport="pigeon", lease_s=30)}, grpc.StatusCode.FAILED_PRECONDITION),
        (("hi",), {"ticket": pb.Ticket(transport="grpc")}, grpc.StatusCode.INVALID_ARGUMENT),
        (("hi",), {"request": wired(bits=5)}, grpc.StatusCode.INVALID_ARGUMENT),
        (("hi",), {"request": wired(key_channels=2)}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_bad_request_gets_its_status(
    loaded: LoadedModel, tmp_path: Path, parts: tuple[str | bytes, ...], changes: dict[str, Any], code: Any
) -> None:
    async def body(stack: Stack) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.prefill(stack.request(*parts, **changes))
        assert caught.value.code() is code
        assert stack.sink.parcels == []

    run(loaded, tmp_path, body)


def test_a_draining_worker_refuses_and_says_so(loaded: LoadedModel, tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        await stack.worker.drain(1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.prefill(stack.request("hi"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        info = await stack.stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
        assert info.state == "draining"

    run(loaded, tmp_path, body)


def test_a_client_that_leaves_early_costs_nothing_later(loaded: LoadedModel, tmp_path: Path) -> None:
    async def body(stack: Stack) -> None:
        call = stack.stub.Prefill(stack.request(encoded(picture(1)), QUESTION))
        async for _ in call:
            call.cancel()
            break
        await until(lambda: not stack.worker.runner._jobs)
        stack.worker.runner.check_integrity()
        assert stack.worker.info().kv == stack.info.kv

    run(loaded, tmp_path, body)
