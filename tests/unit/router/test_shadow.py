"""Shadow mode: what is repeated, what of it is counted, and that it costs clients nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from router.shadow import agreement, is_sampled
from shared import errors
from tests.unit.router.fakes import (
    Bench,
    FakeDecode,
    bench,
    compression,
    first_token,
    forever,
    hang,
    kinds,
    run,
    say,
    text_of,
    transfer,
)


def test_the_sample_is_a_share_of_the_ids_and_always_the_same() -> None:
    ids = [f"request-{number}" for number in range(2000)]
    assert not any(is_sampled(name, 0.0) for name in ids)
    assert all(is_sampled(name, 1.0) for name in ids)
    tenth = [name for name in ids if is_sampled(name, 0.1)]
    assert 120 < len(tenth) < 280
    assert tenth == [name for name in ids if is_sampled(name, 0.1)]
    assert set(tenth) <= {name for name in ids if is_sampled(name, 0.2)}


@pytest.mark.parametrize(
    ("compressed", "full", "share"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3], [1, 2, 4], 0.5),
        # the first token is never touched by compression
        ([1, 2, 3], [9, 2, 3], 1.0),
        # what only one of them has does not count
        ([1, 2], [1, 2, 3, 4], 1.0),
        ([1, 5, 3, 4], [1, 2, 3], 0.5),
        ([1], [1, 2], 1.0),
    ],
)
def test_agreement(compressed: list[int], full: list[int], share: float) -> None:
    assert agreement(compressed, full) == agreement(full, compressed) == share


def is_replay(message: pb.GenerateRequest) -> bool:
    return message.request_id.startswith("shadow-")


def telling_apart(*replay: Any, client: tuple[Any, ...] = ()) -> Callable[[prefill_pb2.PrefillRequest], list[Any]]:
    """A prefill script that plays `replay` for repetitions and the usual events for clients."""
    usual = client or (first_token(), compression(), transfer())
    return lambda request: list(replay or usual) if is_replay(request.request) else list(usual)


def tokens_of_replays(b: Bench, script: Any) -> None:
    """Lets the decode worker play `script` for repetitions."""
    usual = b.decode[0].script

    async def choose(stream: Any, handle: int, token: bytes) -> None:
        reserve = b.decode[0].reserves[int(token.decode().removeprefix("token-")) - 1]
        await (script if reserve.request_id.startswith("shadow-") else usual)(stream, handle, token)

    b.decode[0].script = choose


def count(b: Bench, outcome: str) -> float:
    return b.metric("shadow_requests_total", outcome=outcome) or 0.0


def test_a_finished_request_is_repeated_at_retention_1_and_compared() -> None:
    async def other(stream: Any, handle: int, token: bytes) -> None:
        update = decode_pb2.SequenceUpdate(handle=handle, token_ids=[2, 9], finish_reason=pb.FINISH_REASON_LENGTH)
        stream.send(update)

    async def main() -> None:
        async with bench(shadow_share=1.0) as b:
            tokens_of_replays(b, other)
            params = pb.CompressionParams(
                policy="streaming", retention=0.2, min_retention=0.1, wire=pb.WireParams(bits=4)
            )
            events = await b.answer(request_id="r", compression=params, images=1)
            assert text_of(events) == "ABC"
            await b.idle()
            asked, repeated = (request.request for request in b.prefill[0].requests)
            assert repeated.compression == pb.CompressionParams(policy="vl_cache", retention=1.0)
            assert repeated.sampling == asked.sampling
            assert repeated.sampling.HasField("seed")
            assert (list(repeated.messages), repeated.model) == (list(asked.messages), asked.model)
            assert repeated.request_id != asked.request_id
            assert b.decode[0].reserves[1].kept_tokens_bound == len("what is it?") + 20 + 576
            assert count(b, "compared") == 1
            assert b.metric("shadow_agreement_ratio_count") == 1
            assert b.metric("shadow_agreement_ratio_sum") == 0.5

    run(main)


def test_a_repetition_is_in_no_metric_of_the_clients() -> None:
    async def main() -> None:
        seen = []
        for share in (0.0, 1.0):
            async with bench(shadow_share=share) as b:
                await b.answer()
                await b.idle()
                assert count(b, "compared") == share
                seen.append(countable(b))
                totals = (await b.stub.GetServerInfo(pb.GetServerInfoRequest())).totals
                assert totals.requests == 1
        assert seen[0] == seen[1]

    run(main)


# Set when health has looked at the workers, at its next look at the latest: sooner or later than a request ends.
OF_WORKERS = ("worker_state", "circuit_state", "cache_usage", "served_models")


def countable(b: Bench) -> dict[str, float]:
    """Every metric of the router that measures neither time nor workers, shadow mode's own apart."""
    samples = (sample for metric in b.router.metrics.registry.collect() for sample in metric.samples)
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for sample in samples
        if not any(word in sample.name for word in (*OF_WORKERS, "seconds", "shadow", "_created"))
    }


@pytest.mark.parametrize("realised", [1.0, None])
def test_where_nothing_was_compressed_there_is_nothing_to_compare(realised: float | None) -> None:
    """Everything was kept, or the first token ended the answer."""
    whole = prefill_pb2.PrefillEvent(compression=pb.Compression(realised_retention=1.0))
    ended = (first_token("no", pb.FINISH_REASON_STOP),)
    script = telling_apart(client=ended if realised is None else (first_token(), whole, transfer()))

    async def main() -> None:
        async with bench(shadow_share=1.0) as b:
            b.prefill[0].script = script
            await b.answer()
            await b.idle()
            assert len(b.prefill[0].requests) == 1
            assert count(b, "compared") == count(b, "dropped") == 0

    run(main)


