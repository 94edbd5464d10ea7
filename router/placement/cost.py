"""What a request costs on a worker, in seconds, so that workers of any size and both roles compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random

from router.placement.base import Demand
from router.workers.worker import Worker

# A decode pool that is full to the last byte weighs as much as so long a queue before prefill.
FULL_POOL_S = 1.0
# What it is worth to hand a parcel over in memory instead of sending it: some 50 MB at 1.5 GB/s.
IN_MEMORY_S = 0.03

# What of its own time a prompt may lose so that routers that know the same do not do the same.
MAX_NOISE = 0.5

Cost = Callable[[Worker, Demand], float]


def prefill_cost(worker: Worker, demand: Demand) -> float:
    """Seconds until its prompt would be done: the tokens before it and its own, by the worker's measured speed."""
    return (worker.load + demand.prompt_tokens) / worker.speed.tokens_per_s


def own_time(worker: Worker, demand: Demand) -> float:
    """Seconds of them that are its own."""
    return demand.prompt_tokens / worker.speed.tokens_per_s


def noisy_prefill_cost(workers: Sequence[Worker], chance: Random) -> Cost:
    """`prefill_cost`, less exact the more of the load was sent by others.

    Several routers read the same reports and would all run to the same empty worker until the next ones. What a router
    has sent itself it knows exactly: alone it needs no noise.
    """
    spread = MAX_NOISE * _load_of_others(workers)
    if spread == 0:
        return prefill_cost
    return lambda worker, demand: prefill_cost(worker, demand) + spread * chance.random() * own_time(worker, demand)


def _load_of_others(workers: Sequence[Worker]) -> float:
    """Its share, in [0, 1]."""
    load = sum(worker.load for worker in workers)
    return 1 - sum(worker.own_load for worker in workers) / load if load else 0.0


def decode_cost(worker: Worker, demand: Demand) -> float:
    """The share of the pool that would be taken with it: memory binds a decode worker, and its steps read it."""
    return FULL_POOL_S * (worker.load + demand.kv_tokens * worker.token_bytes) / (worker.capacity or 1)


def ranked(workers: Iterable[Worker], cost: Cost, demand: Demand) -> list[tuple[float, Worker]]:
    """The ready ones with their costs, cheapest first; equals take turns. Over its share a new one's cost is higher."""
    ready = [worker for worker in workers if worker.ready]
    # the number settles what is left, so that workers themselves are never compared
    priced = [
        (cost(worker, demand) / worker.share, worker.last_dispatch, number) for number, worker in enumerate(ready)
    ]
    return [(price, ready[number]) for price, _, number in sorted(priced)]
