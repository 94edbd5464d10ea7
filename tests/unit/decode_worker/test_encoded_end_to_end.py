"""A prefill worker and a decode worker, real gRPC between them: what quantised parcels do to the logits."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import prefill_pb2, prefill_pb2_grpc, worker_pb2

from decode_worker import engine
from decode_worker.worker import LoadedModel
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import LoadedModel as LoadedPrefill
from prefill_worker.worker import PrefillWorker
from prefill_worker.worker import load_model as load_prefill
from shared.rpc.server import RpcServer
from tests.unit.decode_worker.serving import Served, run
from tests.unit.prefill_worker.in_process import preprocessing_in_process
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def prefill_model(checkpoint: Path) -> LoadedPrefill:
    return load_prefill(PrefillConfig(model=str(checkpoint), served_model_name="tiny", dtype="float32"))


@dataclass(kw_only=True)
class Answer:
    """What a client would be told, and the logits of the decode steps, [steps, vocab]."""

    tokens: list[int]
    logits: torch.Tensor
    kept_bytes: int
    transport: str
    sent_bytes: int
    pool_bytes: int


@contextlib.asynccontextmanager
async def prefilling(model: LoadedPrefill) -> AsyncIterator[Any]:
    """A prefill worker's stub."""
    with tempfile.TemporaryDirectory() as directory:
        config = PrefillConfig(model="tiny", arena_mib=1, socket_dir=Path(directory) / "arenas")
        with preprocessing_in_process():
            worker = PrefillWorker(config, model)
        server = await RpcServer.start(name="p", host="127.0.0.1", port=0, register=worker.register, services=[])
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield prefill_pb2_grpc.PrefillServiceStub(channel)
        finally:
            await worker.drain(5)
            await server.stop(0)
            await worker.close()


async def ask(served: Served, stub: Any, transport: str, compression: public.CompressionParams) -> Answer:
    """One request through both workers."""
    info = await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
    socket = info.arena_socket if transport == "memory" else ""
    promise = await served.reserve(
        prefill_epoch=info.epoch, arena_socket=socket, kept_tokens_bound=200, max_new_tokens=NEW_TOKENS
    )
    request = prefill_pb2.PrefillRequest(
        request=public.GenerateRequest(
            request_id="r",
            messages=[user(encoded(picture(1)), QUESTION)],
            sampling=public.SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True),
            compression=compression,
        ),
        attempt=1,
        epoch=info.epoch,
        ticket=prefill_pb2.Ticket(
            decode_worker="d",
            decode_address=served.address,
            token=promise.token,
            transport=promise.transport,
            lease_s=30,
        ),
    )
    events = {event.WhichOneof("event"): event async for event in stub.Prefill(request)}
    held = served.held_bytes()["active"]
    with pytest.MonkeyPatch.context() as patch:
        steps = record_logits(patch)
        stream = served.stream()
        await stream.attach(1, promise.token)
        tokens = [events["first_token"].first_token.token_id, *await stream.tokens(1)]
    await served.nothing_is_held()
    return Answer(
        tokens=tokens,
        logits=torch.cat(steps),
        kept_bytes=events["compression"].compression.kept_bytes,
        transport=events["transfer"].transfer.transport,
        sent_bytes=events["transfer"].transfer.sent_bytes,
        pool_bytes=held,
    )


