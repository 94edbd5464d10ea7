"""Two requests whose promises do not fit together: the old one outgrows its own, and the young one leaves for it.

A token takes 64 bytes, the pool has eight of them. The old request keeps one token and the young one three.
"""

from __future__ import annotations

from decode_worker.answers import Answer
from tests.unit.decode_worker.hand_driven import HandDriven
from tests.unit.decode_worker.marks import LAYOUT, Client
from tests.unit.decode_worker.pools import Pool, block_pool, poison, slab_pool

TOKEN_BYTES = 64
PROMISED = 2
OLD_ANSWER, YOUNG_ANSWER = 6, 5


def pool_of(storage: str, tokens: int) -> Pool:
    capacity = tokens * TOKEN_BYTES
    pool: Pool = slab_pool(LAYOUT, capacity) if storage == "slabs" else block_pool(LAYOUT, capacity + 32, block_size=1)
    poison(pool)
    assert pool.capacity == capacity
    return pool


def deliver_all(it: HandDriven) -> None:
    while it.delivered:
        it.deliver()
    it.check()


def parked(it: HandDriven) -> list[Answer]:
    return [held for held in it.reservations.answers if held.parked]


# In the life of the old request, in this order. From `parked` on the young one is asked to leave, and then does.
MOMENTS = ("running", "outgrown", "moving out", "parked", "moving in", "back")


def bring_to(moment: str, it: HandDriven) -> tuple[Client, Client]:
    old = it.ready(OLD_ANSWER, stream=0)
    it.turn()
    young = it.ready(YOUNG_ANSWER, stream=1)
    if moment == "running":
        return old, young
    it.turn()
    assert it.delivered[-1].outgrown == [old.held.sequence]
    if moment == "outgrown":
        return old, young
    deliver_all(it)
    assert len(it.thread.waiting) == 1
    if moment == "moving out":
        return old, young
    it.copy()
    assert parked(it) == [old.held]
    assert it.runner._evicted == {young.held}
    if moment == "parked":
        return old, young
    it.turn()
    deliver_all(it)
    it.copy()
    assert parked(it) == [young.held]
    assert len(it.thread.waiting) == 1
    if moment == "moving in":
        return old, young
    it.copy()
    assert old.held.sequence in it.runner._joined
    return old, young
