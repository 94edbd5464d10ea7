"""What a decode worker owns besides its model: the real receiver, pool and reservations. The benchmark's only seam."""

from __future__ import annotations

import time
from typing import Any

import grpc

from benchmarks.transfer.methods import End
from benchmarks.transfer.parcels import LAYOUT, MAX_NEW_TOKENS, MODEL
from decode_worker.answers import Reservation, Wanted
from decode_worker.arena_directory import ArenaDirectory
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.kv_receiver import KVReceiver
from decode_worker.reservations import Reservations
from decode_worker.runner import DecodeRunner
from shared.errors import FailedPreconditionError
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity
from shared.telemetry.metrics import DecodeMetrics

IDENTITY = ModelIdentity(name=MODEL, compatibility=MODEL, layout=LAYOUT, context_tokens=1 << 20, vocabulary=1)
LEASE_S = 3600.0


class DecodeSide:
    """Takes parcels of up to `max_tokens` kept tokens, one at a time. Lives on the event loop."""

    def __init__(self, max_tokens: int) -> None:
        pool = SlabPool(_reserved_bytes(max_tokens), LAYOUT)
        self._reservations = Reservations(pool, lease_s=LEASE_S)
        self._runner = _Runner(
            pool=pool,
            reservations=self._reservations,
            identity=IDENTITY,
            tokenizer=_NoText(),
            eos_token_ids=frozenset(),
            promised_tokens=None,
            metrics=DecodeMetrics(worker="transfer", model=MODEL),
        )
        self._receiver = KVReceiver(self._runner, self._reservations, LAYOUT)
        self._arenas = ArenaDirectory()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the real data plane."""
        self._receiver.register(server)

    async def reserve(self, *, end: str, tokens: int, epoch: str, socket: str) -> bytes:
        """The token of a reservation for a parcel in the arena behind `socket`; without one it comes over gRPC.

        Raises:
            FailedPreconditionError: There is no arena.
        """
        arena = await self._arenas.find(socket, epoch)
        if socket and arena is None:
            raise FailedPreconditionError(f"no arena behind {socket}", reason="ARENA")
        return self._reservations.reserve(
            request_id=end,
            attempt=0,
            prefill_epoch=epoch,
            wanted=Wanted({0: _reserved_bytes(tokens)}),
            max_new_tokens=MAX_NEW_TOKENS,
            arena=arena,
            now=time.monotonic(),
        ).token

    def release(self, token: bytes) -> None:
        """Gives the memory of a delivered parcel back."""
        self._runner.end_all(self._reservations.find(token))
        self._runner.check_integrity()


class _Runner(DecodeRunner):
    """A runner without a scheduler: nobody reads the tokens, so no sequence joins a batch."""

    async def install(
        self,
        reservation: Reservation,
        manifest: Manifest,
        body: memoryview,
        *,
        verify: bool = True,
        in_waves: bool = False,
    ) -> None:
        if reservation.request_id == End.INSTALL.value:
            await super().install(reservation, manifest, body, verify=verify, in_waves=in_waves)
        else:
            self._reservations.end_fill(reservation)


class _NoText:
    """Text is not what is measured here."""

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


def _reserved_bytes(tokens: int) -> int:
    return LAYOUT.full_bytes(tokens + MAX_NEW_TOKENS)
