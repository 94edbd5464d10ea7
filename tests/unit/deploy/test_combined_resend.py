"""A parcel that one process both made and installed goes out again, to itself and to another decode worker."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf import struct_pb2
from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import decode_pb2, prefill_pb2_grpc, worker_pb2
from vlcache.worker.v1 import prefill_pb2 as pb

from decode_worker.config import DecodeConfig
from decode_worker.worker import DecodeWorker, build_engine
from deploy.combined.config import CombinedConfig
from deploy.combined.worker import LoadedModel, build_workers, load_model
from shared.kv.secret import SECRET_BYTES
from shared.rpc.server import RpcServer
from tests.unit.decode_worker import tiny
from tests.unit.decode_worker.serving import Served, failure
from tests.unit.prefill_worker.in_process import preprocessing_in_process
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

MAX_NEW_TOKENS = 12
KEPT_BOUND = 80


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tiny.save_checkpoint(tmp_path_factory.mktemp("tiny"))
    return load_model(CombinedConfig(model=str(path), dtype="float32"))


class Host:
    """A combined worker, another decode worker beside it, and what a router does."""

    def __init__(self, prefill: Any, info: Any, own: Served, other: Served) -> None:
        self._prefill, self._info = prefill, info
        self.own, self.other = own, other
        self._attempts = 0
        self.parcel = b""
        """Secret of the last one."""

    async def promise(self, served: Served) -> tuple[int, pb.Ticket]:
        """A reservation: its attempt, and the ticket for it."""
        self._attempts += 1
        promised: decode_pb2.ReserveResponse = await served.reserve(
            attempt=self._attempts,
            kept_tokens_bound=KEPT_BOUND,
            max_new_tokens=MAX_NEW_TOKENS,
            prefill_epoch=self._info.epoch,
            arena_socket=self._info.arena_socket,
        )
        ticket = pb.Ticket(
            decode_address=served.address,
            token=promised.token,
            transport=promised.transport,
            lease_s=promised.lease_s,
            promised_tokens=promised.promised_tokens,
        )
        return self._attempts, ticket

    async def prefill(self, attempt: int, ticket: pb.Ticket, **compression: Any) -> list[pb.PrefillEvent]:
        message = public.GenerateRequest(
            request_id="r",
            messages=[user(encoded(picture(1)), QUESTION)],
            sampling=public.SamplingParams(max_new_tokens=MAX_NEW_TOKENS, ignore_eos=True),
            compression=public.CompressionParams(retention=0.5, **compression),
        )
        self.parcel = secrets.token_bytes(SECRET_BYTES)
        request = pb.PrefillRequest(
            request=message, attempt=attempt, ticket=ticket, epoch=self._info.epoch, parcel=self.parcel
        )
        return [event async for event in self._prefill.Prefill(request)]

    async def resend(self, parcel: bytes, attempt: int, ticket: pb.Ticket) -> public.Transfer:
        return (await self._prefill.Resend(pb.ResendRequest(parcel=parcel, attempt=attempt, ticket=ticket))).transfer

    async def tokens(self, served: Served, ticket: pb.Ticket) -> list[int]:
        """What follows the tokens of the prefill worker."""
        stream = served.stream()
        await stream.attach(1, ticket.token)
        return await stream.tokens(1)

    async def release(self, parcel: bytes) -> None:
        await self._prefill.ReleaseParcels(pb.ReleaseParcelsRequest(parcels=[parcel]))
        kv = (await self._prefill.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())).kv
        assert (kv.filling, kv.retained) == (0, 0)


async def _serve(stack: contextlib.AsyncExitStack, worker: Any) -> tuple[RpcServer, grpc.aio.Channel]:
    server = await RpcServer.start(name=worker.name, host="127.0.0.1", port=0, register=worker.register, services=[])
    stack.push_async_callback(worker.close)
    stack.push_async_callback(server.stop, 0)
    stack.push_async_callback(worker.drain, 5)
    return server, await stack.enter_async_context(grpc.aio.insecure_channel(server.address))


def run(loaded: LoadedModel, body: Callable[[Host], Awaitable[None]], **settings: Any) -> None:
    async def main(sockets: Path) -> None:
        config = CombinedConfig(model="tiny", arena_mib=1, kv_memory_mib=1, socket_dir=sockets, **settings)
        async with contextlib.AsyncExitStack() as stack:
            with preprocessing_in_process():
                prefill, decode = build_workers(config, loaded)
            elsewhere = DecodeConfig(model="tiny", kv_memory_mib=1)
            other = DecodeWorker(elsewhere, loaded.decode, *build_engine(elsewhere, loaded.decode))
            served = []
            for worker in (decode, other):
                server, channel = await _serve(stack, worker)
                served.append(Served(worker, channel, server.address))
                stack.push_async_callback(served[-1].close_streams)
            _, channel = await _serve(stack, prefill)
            stub = prefill_pb2_grpc.PrefillServiceStub(channel)
            host = Host(stub, prefill.info(), *served)
            await asyncio.wait_for(body(host), 30)
            for each in served:
                await each.nothing_is_held()

    # pytest's own folders may be too deep for a socket
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(Path(directory)))


def test_both_go_on_with_the_same_tokens(loaded: LoadedModel, tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        attempt, first = await host.promise(host.own)
        events = await host.prefill(attempt, first)
        assert events[-1].transfer.transport == "local"
        parcel = host.parcel
        expected = await host.tokens(host.own, first)
        assert len(expected) == MAX_NEW_TOKENS - 1
        for served, transport in ((host.own, "local"), (host.other, "memory"), (host.own, "local")):
            attempt, ticket = await host.promise(served)
            assert (await host.resend(parcel, attempt, ticket)).transport == transport
            assert await host.tokens(served, ticket) == expected
        await host.release(parcel)

    run(loaded, body)


def test_a_hand_over_to_a_reservation_that_has_ended_leaves_the_parcel(loaded: LoadedModel, tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        attempt, first = await host.promise(host.own)
        await host.prefill(attempt, first)
        parcel = host.parcel
        attempt, lost = await host.promise(host.own)
        await host.own.decode.Release(decode_pb2.ReleaseRequest(token=lost.token))
        error = await failure(host.resend(parcel, attempt, lost))
        assert (error.code, error.reason, error.stage) == ("NOT_FOUND", "NO_RESERVATION", "transfer")
        attempt, again = await host.promise(host.own)
        await host.resend(parcel, attempt, again)
        assert await host.tokens(host.own, again) == await host.tokens(host.own, first)
        await host.release(parcel)

    run(loaded, body)


AHEAD = struct_pb2.Struct()
AHEAD.update({"tokens": 6})


@pytest.mark.parametrize(("promised_tokens", "ahead"), [(7, 7), (6, 1)])
def test_a_parcel_never_runs_ahead_of_the_promise(
    loaded: LoadedModel, tmp_path: Path, promised_tokens: int, ahead: int
) -> None:
    async def body(host: Host) -> None:
        attempt, ticket = await host.promise(host.own)
        assert ticket.promised_tokens == promised_tokens
        events = await host.prefill(attempt, ticket, policy="look_ahead", parameters=AHEAD)
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds == ["first_token", *["next_token"] * (ahead - 1), "compression", "retained", "transfer"]
        assert len(await host.tokens(host.own, ticket)) == MAX_NEW_TOKENS - ahead
        await host.release(host.parcel)

    run(loaded, body, promised_tokens=promised_tokens)


def test_a_ticket_that_says_nothing_of_its_promise_may_be_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    async def body(host: Host) -> None:
        attempt, ticket = await host.promise(host.own)
        ticket.promised_tokens = 0
        error = await failure(host.prefill(attempt, ticket, policy="look_ahead", parameters=AHEAD))
        assert (error.reason, error.stage) == ("AHEAD_OF_PROMISE", "transfer")
        await host.own.decode.Release(decode_pb2.ReleaseRequest(token=ticket.token))

    run(loaded, body, promised_tokens=6)
