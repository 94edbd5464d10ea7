"""Which budgets a request puts up with, and what memory pressure makes of them."""

from __future__ import annotations

import asyncio
import itertools
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from router.admission.retention import STEP, offers_of
from shared import errors
from shared.request.params import Budget, BudgetScope
from tests.unit.router.fakes import (
    Bench,
    FakeDecode,
    FakePrefill,
    bench,
    first_token,
    kinds,
    run,
    transfer,
)

TEXT = "x" * 2000

budgets = st.builds(
    lambda kind, scope: Budget(scope=scope, **kind),
    st.floats(1e-6, 1.0).map(lambda retention: {"retention": retention})
    | st.integers(1, 10_000).map(lambda tokens: {"max_kept_tokens": tokens}),
    st.sampled_from(BudgetScope),
)


@given(budgets, st.floats(0, 1, exclude_min=True), st.integers(1, 5000), st.integers(0, 5000))
@example(Budget(max_kept_tokens=2**63 - 1), 5e-324, 5000, 5000)
def test_offers_go_down_from_what_was_asked_and_each_saves_memory(
    asked: Budget, floor: float, text: int, visual: int
) -> None:
    offers = offers_of(asked, floor, text, visual)
    assert (offers[0].budget, offers[0].share) == (asked, 1)
    for offer in offers:
        assert offer.kept_tokens_bound == offer.budget.kept_tokens_bound(text, visual)
        assert offer.budget.scope is asked.scope
    for higher, lower in itertools.pairwise(offers):
        assert lower.kept_tokens_bound < higher.kept_tokens_bound
        assert lower.share < higher.share


@given(
    budgets, st.floats(1e-6, 1.0), st.integers(1, 3000), st.integers(0, 3000), st.integers(0, 900), st.integers(0, 900)
)
def test_no_offer_lies_below_the_floor_or_above_what_was_asked(
    asked: Budget, floor: float, text: int, visual: int, less_text: int, less_visual: int
) -> None:
    """Also for a prompt that turns out to be smaller than its bounds."""
    true_text, true_visual = max(1, text - less_text), max(0, visual - less_visual)
    wanted = asked.retention_of(true_text, true_visual)
    for offer in offers_of(asked, floor, text, visual):
        granted = offer.budget.retention_of(true_text, true_visual)
        assert granted <= wanted
        assert granted >= min(wanted, Fraction(str(floor)))


def test_a_step_keeps_three_quarters_and_the_last_is_the_floor() -> None:
    offers = offers_of(Budget(retention=0.4), 0.2, 1000, 0)
    assert [offer.budget.retention for offer in offers] == [0.4, 0.3, 0.225, 0.2]
    assert [offer.share for offer in offers] == [1, STEP, STEP**2, Fraction(1, 2)]
    counts = offers_of(Budget(max_kept_tokens=400), 0.2, 1000, 0)
    assert [offer.budget.max_kept_tokens for offer in counts] == [400, 300, 225, 200]


@pytest.mark.parametrize("floor", [0.4, 0.7, 1.0])
def test_a_floor_at_or_above_what_was_asked_lowers_nothing(floor: float) -> None:
    assert len(offers_of(Budget(retention=0.4), floor, 1000, 0)) == 1


def test_where_nothing_is_in_the_scope_nothing_is_lowered() -> None:
    assert len(offers_of(Budget(retention=0.4, scope=BudgetScope.VISUAL), 0.01, 1000, 0)) == 1


def room_for(tokens: int) -> Any:
    """Admits whoever keeps at most `tokens` per layer."""

    def admit(request: decode_pb2.ReserveRequest) -> None:
        if request.kept_tokens_bound > tokens:
            raise errors.ResourceExhaustedError("the pool is full", reason="KV_POOL_FULL")

    return admit


def freed_by_the_second_round() -> Any:
    """Refuses a request's whole first round; then there is memory again."""
    first: list[int] = []

    def admit(request: decode_pb2.ReserveRequest) -> None:
        if request.kept_tokens_bound not in first:
            first.append(request.kept_tokens_bound)
            raise errors.ResourceExhaustedError("the pool is full", reason="KV_POOL_FULL")

    return admit


def told(request: prefill_pb2.PrefillRequest) -> list[Any]:
    """A prefill worker that says what it was told to keep of 50 tokens."""
    budget = Budget.from_proto(request.request.compression, default_retention=0.9)
    message = pb.Compression(
        requested_retention=float(budget.retention_of(10, 40)), prompt_tokens=50, visual_tokens=40, full_bytes=1000
    )
    return [first_token(), prefill_pb2.PrefillEvent(compression=message), transfer()]


def told_to_client(events: list[pb.GenerateResponse]) -> tuple[float, float]:
    (message,) = (event.compression for event in events if event.HasField("compression"))
    return message.asked_retention, message.requested_retention


def lowered(b: Bench) -> float | None:
    return b.metric("retention_lowered_total")


