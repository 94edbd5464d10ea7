"""A worker is lost in the middle of an answer: its parcel goes to another one, which is told what was delivered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from vlcache.worker.v1 import decode_pb2 as pb

from decode_worker.config import DecodeConfig
from decode_worker.engine import DecodeEngine, EagerEngine
from decode_worker.graph_engine import GraphEngine
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.sequence import Sequence as Running
from decode_worker.worker import LoadedModel
from shared.kernels.dispatch import kernels_for
from shared.kv.manifest import Manifest, TransferId
from shared.request.sampling import Sampling
from shared.rpc.status import from_rpc_error
from tests.unit.decode_worker.parcels import manifest_of
from tests.unit.decode_worker.pools import CPU, block_pool, poison
from tests.unit.decode_worker.sequences import LAYOUT, advance, pooled, sequence, some
from tests.unit.decode_worker.serving import BuildEngine, Served, TokenStream, frames, serving, until
from tests.unit.decode_worker.shipment import Shipment

ANSWER = 15
SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "seed": 4}


def interpreted(config: DecodeConfig, loaded: LoadedModel) -> tuple[Any, Any]:
    """Blocks under Triton's kernels."""
    kernels = kernels_for(CPU, "triton")
    pool = block_pool(LAYOUT, 1 << 20, block_size=4, max_num_seqs=config.max_num_seqs, max_tokens=128, kernels=kernels)
    poison(pool)
    return pool, GraphEngine(loaded.model, pool, max_num_seqs=config.max_num_seqs)


def sampling(max_new_tokens: int = ANSWER, **how: Any) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, ignore_eos=True, **how)


@dataclass(frozen=True)
class Ahead:
    """The parcel of a prompt whose answer's first tokens were drawn by the prefill worker; one is the usual case."""

    shipment: Shipment
    body: memoryview
    num_kept: tuple[int, ...]
    generated: tuple[int, ...]

    def manifest(self, name: str, attempt: int, how: Sampling, **changes: Any) -> Manifest:
        tokens = self.shipment.prompt.num_tokens + len(self.generated) - 1
        truth = {
            "transfer": TransferId(request_id=name, attempt=attempt, prefill_epoch="prefill"),
            "compatibility": self.shipment.manifest().compatibility,
            "logical_length": tokens,
            "next_position": tokens,
            "generated": self.generated,
            "sampling": how,
        }
        return manifest_of(LAYOUT, self.num_kept, self.body, **(truth | changes))


def ahead(loaded: LoadedModel, shipment: Shipment, drawn: int, **how: Any) -> Ahead:
    pool, prompt = SlabPool(1 << 20, LAYOUT), shipment.prompt
    engine = EagerEngine(loaded.model, pool)
    each = sequence(prompt, pooled(pool, prompt, some(3, prompt.num_tokens), drawn), drawn, **how)
    generated = [each.last_token]
    for _ in range(drawn - 1):
        advance([each], engine.step([each]))
        generated.append(each.last_token)
    exported = pool.export(each.kv)
    return Ahead(shipment, exported.body, exported.num_kept, tuple(generated))


class Watched:
    """An engine whose passes are noted."""

    def __init__(self) -> None:
        self.engine: DecodeEngine
        self.passes: list[tuple[str, int]] = []

    def build(self, build: BuildEngine) -> BuildEngine:
        def watched(config: DecodeConfig, loaded: LoadedModel) -> tuple[Any, Any]:
            pool, self.engine = build(config, loaded)
            return pool, self

        return watched

    @property
    def replays(self) -> list[int]:
        """Tokens of each replay."""
        return [number for what, number in self.passes if what == "replay"]

    def step(self, batch: Sequence[Running]) -> list[int]:
        self.passes.append(("step", len(batch)))
        return self.engine.step(batch)

    def replay(self, each: Running, number: int) -> None:
        self.passes.append(("replay", number))
        self.engine.replay(each, number)


async def go_on(
    served: Served,
    parcel: Ahead,
    stream: TokenStream,
    handle: int,
    delivered: Sequence[int] = (),
    *,
    how: Sampling | None = None,
    early: bool = False,
    announced: int | None = None,
) -> bytes:
    """What a router does; returns the reservation's secret.

    Args:
        early: Attaches before the parcel comes.
        announced: Delivered tokens that the reservation speaks of; without it those that there are.
    """
    name, how = str(handle), how or sampling()
    promise = await reserve(
        served,
        request_id=name,
        attempt=2,
        max_new_tokens=how.max_new_tokens,
        delivered_tokens=len(delivered) if announced is None else announced,
    )
    if early:
        await stream.attach(handle, promise.token, delivered)
        await until(lambda: served.held.find(promise.token).answers[0].subscription)
    await served.put(frames(promise.token, parcel.manifest(name, 2, how), parcel.body))
    if not early:
        await stream.attach(handle, promise.token, delivered)
    return promise.token


async def reserve(served: Served, **changes: Any) -> pb.ReserveResponse:
    """Asks again while sequences that have outgrown their room are waiting for theirs."""
    while True:
        try:
            return await served.reserve(**changes)
        except grpc.aio.AioRpcError as error:
            if from_rpc_error(error).reason != "KV_FULL":
                raise
            await asyncio.sleep(0.01)


async def uninterrupted(
    loaded: LoadedModel, parcel: Ahead, how: Sampling, **settings: Any
) -> tuple[list[int], list[str]]:
    """The answer's tokens, those of the parcel included, and the text that the worker sent with each of its own."""
    async with serving(loaded, **settings) as served:
        stream = served.stream()
        await go_on(served, parcel, stream, 0, how=how)
        updates = await stream.finished(0)
    drawn = [token for update in updates for token in update.token_ids]
    return [*parcel.generated, *drawn], [update.text for update in updates]


def replayed(served: Served) -> tuple[float, float]:
    """Tokens that the worker has counted as replayed, and replays."""
    metrics = served.worker.metrics
    stage = metrics.labelled(metrics.stage_seconds, stage="replay")
    return metrics.replayed_tokens._value.get(), sum(bucket.get() for bucket in stage._buckets)
