"""A whole prefill worker behind real gRPC, with a decode worker that only takes parcels."""

import dataclasses
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest
from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import prefill_pb2 as pb
from vlcache.worker.v1 import worker_pb2

from prefill_worker.compression.registry import CHOICES
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import LoadedModel, load_model
from shared.kv.eviction import SharedLayers
from tests.unit.decode_worker.tiny import CONTEXT, LAYERS, VISUAL_TOKENS
from tests.unit.prefill_worker.pieces import until
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user
from tests.unit.prefill_worker.served import Stack, run
from tests.unit.prefill_worker.sharing import sharing


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(PrefillConfig(model=str(checkpoint), dtype="float32"))


def test_a_request_becomes_a_token_a_report_and_a_parcel(loaded: LoadedModel) -> None:
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

    run(loaded, body)


def sharing_request(stack: Stack) -> pb.PrefillRequest:
    request = stack.request(encoded(picture(1)), QUESTION)
    request.request.compression.policy = "kv_sharer"
    return request


def test_layers_share_kv_where_the_checkpoint_says_which(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        await stack.prefill(sharing_request(stack))
        ((_, manifest, _),) = stack.sink.parcels
        assert manifest.policy == "kv_sharer"
        assert manifest.eviction == SharedLayers(borrowers=(2,), lenders=(1,))

    run(dataclasses.replace(loaded, sharing=sharing((2, 1))), body)


def test_and_nowhere_else(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.prefill(sharing_request(stack))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "python -m prefill_worker.calibrate" in (caught.value.details() or "")

    run(loaded, body)


def test_a_worker_that_cascades_sends_the_same_from_less(loaded: LoadedModel) -> None:
    sent: list[tuple[bytes, float]] = []

    async def body(stack: Stack) -> None:
        await stack.prefill(stack.request(encoded(picture(1)), encoded(picture(2)), QUESTION))
        ((_, _, parcel),) = stack.sink.parcels
        exported = generate_latest(stack.worker.metrics.registry).decode()
        (peak,) = (line for line in exported.splitlines() if line.startswith("vlcache_kv_prefill_peak_ratio_sum"))
        sent.append((parcel, float(peak.split()[-1])))

    for cascade in (False, True):
        run(loaded, body, cascade=cascade)
    (whole, all_of_it), (same, less) = sent
    assert whole == same
    assert all_of_it == pytest.approx(1)
    assert 1 / LAYERS < less < 0.9


def test_what_a_worker_says_about_itself(loaded: LoadedModel) -> None:
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
        assert stack.info.arena_socket.endswith(".sock")

    run(loaded, body)


def wired(**wire: Any) -> public.GenerateRequest:
    compression = public.CompressionParams(retention=1, wire=public.WireParams(**wire))
    sampling = public.SamplingParams(max_new_tokens=8, ignore_eos=True)
    return public.GenerateRequest(
        request_id="r", messages=[user(encoded(picture(1)), QUESTION)], sampling=sampling, compression=compression
    )


def test_an_encoded_parcel_is_what_is_sent_and_counted(loaded: LoadedModel) -> None:
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

    run(loaded, body)


@pytest.mark.parametrize("retention", [5e-324, 1e-300, 1e-9])
def test_the_smallest_budgets_are_served_by_every_policy(loaded: LoadedModel, retention: float) -> None:
    async def body(stack: Stack) -> None:
        for policy in CHOICES:
            if policy == "kv_sharer":
                continue
            request = stack.request(encoded(picture(1)), QUESTION)
            request.request.compression.policy = policy
            request.request.compression.retention = retention
            # more than any policy decodes ahead
            request.request.sampling.max_new_tokens = 64
            events = await stack.prefill(request)
            kept = next(event.compression for event in events if event.HasField("compression"))
            assert 0 < kept.kept_bytes < kept.full_bytes, policy
            await stack.release(request.parcel)

    run(loaded, body, timeout_s=60)


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
        (
            ("hi",),
            {"ticket": pb.Ticket(decode_address="d:1", transport="pigeon", lease_s=30)},
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
        (("hi",), {"ticket": pb.Ticket(decode_address="d:1", transport="grpc")}, grpc.StatusCode.INVALID_ARGUMENT),
        (("hi",), {"ticket": pb.Ticket(transport="grpc", lease_s=30)}, grpc.StatusCode.INVALID_ARGUMENT),
        (
            ("hi",),
            {"ticket": pb.Ticket(decode_address="unix:/tmp/d", transport="grpc", lease_s=30)},
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (("hi",), {"request": wired(bits=5)}, grpc.StatusCode.INVALID_ARGUMENT),
        (("hi",), {"request": wired(key_channels=2)}, grpc.StatusCode.INVALID_ARGUMENT),
        (("hi",), {"parcel": b"s" * 15}, grpc.StatusCode.INVALID_ARGUMENT),
        (("hi",), {"parcel": b"s" * 17}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_bad_request_gets_its_status(
    loaded: LoadedModel, parts: tuple[str | bytes, ...], changes: dict[str, Any], code: Any
) -> None:
    async def body(stack: Stack) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.prefill(stack.request(*parts, **changes))
        assert caught.value.code() is code
        assert stack.sink.parcels == []

    run(loaded, body)


def test_a_draining_worker_refuses_and_says_so(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        await stack.worker.drain(1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.prefill(stack.request("hi"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        info = await stack.stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
        assert info.state == "draining"

    run(loaded, body)


def test_a_client_that_leaves_early_costs_nothing_later(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        call = stack.stub.Prefill(stack.request(encoded(picture(1)), QUESTION))
        async for _ in call:
            call.cancel()
            break
        await until(lambda: not stack.worker.runner._jobs)
        stack.worker.runner.check_integrity()
        assert stack.worker.info().kv == stack.info.kv

    run(loaded, body)