def test_under_pressure_the_retention_goes_down_step_by_step() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = told
            b.decode[0].admit = room_for(1100)
            params = pb.CompressionParams(retention=0.8, min_retention=0.1)
            events = await b.answer(**asking(params))
            assert told_to_client(events) == (0.8, 0.45)
            assert b.prefill[0].requests[0].request.compression.retention == 0.45
            bounds = [reserve.kept_tokens_bound for reserve in b.decode[0].reserves]
            assert bounds == [-(-2020 * share // 1000) + 21 for share in (800, 600, 450)]
            assert lowered(b) == 1
            assert b.metric("retention_lowered_ratio_sum") == 0.5625
            # it did not wait
            assert b.metric("reservation_wait_seconds_count") == 0

    run(main)


def test_a_count_of_tokens_is_lowered_too() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = told
            b.decode[0].admit = room_for(30 + 21)
            events = await b.answer(**asking(pb.CompressionParams(max_kept_tokens=40, min_retention=0.01)))
            assert told_to_client(events) == (40 / 50, 30 / 50)
            assert b.prefill[0].requests[0].request.compression.max_kept_tokens == 30

    run(main)


@pytest.mark.parametrize(
    ("params", "least"),
    [
        (pb.CompressionParams(retention=0.8), 0.8),
        (pb.CompressionParams(retention=0.8, min_retention=1.0), 0.8),
        (pb.CompressionParams(retention=0.8, min_retention=0.75), 0.75),
    ],
)
def test_nobody_gets_less_than_the_floor_and_waits_instead(params: pb.CompressionParams, least: float) -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = told
            b.decode[0].admit = room_for(1100)
            answer = asyncio.create_task(b.answer(**asking(params)))
            await b.becomes_waiting(1)
            b.decode[0].admit = room_for(4096)
            asked, requested = told_to_client(await answer)
            assert asked == 0.8
            # memory came back in the middle of a round, perhaps
            assert least <= requested <= 0.8
            assert b.metric("reservation_wait_seconds_count") == 1

    run(main)


def test_the_router_names_the_floor_of_requests_that_do_not() -> None:
    async def main() -> None:
        async with bench(min_retention=0.2) as b:
            b.prefill[0].script = told
            b.decode[0].admit = room_for(500)
            assert told_to_client(await b.answer(**asking(pb.CompressionParams(retention=0.25)))) == (0.25, 0.2)
            never = asyncio.create_task(b.answer(**asking(pb.CompressionParams(retention=0.25, min_retention=1.0))))
            await b.becomes_waiting(1)
            # a request for exact answers is spared
            exact = asyncio.create_task(b.answer(**asking(pb.CompressionParams(retention=1.0))))
            await b.becomes_waiting(2)
            b.decode[0].admit = room_for(4096)
            assert [told_to_client(await task) for task in (never, exact)] == [(0.25, 0.25), (1.0, 1.0)]

    run(main)


def test_who_waited_gets_what_it_asked_for_when_there_is_memory_again() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = told
            b.decode[0].admit = freed_by_the_second_round()
            events = await b.answer(**asking(pb.CompressionParams(retention=0.8, min_retention=0.1)))
            assert told_to_client(events) == (0.8, 0.8)
            assert lowered(b) == 0
            assert b.metric("reservation_wait_seconds_count") == 1

    run(main)


def test_every_decode_worker_is_asked_before_anything_is_lowered() -> None:
    async def main() -> None:
        decode = [FakeDecode("decode-0"), FakeDecode("decode-1")]
        decode[0].admit = room_for(1100)
        async with bench(decode=decode) as b:
            b.prefill[0].script = told
            for _ in range(2):
                events = await b.answer(**asking(pb.CompressionParams(retention=0.8, min_retention=0.1)))
                assert events[-1].finished.placement.decode_worker == "decode-1"
                assert told_to_client(events) == (0.8, 0.8)

    run(main)


def test_what_can_never_fit_is_lowered_or_refused() -> None:
    async def main() -> None:
        async with bench() as b:

            def small(request: decode_pb2.ReserveRequest) -> None:
                if request.kept_tokens_bound > 1100:
                    raise errors.TooLargeError("larger than the pool", reason="TOO_LARGE")

            b.prefill[0].script, b.decode[0].admit = told, small
            events = await b.answer(**asking(pb.CompressionParams(retention=0.8, min_retention=0.1)))
            assert told_to_client(events) == (0.8, 0.45)

    run(main)


def test_a_second_attempt_begins_with_what_was_asked_for() -> None:
    async def main() -> None:
        prefill = [FakePrefill("prefill-0"), FakePrefill("prefill-1")]
        async with bench(prefill=prefill) as b:

            def lost(_: prefill_pb2.PrefillRequest) -> list[Any]:
                b.decode[0].admit = room_for(4096)
                prefill[0].script = prefill[1].script = told
                return [errors.UnavailableError("gone")]

            prefill[0].script = prefill[1].script = lost
            b.decode[0].admit = room_for(1100)
            events = await b.answer(**asking(pb.CompressionParams(retention=0.8, min_retention=0.1)))
            assert kinds(events)[-1] == "finished"
            assert told_to_client(events) == (0.8, 0.8)

    run(main)


def asking(params: pb.CompressionParams) -> dict[str, Any]:
    """The fields of a request with 2000 bytes of text."""
    message = pb.Message(role="user", parts=[pb.Part(text=TEXT)])
    return {"messages": [message], "compression": params}
