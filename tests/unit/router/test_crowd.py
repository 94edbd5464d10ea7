"""Many requests at once while workers fail at random: all are answered, and nothing is left."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from shared import errors
from tests.unit.router.fakes import (
    ANSWER,
    Stream,
    bench,
    compression,
    first_token,
    go_on,
    prompt_done,
    retained,
    run,
    transfer,
)
from tests.unit.router.test_failover import check_whole, pairs

REQUESTS = 40


class Misfortune:
    """Scripts of workers that fail in every way, in a share of all cases. They stay ready."""

    def __init__(self, seed: int, share: float) -> None:
        self._random = random.Random(seed)
        self._share = share

    @property
    def strikes(self) -> bool:
        return self._random.random() < self._share

    def prefill(self, request: prefill_pb2.PrefillRequest) -> list[Any]:
        if not self.strikes:
            return prompt_done()
        receiver = request.ticket.decode_worker
        said = [first_token(), compression(), retained(), transfer()][: self._random.randrange(4)]
        failures = [
            errors.AbortedError("ended", reason="CANCELLED_BY_WORKER"),
            errors.AbortedError("released", stage="transfer", worker=receiver),
            errors.DataLossError("digest", stage="transfer", worker=receiver),
        ]
        return [*said, self._random.choice(failures)]

    def resend(self, request: prefill_pb2.ResendRequest) -> None:
        receiver = request.ticket.decode_worker
        failures = [
            errors.NotFoundError("gone", reason="NO_PARCEL", stage="transfer"),
            errors.AbortedError("released", stage="transfer", worker=receiver),
            errors.DataLossError("digest", stage="transfer", worker=receiver),
        ]
        if self.strikes:
            raise self._random.choice(failures)

    def admit(self, request: decode_pb2.ReserveRequest) -> None:
        if self.strikes:
            raise errors.ResourceExhaustedError("the pool is full")

    async def decode(self, stream: Stream, handle: int, token: bytes) -> None:
        if not self.strikes:
            return await go_on()(stream, handle, token)
        delivered = len(stream.delivered[handle])
        await go_on(until=self._random.randrange(delivered, len(ANSWER)))(stream, handle, token)
        stream.fail(handle, errors.AbortedError("the lease ended", reason="LEASE_EXPIRED"))
        return None


@pytest.mark.parametrize("seed", range(4))
def test_everybody_is_answered_whatever_fails(seed: int) -> None:
    async def main() -> None:
        prefill, decode = pairs(3, 3)
        fate = Misfortune(seed, 0.25)
        for sender in prefill:
            sender.script, sender.on_resend = fate.prefill, fate.resend
        for receiver in decode:
            receiver.script, receiver.admit = fate.decode, fate.admit
        async with bench(prefill, decode, max_failovers=100) as b:
            for events in await asyncio.gather(*(b.answer() for _ in range(REQUESTS))):
                check_whole(events)
            await b.idle()
            assert b.metric("requests_total", outcome="finished", code="OK") == REQUESTS
            assert b.metric("generation_tokens_total") == REQUESTS * len(ANSWER)
            assert b.metric("prompt_tokens_total") == REQUESTS * 50
            assert b.metric("failovers_total", kind="resend", reason="LEASE_EXPIRED"), "nothing has failed"

    run(main)
