"""A whole decode worker that is told anything, in any order: it refuses with a sentence, holds nothing, and goes on."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from vlcache.worker.v1 import decode_pb2 as pb
from vlcache.worker.v1 import kv_pb2

from decode_worker.config import DecodeConfig
from decode_worker.worker import LoadedModel, load_model
from shared.kv.manifest import body_digest
from shared.rpc.first_status import FirstStatus
from tests.fuzz.mutation import mutated, strange
from tests.fuzz.refusals import CODES, REFUSALS, taken
from tests.fuzz.running import fuzz_served
from tests.unit.decode_worker.sequences import prefill, text_ids
from tests.unit.decode_worker.serving import Served, TokenStream, frames, run
from tests.unit.decode_worker.shipment import Shipment, answers
from tests.unit.decode_worker.tiny import load_whole, save_checkpoint
from tests.unit.decode_worker.waves import wave_frames

# After so many cases somebody asks whom nothing of this concerns.
INNOCENT = 25


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(DecodeConfig(model=str(checkpoint), served_model_name="tiny", dtype="float32"))


@pytest.fixture(scope="module")
def shipment(checkpoint: Path, loaded: LoadedModel) -> Shipment:
    return Shipment(prefill(load_whole(checkpoint), text_ids(0, 40)), loaded)


class Life:
    """What happens to one reservation, of which nothing need be as it should."""

    def __init__(
        self, chance: random.Random, served: Served, shipment: Shipment, stream: TokenStream, seen: Counter[str]
    ) -> None:
        self._chance, self._served, self._shipment, self._stream = chance, served, shipment, stream
        self._handle = chance.choice((0, 1, chance.getrandbits(64)))
        self._seen = seen
        self._token = b""

    async def run(self) -> None:
        request = await self._served.reserve_request()
        if self._chance.random() < 0.3:
            strange(self._chance, request)
        reserved = await taken(self._served.decode.Reserve(request), self._seen)
        self._token = reserved.token if reserved else self._chance.randbytes(16)
        steps = [self._put, self._put, self._install, self._grow, self._renew, self._attach, self._cancel, self._wait]
        order = self._chance.choices(steps, k=self._chance.randint(1, 5))
        if self._chance.random() < 0.5:
            order = [self._put, self._attach, self._wait, *order]
        for step in order:
            await step()
        await self._served.decode.Release(pb.ReleaseRequest(token=self._token))
        await self._served.decode.Release(strange(self._chance, pb.ReleaseRequest(token=self._token)))

    async def _put(self) -> None:
        """A parcel in one of both forms, some of whose messages or whose manifest had an accident."""
        manifest, body = self._parcel()
        sent = self._chance.choice((frames, wave_frames))(self._token, manifest, body)
        if self._chance.random() < 0.5:
            at = self._chance.randrange(len(sent))
            sent[at] = mutated(self._chance, sent[at], sent)
        if self._chance.random() < 0.3:
            sent.insert(self._chance.randrange(len(sent)), self._chance.choice(sent))
        if self._chance.random() < 0.2:
            del sent[self._chance.randrange(len(sent))]
        call = self._served.open_put()
        call.first_status = FirstStatus(call)
        try:
            for frame in sent:
                await call.write(frame)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # it was refused before all was said
            pass
        await taken(call, self._seen)

    async def _install(self) -> None:
        manifest, body = self._parcel()
        slot = kv_pb2.ArenaSlot(arena="prefill", offset=0, nbytes=len(body))
        request = kv_pb2.InstallKVRequest(token=self._token, manifest=manifest.to_proto(), slot=slot)
        await taken(self._served.transfer.InstallKV(strange(self._chance, request)), self._seen)

    def _parcel(self) -> tuple[Any, bytes | bytearray]:
        """A true one, or one with any numbers for KV, which is as true."""
        if self._chance.random() < 0.8:
            return self._shipment.manifest(), self._shipment.body
        body = self._chance.randbytes(len(self._shipment.body))
        return self._shipment.manifest(digest=body_digest(memoryview(body))), body

    async def _grow(self) -> None:
        request = pb.GrowReservationRequest(token=self._token, kept_tokens_bound=self._chance.choice((0, 50, 1 << 31)))
        await taken(self._served.decode.GrowReservation(request), self._seen)

    async def _renew(self) -> None:
        await taken(self._served.decode.Renew(strange(self._chance, pb.RenewRequest(token=self._token))), self._seen)

    async def _attach(self) -> None:
        attach = pb.Attach(handle=self._handle, token=self._token)
        if self._chance.random() < 0.5:
            strange(self._chance, attach)
        await self._stream.write(pb.TokenStreamRequest(attach=attach))

    async def _wait(self) -> None:
        """As long as a few steps of the model take."""
        await asyncio.sleep(0.02)

    async def _cancel(self) -> None:
        cancel = pb.Cancel(handle=self._chance.choice((self._handle, 3)))
        await self._stream.write(pb.TokenStreamRequest(cancel=cancel))


def life_after_life(shipment: Shipment, seen: Counter[str]) -> Callable[[Served], Awaitable[None]]:
    async def body(served: Served) -> None:
        lived = 0

        async def case(chance: random.Random) -> None:
            nonlocal lived
            stream = served.stream()
            await Life(chance, served, shipment, stream, seen).run()
            await stream.close()
            failed = [update.error for message in stream.messages for update in message.updates if update.error.code]
            assert {CODES[error.code] for error in failed} <= REFUSALS | {"CANCELLED"}, failed
            seen["tokens"] += any(update.token_ids for message in stream.messages for update in message.updates)
            await served.nothing_is_held()
            lived += 1
            if lived % INNOCENT == 0:
                await innocent(served, shipment)

        await fuzz_served(case)

    return body


async def innocent(served: Served, shipment: Shipment) -> None:
    reserved = await served.reserve()
    await served.put(frames(reserved.token, shipment.manifest(), shipment.body))
    await answers(served, reserved.token, shipment)


@pytest.mark.fuzz
def test_lives(loaded: LoadedModel, shipment: Shipment) -> None:
    seen = Counter[str]()
    run(loaded, life_after_life(shipment, seen), timeout_s=None, max_num_seqs=4)
    # or the lives would say little
    assert {"OK", "tokens", "INVALID_ARGUMENT", "NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION"} <= seen.keys(), seen
