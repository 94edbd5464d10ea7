"""`python -m benchmarks.early_shipping.decode_side`: a decode worker without a model, in a process of its own.

Reads one JSON object per line and answers each with one: first the setting, then reservations and releases. Ends with
its stdin.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from benchmarks.early_shipping.slow_link import SlowLink
from decode_worker.answers import Wanted
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.kv_receiver import SERVICE_NAME, KVReceiver
from decode_worker.reservations import Reservations
from decode_worker.runner import DecodeRunner
from shared.kv.layout import KVLayout
from shared.model.identity import ModelIdentity
from shared.rpc.server import RpcServer
from shared.telemetry.metrics import DecodeMetrics

MODEL = "early-shipping"
CONTEXT = 1 << 20
LEASE_S = 3600.0
EPOCH = "local"


def identity(layout: KVLayout, vocabulary: int) -> ModelIdentity:
    """On which both sides agree."""
    return ModelIdentity(name=MODEL, compatibility=MODEL, layout=layout, context_tokens=CONTEXT, vocabulary=vocabulary)


class DecodeSide:
    """Takes one parcel at a time. Lives on the event loop."""

    def __init__(self, layout: KVLayout, vocabulary: int, nbytes: int) -> None:
        pool = SlabPool(nbytes, layout)
        self._nbytes = nbytes
        self._reservations = Reservations(pool, lease_s=LEASE_S)
        self._runner = DecodeRunner(
            pool=pool,
            reservations=self._reservations,
            identity=identity(layout, vocabulary),
            tokenizer=NoText(),
            eos_token_ids=frozenset(),
            promised_tokens=None,
            metrics=DecodeMetrics(worker=MODEL, model=MODEL),
        )
        self.receiver = KVReceiver(self._runner, self._reservations, layout)

    def reserve(self, request_id: str, max_new_tokens: int) -> str:
        """The token of a reservation of everything, as hex."""
        reservation = self._reservations.reserve(
            request_id=request_id,
            attempt=0,
            prefill_epoch=EPOCH,
            wanted=Wanted({0: self._nbytes}),
            max_new_tokens=max_new_tokens,
            arena=None,
            now=time.monotonic(),
        )
        return reservation.token.hex()

    def release(self, token: str) -> bool:
        """Gives the memory of an installed parcel back; True."""
        self._runner.end_all(self._reservations.find(bytes.fromhex(token)))
        self._runner.check_integrity()
        return True


class NoText:
    """Text is not what is measured here."""

    def decode(self, *_: Any, **__: Any) -> str:
        """Nothing."""
        return ""


async def serve() -> None:
    """Answers until stdin ends."""
    loop = asyncio.get_running_loop()
    start = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    # JSON knows no tuples
    layout = KVLayout(**{**start["layout"], "windows": tuple(start["layout"]["windows"])})
    side = DecodeSide(layout, start["vocabulary"], start["nbytes"])
    server = await RpcServer.start(
        name=MODEL, host="127.0.0.1", port=0, register=side.receiver.register, services=[SERVICE_NAME]
    )
    port = int(server.address.rsplit(":", 1)[1])
    links = [SlowLink(port, mbit * 1e6 / 8) for mbit in start["mbit"] if mbit]
    slow = iter([await link.start() for link in links])
    _answer([next(slow) if mbit else server.address for mbit in start["mbit"]])
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        _answer(side.release(command["release"]) if "release" in command else side.reserve(**command))
    for link in links:
        await link.stop()
    await server.stop(0)


def _answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(serve())
