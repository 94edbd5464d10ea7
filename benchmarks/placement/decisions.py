"""How long a decision takes, by the number of workers."""

from __future__ import annotations

import statistics
import time
from random import Random
from types import SimpleNamespace
from typing import Any

from vlcache.worker.v1 import worker_pb2

from benchmarks.placement.views import MODEL
from router.placement.base import Demand, Group
from router.placement.catalogue import POLICIES
from router.workers.worker import DECODE, PREFILL, READY, Worker

COUNTS = (10, 100, 500)
DECISIONS = 200


def decision_us(seed: int) -> dict[str, dict[str, float]]:
    """Median microseconds of CPU time from a request to its pair, by policy and workers of each role."""
    groups = {str(count): _group(count, Random(seed)) for count in COUNTS}
    return {
        name: {
            count: _median_us(POLICIES[name](Random(seed)).order, group, Random(seed))
            for count, group in groups.items()
        }
        for name in POLICIES
    }


def _median_us(order: Any, group: Group, chance: Random) -> float:
    taken = []
    for _ in range(DECISIONS):
        image = chance.getrandbits(64)
        demand = Demand(prompt_tokens=1000, kv_tokens=200, image_key=lambda image=image: image)  # type: ignore[misc]
        begin_ns = time.thread_time_ns()
        next(order([group], demand))
        taken.append(time.thread_time_ns() - begin_ns)
    return statistics.median(taken) / 1000


def _group(count: int, chance: Random) -> Group:
    """Unequal loads; every host has a worker of each role, which is the most that has to be looked at."""
    prefill = [_worker(PREFILL, number) for number in range(count)]
    decode = [_worker(DECODE, number) for number in range(count)]
    for worker in (*prefill, *decode):
        worker.charge(chance.randrange(10_000))
    return Group(prefill, decode)


def _worker(role: str, number: int) -> Worker:
    info = worker_pb2.WorkerInfo(role=role, state=READY, model=MODEL, arena_socket="/run/arena")
    info.kv.capacity = 1 << 36
    client: Any = SimpleNamespace(open_token_stream=None, address=f"host-{number}:{50051 + (role == DECODE)}")
    return Worker(client, info)
