"""`python -m benchmarks.transfer.sender`: the prefill worker's side, a process of its own.

Reads one JSON object per line from stdin and answers each with one on stdout: first where the receiver listens and
which parcels to make, then what to do with them. Ends with its stdin.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.transfer.methods import BARE, DELIVERIES, METHODS, Sample
from benchmarks.transfer.plain_socket import SocketSender, default_congestion_control
from benchmarks.transfer.prefill_side import Load, PrefillSide
from shared.kv.transport.frames import CHUNK_BYTES
from shared.rpc.options import client_options


class Sender:
    """Moves parcels by every method. `receiver` is what the receiver process said when it started."""

    def __init__(self, receiver: dict[str, Any], side: PrefillSide) -> None:
        self._side = side
        self._plain = SocketSender(receiver["port"])
        self._channel = grpc.aio.insecure_channel(receiver["address"], options=client_options())
        self._bare = self._channel.stream_unary(BARE)
        self._target = np.ones(max(load.nbytes for load in side.loads), dtype=np.uint8)
        # the CPU clock of another process, as clock_getcpuclockid(3) makes it
        self._receiver_clock = ~receiver["pid"] << 3 | 2

    async def close(self) -> None:
        """Ends what the constructor began."""
        self._plain.close()
        await self._channel.close()

    def congestion_control(self) -> dict[str, str]:
        """Of the plain socket, and of gRPC, which takes the kernel's default."""
        return {"tcp": self._plain.congestion_control, "grpc": default_congestion_control()}

    async def rounds(self, warmup: int, rounds: int) -> list[Sample]:
        """Every method once per size and round, in turn; the first `warmup` rounds do not count."""
        samples = []
        for number in range(warmup + rounds):
            for load in self._side.loads:
                taken = [await self._sample(method, load) for method in METHODS]
                samples += taken if number >= warmup else []
        return samples

    async def back_to_back(self, method: str, load: int, seconds: float) -> int:
        """Delivers the parcel of that number again and again for so long; returns how often."""
        end, parcels = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            await self._sample(method, self._side.loads[load])
            parcels += 1
        return parcels

    async def _sample(self, method: str, load: Load) -> Sample:
        async with AsyncExitStack() as stack:
            move = await self._prepare(method, load, stack)
            before = self._clocks()
            await move()
            spent = [after - at for after, at in zip(self._clocks(), before, strict=True)]
        return Sample(
            method=method, nbytes=load.nbytes, wall_s=spent[0], sender_cpu_s=spent[1], receiver_cpu_s=spent[2]
        )

    async def _prepare(self, method: str, load: Load, stack: AsyncExitStack) -> Callable[[], Awaitable[object]]:
        if method not in DELIVERIES:
            return partial(getattr(self, f"_{method}"), load)
        delivery = DELIVERIES[method]
        ticket = await stack.enter_async_context(self._side.reserved(load, delivery))
        return partial(self._side.deliver, load, delivery, ticket)

    def _clocks(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), time.clock_gettime(self._receiver_clock)

    async def _memcpy(self, load: Load) -> None:
        np.copyto(self._target[: load.nbytes], load.source)

    async def _tcp(self, load: Load) -> None:
        self._plain.send(load.source.data)

    async def _bare_grpc(self, load: Load) -> None:
        await self._bare(_messages(load.source.data))


def _messages(body: memoryview) -> Iterator[bytes]:
    """grpcio takes `bytes` alone, so a copy is the least that a message costs."""
    return (bytes(body[at : at + CHUNK_BYTES]) for at in range(0, len(body), CHUNK_BYTES))


async def serve() -> None:
    """Answers commands until stdin ends."""
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory() as directory:
        start = json.loads(sys.stdin.readline())
        side = PrefillSide(Path(directory) / "arenas", start["receiver"]["address"], start["sizes"])
        sender = Sender(start["receiver"], side)
        _answer(sender.congestion_control())
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command = json.loads(line)
            if command.pop("do") == "rounds":
                _answer([dataclasses.asdict(sample) for sample in await sender.rounds(**command)])
            else:
                _answer(await sender.back_to_back(**command))
        await sender.close()
        await side.close()


def _answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(serve())
