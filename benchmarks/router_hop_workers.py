"""Workers that compute nothing: every sequence gets a token per step, and a token's text is the moment it was there.

`python -m benchmarks.router_hop_workers` announces a prefill worker, a decode worker, and the same tokens without a
router.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import tyro
import uvloop
from vlcache.v1 import inference_pb2 as pb
from vlcache.v1 import inference_pb2_grpc
from vlcache.worker.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, worker_pb2

from shared.rpc.lifecycle import stop_signal
from shared.rpc.server import RpcServer
from shared.telemetry.announce import announce

MODEL = worker_pb2.ServedModel(
    name="instant",
    compatibility="same",
    layout=worker_pb2.KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32"),
    context_tokens=1 << 20,
    policies=["none"],
    default_policy="none",
    default_retention=0.1,
    max_new_tokens=1 << 16,
    default_max_new_tokens=16,
)


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """How fast tokens come."""

    step_ms: float = 50.0
    """Milliseconds between two tokens of a sequence."""


class Steps:
    """Turns whose beginning all wait for: the tokens of a step are there together, as those of a batch are."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next = asyncio.Event()
        self.stamp = _stamp()
        """When the present one began."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._step_s)
            begun, self._next, self.stamp = self._next, asyncio.Event(), _stamp()
            begun.set()

    async def wait(self) -> None:
        """Until the next one begins."""
        await self._next.wait()


class Prefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Says at once that everything is done."""

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server."""
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)

    async def GetWorkerInfo(self, request: Any, context: Any) -> worker_pb2.WorkerInfo:  # noqa: N802
        """See the proto."""
        return _info("prefill")

    async def Prefill(self, request: Any, context: Any) -> AsyncIterator[prefill_pb2.PrefillEvent]:  # noqa: N802
        """See the proto."""
        first = prefill_pb2.FirstToken(token_id=1, text=_stamp(), prompt_tokens=1)
        yield prefill_pb2.PrefillEvent(first_token=first)
        yield prefill_pb2.PrefillEvent(compression=pb.Compression(policy="none", full_bytes=8, kept_bytes=8))
        yield prefill_pb2.PrefillEvent(transfer=pb.Transfer(transport="none"))


class Decode(decode_pb2_grpc.DecodeServiceServicer):
    """One message per step with a token of every sequence."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._secrets = itertools.count(1)
        self._lengths: dict[bytes, int] = {}

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server."""
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

    async def GetWorkerInfo(self, request: Any, context: Any) -> worker_pb2.WorkerInfo:  # noqa: N802
        """See the proto."""
        return _info("decode")

    async def Reserve(self, request: Any, context: Any) -> decode_pb2.ReserveResponse:  # noqa: N802
        """See the proto."""
        token = str(next(self._secrets)).encode()
        self._lengths[token] = request.max_new_tokens
        return decode_pb2.ReserveResponse(token=token, transport="grpc", reserved_bytes=8, lease_s=30)

    async def Release(self, request: Any, context: Any) -> decode_pb2.ReleaseResponse:  # noqa: N802
        """See the proto."""
        return decode_pb2.ReleaseResponse()

    async def StreamTokens(  # noqa: N802
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[decode_pb2.TokenStreamResponse]:
        """See the proto."""
        left: dict[int, int] = {}
        reading = asyncio.create_task(self._read(requests, left))
        try:
            while True:
                await self._steps.wait()
                if left:
                    updates = [_update(left, handle, self._steps.stamp) for handle in list(left)]
                    yield decode_pb2.TokenStreamResponse(updates=updates)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[Any], left: dict[int, int]) -> None:
        async for request in requests:
            if request.HasField("attach"):
                # the first one came from the prefill worker
                left[request.attach.handle] = self._lengths.pop(request.attach.token) - 1
            else:
                left.pop(request.cancel.handle, None)


class Direct(inference_pb2_grpc.InferenceServiceServicer):
    """The same streams from where the tokens are made."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        """See the proto."""
        yield pb.GenerateResponse(started=pb.Started(request_id=request.request_id, model=MODEL.name))
        last = request.sampling.max_new_tokens - 1
        for number in range(last + 1):
            await self._steps.wait()
            reason = pb.FINISH_REASON_LENGTH if number == last else pb.FINISH_REASON_UNSPECIFIED
            yield pb.GenerateResponse(delta=pb.Delta(token_ids=[number], text=self._steps.stamp, finish_reason=reason))
        yield pb.GenerateResponse(finished=pb.Finished())


def _info(role: str) -> worker_pb2.WorkerInfo:
    info = worker_pb2.WorkerInfo(name=role, role=role, epoch=role, state="ready", model=MODEL)
    info.kv.capacity = 1 << 40
    return info


def _update(left: dict[int, int], handle: int, stamp: str) -> decode_pb2.SequenceUpdate:
    left[handle] -= 1
    update = decode_pb2.SequenceUpdate(handle=handle, token_ids=[1], text=stamp)
    if left[handle] <= 0:
        del left[handle]
        update.finish_reason = pb.FINISH_REASON_LENGTH
    return update


def _stamp() -> str:
    return f"{time.monotonic_ns()} "


async def _serve(config: WorkersConfig) -> None:
    stopped = asyncio.create_task(stop_signal())
    steps = Steps(config.step_ms / 1000)
    stepping = asyncio.create_task(steps.run())
    roles: dict[str, Prefill | Decode | Direct] = {
        "prefill": Prefill(),
        "decode": Decode(steps),
        "direct": Direct(steps),
    }
    servers = []
    for role, service in roles.items():
        server = await RpcServer.start(name=role, host="127.0.0.1", port=0, register=service.register, services=[])
        servers.append(server)
        announce(name=role, role=role, address=server.address, metrics_address="")
    await stopped
    stepping.cancel()
    await asyncio.gather(*(server.stop(0) for server in servers), stepping, return_exceptions=True)


if __name__ == "__main__":
    uvloop.run(_serve(tyro.cli(WorkersConfig, description=__doc__)))