def record_logits(patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    steps, plain = [], engine.highest_tokens

    def highest(logits: torch.Tensor) -> torch.Tensor:
        steps.append(logits.clone())
        return plain(logits)

    patch.setattr(engine, "highest_tokens", highest)
    return steps


def whole(**wire: Any) -> public.CompressionParams:
    return public.CompressionParams(retention=1, wire=public.WireParams(**wire) if wire else None)


@pytest.mark.parametrize("transport", ["grpc", "memory"])
def test_quantised_whole_caches_give_nearly_the_full_logits(
    loaded: LoadedModel, prefill_model: LoadedPrefill, transport: str
) -> None:
    settings = [{}, {"bits": 8}, {"bits": 4}, {"bits": 2}]
    answers: list[Answer] = []

    async def body(served: Served) -> None:
        async with prefilling(prefill_model) as stub:
            for wire in settings:
                compression = whole(**wire, residual=0, group=16) if wire else whole()
                answers.append(await ask(served, stub, transport, compression))

    run(loaded, body)
    full, *quantised = answers
    assert {answer.transport for answer in answers} == {transport}
    assert {answer.kept_bytes for answer in answers} == {full.kept_bytes}
    assert {answer.pool_bytes for answer in answers} == {full.pool_bytes}, "fewer bytes travel, as many are stored"
    # K and V of 8 channels in fp32: beside 8 codes of 8 bits stand a scale and a zero
    assert full.sent_bytes > full.kept_bytes
    sent = [answer.sent_bytes for answer in answers]
    assert sent == sorted(sent, reverse=True)
    assert sent[1] < full.kept_bytes / 2
    # one step from the same token: later ones may follow another
    spread = full.logits[0].std()
    gaps = [float((answer.logits[0] - full.logits[0]).abs().max() / spread) for answer in quantised]
    assert 0 < gaps[0] < 0.05
    assert gaps[0] < gaps[1] < gaps[2]


def test_the_fewer_channels_are_left_out_the_nearer_the_full_logits(
    loaded: LoadedModel, prefill_model: LoadedPrefill
) -> None:
    """An eighth of the channels matters less than three quarters of them."""
    answers: list[Answer] = []

    async def body(served: Served) -> None:
        async with prefilling(prefill_model) as stub:
            for share in (1.0, 0.875, 0.25):
                compression = whole(key_channels=share, residual=4)
                answers.append(await ask(served, stub, "grpc", compression))

    run(loaded, body)
    full, most, few = answers
    gap = [float((answer.logits[0] - full.logits[0]).abs().max()) for answer in (most, few)]
    assert 0 < gap[0] < gap[1]
    assert full.sent_bytes > most.sent_bytes > few.sent_bytes


def test_compressed_and_encoded_answers_are_the_same_over_both_ways(
    loaded: LoadedModel, prefill_model: LoadedPrefill
) -> None:
    answers: list[Answer] = []

    async def body(served: Served) -> None:
        wire = public.WireParams(bits=4, key_channels=0.6, residual=2, group=8)
        async with prefilling(prefill_model) as stub:
            for way in ("grpc", "memory"):
                compression = public.CompressionParams(retention=0.6, wire=wire)
                answers.append(await ask(served, stub, way, compression))

    run(loaded, body)
    assert [answer.transport for answer in answers] == ["grpc", "memory"]
    assert answers[0].tokens == answers[1].tokens
    assert torch.equal(answers[0].logits, answers[1].logits)
    assert answers[0].kept_bytes == answers[1].kept_bytes > answers[0].sent_bytes


def test_scores_travel_behind_an_encoded_body(loaded: LoadedModel, prefill_model: LoadedPrefill) -> None:
    """H2O goes on while tokens are generated: its parcel carries a score per kept row."""
    answers: list[Answer] = []

    async def body(served: Served) -> None:
        async with prefilling(prefill_model) as stub:
            for wire in (None, public.WireParams(bits=8, residual=0, group=16)):
                compression = public.CompressionParams(policy="h2o", retention=0.6, wire=wire)
                answers.append(await ask(served, stub, "memory", compression))

    run(loaded, body)
    plain, coded = answers
    assert coded.kept_bytes == plain.kept_bytes
    assert coded.sent_bytes < plain.sent_bytes
    assert 0 < float((coded.logits[0] - plain.logits[0]).abs().max() / plain.logits[0].std()) < 0.05
    assert len(coded.tokens) == NEW_TOKENS
