"""Who waits for room in the arena, and in which order."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from prefill_worker.parcel.store import ParcelStore
from shared.errors import TooLargeError
from shared.kv.arena import Arena, Slot

KIB = 1024


def with_store(capacity: int, body: Callable[[ParcelStore], Coroutine[Any, Any, None]]) -> None:
    arena = Arena(capacity)
    store = ParcelStore(arena)
    asyncio.run(asyncio.wait_for(body(store), 20))
    store.check_integrity()
    assert store.used_bytes == 0
    arena.close()


async def settle() -> None:
    """Lets every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_room_is_given_at_once_and_counted() -> None:
    async def body(store: ParcelStore) -> None:
        first, second = await store.allocate(1 * KIB), await store.allocate(2 * KIB)
        assert store.used_bytes == 3 * KIB
        store.view(first, KIB)[:] = b"a" * KIB
        store.view(second, KIB)[:] = b"b" * KIB
        assert bytes(store.view(first, KIB)) == b"a" * KIB
        store.free(first)
        store.free(second)

    with_store(4 * KIB, body)


def test_a_parcel_larger_than_the_arena_is_refused_at_once() -> None:
    async def body(store: ParcelStore) -> None:
        with pytest.raises(TooLargeError, match=r"may need 4097 bytes.* 4096; .*retention") as caught:
            await store.allocate(4 * KIB + 1)
        assert caught.value.reason == "TOO_LARGE"
        assert not caught.value.retryable
        store.free(await store.allocate(4 * KIB))

    with_store(4 * KIB, body)


def test_waiters_are_served_in_the_order_of_their_arrival() -> None:
    """A small parcel does not overtake a large one, though it would fit: the large one would starve."""

    async def body(store: ParcelStore) -> None:
        held = [await store.allocate(KIB) for _ in range(4)]
        order: list[int] = []

        async def wait(nbytes: int) -> Slot:
            slot = await store.allocate(nbytes)
            order.append(nbytes)
            return slot

        tasks = [asyncio.create_task(wait(nbytes)) for nbytes in (3 * KIB, 1 * KIB, 2 * KIB)]
        await settle()
        store.free(held[0])
        await settle()
        assert order == []
        store.free(held[1])
        store.free(held[2])
        await settle()
        assert order == [3 * KIB]
        store.free(held[3])
        await settle()
        assert order == [3 * KIB, 1 * KIB]
        store.free(tasks[0].result())
        await settle()
        assert order == [3 * KIB, 1 * KIB, 2 * KIB]
        for task in tasks[1:]:
            store.free(task.result())

    with_store(4 * KIB, body)


def test_one_free_may_serve_several_waiters() -> None:
    async def body(store: ParcelStore) -> None:
        held = await store.allocate(4 * KIB)
        tasks = [asyncio.create_task(store.allocate(KIB)) for _ in range(4)]
        await settle()
        store.free(held)
        for slot in await asyncio.gather(*tasks):
            store.free(slot)

    with_store(4 * KIB, body)


@pytest.mark.parametrize("leaves", [0, 1, 2])
def test_a_waiter_that_leaves_loses_nothing_for_the_others(leaves: int) -> None:
    async def body(store: ParcelStore) -> None:
        held = await store.allocate(4 * KIB)
        tasks = [asyncio.create_task(store.allocate(2 * KIB)) for _ in range(3)]
        await settle()
        tasks[leaves].cancel()
        store.free(held)  # in the same turn of the loop: the one who leaves may be the one who was woken
        await settle()
        assert tasks[leaves].cancelled()
        for task in tasks:
            if not task.cancelled():
                store.free(await task)

    with_store(4 * KIB, body)


def test_room_that_is_freed_while_someone_leaves_is_not_lost() -> None:
    async def body(store: ParcelStore) -> None:
        held = await store.allocate(4 * KIB)
        leaving, waiting = (asyncio.create_task(store.allocate(4 * KIB)) for _ in range(2))
        await settle()
        store.free(held)
        await asyncio.sleep(0)  # the wake-up is on its way to the first in line
        leaving.cancel()
        await settle()
        if leaving.done() and not leaving.cancelled():
            store.free(leaving.result())
        store.free(await waiting)

    with_store(4 * KIB, body)
