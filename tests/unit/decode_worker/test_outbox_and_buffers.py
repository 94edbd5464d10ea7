"""The two small queues: tokens on their way out, bytes on their way in."""

from __future__ import annotations

import asyncio

import pytest
from vlcache.worker.v1 import decode_pb2 as pb

from decode_worker import receive_buffers
from decode_worker.receive_buffers import MIN_BYTES, ReceiveBuffers
from decode_worker.token_outbox import Subscription, TokenOutbox
from shared.errors import AbortedError


def handles(message: pb.TokenStreamResponse) -> list[int]:
    return [update.handle for update in message.updates]


def test_everything_that_is_ready_goes_out_in_one_message_and_in_order() -> None:
    async def body() -> None:
        outbox = TokenOutbox()
        messages = outbox.messages()
        for handle in (3, 1, 2):
            Subscription(outbox, handle).send(tokens=[handle], text="x")
        first = await anext(messages)
        assert handles(first) == [3, 1, 2]
        assert first.updates[0] == pb.SequenceUpdate(handle=3, token_ids=[3], text="x")
        waiting = asyncio.create_task(anext(messages))
        await asyncio.sleep(0)
        assert not waiting.done(), "nothing is said when there is nothing to say"
        Subscription(outbox, 4).send(text="y", finish_reason=1)
        assert handles(await waiting) == [4]
        await messages.aclose()

    asyncio.run(body())


def test_what_a_slow_reader_leaves_waits_for_it() -> None:
    async def body() -> None:
        outbox = TokenOutbox()
        messages = outbox.messages()
        Subscription(outbox, 1).send(tokens=[1])
        await anext(messages)
        for token in range(100):
            Subscription(outbox, 1).send(tokens=[token])
        late = await anext(messages)
        assert [update.token_ids[0] for update in late.updates] == [*range(100)]
        await messages.aclose()

    asyncio.run(body())


def test_an_error_carries_code_reason_and_sentence() -> None:
    async def body() -> None:
        outbox = TokenOutbox()
        Subscription(outbox, 5).fail(AbortedError("it ended", reason="LEASE_EXPIRED"))
        messages = outbox.messages()
        (update,) = (await anext(messages)).updates
        assert update.error == pb.SequenceError(code=10, reason="LEASE_EXPIRED", message="it ended")
        await messages.aclose()

    asyncio.run(body())


def test_subscriptions_are_equal_when_outbox_and_handle_are() -> None:
    first, second = TokenOutbox(), TokenOutbox()
    assert Subscription(first, 1) == Subscription(first, 1)
    assert Subscription(first, 1) != Subscription(first, 2)
    assert Subscription(first, 1) != Subscription(second, 1)


@pytest.mark.parametrize("nbytes", [1, 64, MIN_BYTES, MIN_BYTES + 1, 3 * MIN_BYTES])
def test_a_buffer_is_exactly_as_long_as_asked(nbytes: int) -> None:
    with ReceiveBuffers().borrow(nbytes) as buffer:
        assert len(buffer) == nbytes
        buffer[-1] = 1


def test_buffers_are_used_again_but_never_by_two_at_once() -> None:
    buffers = ReceiveBuffers()
    with buffers.borrow(100) as first, buffers.borrow(90) as second:
        first[:] = b"a" * 100
        second[:] = b"b" * 90
        assert bytes(first) == b"a" * 100
        memory = {id(first.obj), id(second.obj)}
        assert len(memory) == 2
    with buffers.borrow(70) as third, buffers.borrow(MIN_BYTES) as fourth:
        assert {id(third.obj), id(fourth.obj)} == memory


def used(buffers: ReceiveBuffers, nbytes: int) -> int:
    """Borrows a buffer and gives it back; returns its identity."""
    with buffers.borrow(nbytes) as buffer:
        return id(buffer.obj)


def test_a_buffer_comes_back_after_an_error() -> None:
    buffers, seen = ReceiveBuffers(), []
    with pytest.raises(RuntimeError), buffers.borrow(100) as buffer:  # noqa: PT012
        seen.append(id(buffer.obj))
        raise RuntimeError
    assert used(buffers, 100) == seen[0]


def test_parcels_of_about_one_size_share_a_buffer_that_is_hardly_larger() -> None:
    buffers = ReceiveBuffers()
    with buffers.borrow(10_000_000) as buffer:
        large = id(buffer.obj)
        assert 10_000_000 <= len(buffer.obj) <= 10_000_000 * 9 // 8
    assert {used(buffers, nbytes) for nbytes in (9_990_000, 8_000_000, 6_000_000, 10_010_000)} == {large}
    assert used(buffers, 1_000_000) != large, "a small parcel must not hold the memory of a large one"
    assert used(buffers, 10_000_000) == large


def test_idle_buffers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive_buffers, "MAX_IDLE_BYTES", 3 * MIN_BYTES)
    buffers = ReceiveBuffers()
    for sizes in ([MIN_BYTES] * 5, [2 * MIN_BYTES, MIN_BYTES]):
        borrowed = [buffers.borrow(size) for size in sizes]
        for each in borrowed:
            each.__enter__()
        for each in borrowed:
            each.__exit__(None, None, None)
        assert buffers.idle_bytes == 3 * MIN_BYTES


def test_the_size_that_came_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory for every large parcel, because small ones came before, would cost more than the transfer."""
    monkeypatch.setattr(receive_buffers, "MAX_IDLE_BYTES", 8 * MIN_BYTES)
    buffers = ReceiveBuffers()
    for nbytes in (MIN_BYTES, 3 * MIN_BYTES, 7 * MIN_BYTES):
        last = used(buffers, nbytes)
    assert used(buffers, 7 * MIN_BYTES) == last
    used(buffers, 9 * MIN_BYTES)
    assert used(buffers, 7 * MIN_BYTES) == last, "what may not be kept anyway displaces nothing"