def test_only_one_is_repeated_at_a_time() -> None:
    async def main() -> None:
        async with bench(shadow_share=1.0) as b:
            goes_on = asyncio.Event()

            async def late(stream: Any, handle: int, token: bytes) -> None:
                await goes_on.wait()
                await say("B", "C")(stream, handle, token)

            tokens_of_replays(b, late)
            await b.answer()
            await b.decode[0].attached.reaches(2)
            # its prompt is computed: a sequence more in the batch is nobody's loss
            await b.answer()
            assert count(b, "dropped") == 1
            goes_on.set()
            await b.idle()
            assert count(b, "compared") == 1
            assert len(b.prefill[0].requests) == 3

    run(main)


def test_a_client_that_comes_while_its_prompt_is_computed_ends_it() -> None:
    async def main() -> None:
        async with bench(shadow_share=1.0) as b:
            b.prefill[0].script = telling_apart(forever())
            await b.answer()
            await b.prefill[0].requests.reaches(2)
            assert kinds(await b.answer())[-1] == "finished"
            assert (await b.prefill[0].cancelled.reaches(1)).startswith("shadow-")
            await b.decode[0].releases.reaches(1)
            assert count(b, "dropped") >= 1
            # the second answer may have been too early to be repeated
            await b.router.shadow.close()

    run(main)


def test_a_client_that_finds_no_memory_gets_that_of_the_repetition_and_does_not_wait() -> None:
    async def main() -> None:
        async with bench(shadow_share=1.0) as b:

            def one_at_a_time(_: decode_pb2.ReserveRequest) -> None:
                if b.decode[0].live:
                    raise errors.ResourceExhaustedError("the pool is full", reason="KV_POOL_FULL")

            b.decode[0].admit = one_at_a_time
            tokens_of_replays(b, hang)
            await b.answer()
            await b.decode[0].attached.reaches(2)
            params = pb.CompressionParams(retention=0.5, min_retention=0.01)
            events = await b.answer(compression=params)
            assert kinds(events)[-1] == "finished"
            assert count(b, "dropped") == 1
            # neither lowered nor made to stand in line
            assert b.metric("retention_lowered_total") == 0
            assert b.metric("reservation_wait_seconds_count") == 0
            await b.router.shadow.close()

    run(main)


def test_nothing_is_repeated_while_a_client_waits_for_memory() -> None:
    async def main() -> None:
        async with bench(shadow_share=1.0) as b:
            ended = asyncio.Event()

            async def first_waits(stream: Any, handle: int, token: bytes) -> None:
                await ended.wait()
                await say("B")(stream, handle, token)

            def full(_: decode_pb2.ReserveRequest) -> None:
                raise errors.ResourceExhaustedError("the pool is full", reason="KV_POOL_FULL")

            b.decode[0].script = first_waits
            first = asyncio.create_task(b.answer(request_id="first"))
            await b.decode[0].attached.reaches(1)
            b.decode[0].admit = full
            second = asyncio.create_task(b.answer(request_id="second"))
            await b.becomes_waiting(1)
            ended.set()
            await first
            await b.router.settle(5)
            assert count(b, "dropped") == 1
            assert not any(reserve.request_id.startswith("shadow-") for reserve in b.decode[0].reserves)
            b.decode[0].admit = lambda _: None
            await second
            await b.idle()
            assert count(b, "compared") == 1

    run(main)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_drain_ends_it(stage: str) -> None:
    async def main() -> None:
        async with bench(shadow_share=1.0) as b:
            if stage == "prefill":
                b.prefill[0].script = telling_apart(forever())
            else:
                tokens_of_replays(b, hang)
            await b.answer()
            await (b.prefill[0].requests if stage == "prefill" else b.decode[0].attached).reaches(2)
            b.router.check_integrity()
            assert await b.router.stop()
            assert b.decode[0].releases == [b"token-2"]
            assert count(b, "dropped") == 1

    run(main)


def test_a_failure_is_counted_and_is_nobodys_else() -> None:
    async def main() -> None:
        async with bench(shadow_share=1.0) as b:
            b.prefill[0].script = telling_apart(errors.InternalError("broken"))
            assert kinds(await b.answer())[-1] == "finished"
            await b.idle()
            assert count(b, "failed") == 1
            assert b.metric("shadow_agreement_ratio_count") == 0
            assert b.metric("requests_total", outcome="finished", code="OK") == 1

    run(main)


def test_a_crowd_leaves_nothing_behind_and_every_sampled_request_has_one_outcome() -> None:
    async def main() -> None:
        async with bench(decode=[FakeDecode("decode-0"), FakeDecode("decode-1")], shadow_share=1.0) as b:
            answers = await asyncio.gather(*(b.answer() for _ in range(40)))
            assert all(text_of(answer) == "ABC" for answer in answers)
            await b.idle()
            assert count(b, "compared") + count(b, "dropped") == 40
            assert count(b, "compared") >= 1
            assert count(b, "failed") == 0

    run(main)
