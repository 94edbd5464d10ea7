"""The choice of a pair, and the loads it rests on."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vlcache.worker.v1 import worker_pb2

from router.placement import LeastLoaded, Pair
from router.worker import Worker
from shared.errors import FailedPreconditionError
from tests.unit.router.fakes import FakeDecode, FakePrefill, bench, first_token, run, served_model


def worker(role: str, name: str, **info: Any) -> Worker:
    client: Any = SimpleNamespace(open_token_stream=None, address=name)
    said = worker_pb2.WorkerInfo(name=name, role=role, epoch="1", state="ready", model=served_model(), **info)
    return Worker(client, said)


def pairs(prefill: list[Worker], decode: list[Worker]) -> list[Pair]:
    return [Pair(one, other) for one in prefill for other in decode]


def chosen(pair: Pair) -> tuple[str, str]:
    return pair.prefill.info.name, pair.decode.info.name


def test_the_least_loaded_pair_comes_first_and_all_pairs_come() -> None:
    prefill = [worker("prefill", "p0", outstanding_tokens=10), worker("prefill", "p1", outstanding_tokens=5)]
    decode = [worker("decode", f"d{number}") for number in range(3)]
    for number, one in enumerate(decode):
        one.charge((7, 3, 5)[number])
    order = [chosen(pair) for pair in LeastLoaded().order(pairs(prefill, decode))]
    assert order == [("p1", "d1"), ("p1", "d2"), ("p1", "d0"), ("p0", "d1"), ("p0", "d2"), ("p0", "d0")]


def test_equals_take_turns() -> None:
    everyone = pairs([worker("prefill", f"p{n}") for n in range(2)], [worker("decode", f"d{n}") for n in range(3)])
    seen = []
    for _ in range(6):
        first = LeastLoaded().order(everyone)[0]
        for one in (first.prefill, first.decode):
            one.charge(100).end()
        seen.append(chosen(first))
    assert [name for name, _ in seen] == ["p0", "p1"] * 3
    assert [name for _, name in seen] == ["d0", "d1", "d2"] * 2


def test_a_burst_spreads_before_any_worker_has_reported() -> None:
    everyone = pairs([worker("prefill", f"p{n}") for n in range(4)], [worker("decode", "d")])
    for _ in range(8):
        LeastLoaded().order(everyone)[0].prefill.charge(50)
    assert {pair.prefill.load for pair in everyone} == {100}


def test_load_is_the_report_plus_what_happened_since_and_never_less_than_our_own() -> None:
    one = worker("prefill", "p", outstanding_tokens=100)
    assert one.load == 100
    ours = one.charge(30)
    assert one.load == 130
    # the next report contains our request and those of others
    one.observe(worker_pb2.WorkerInfo(role="prefill", state="ready", outstanding_tokens=120))
    assert one.load == 120
    ours.end()
    assert one.load == 90
    # a report from before our dispatch must not hide it
    late = one.charge(40)
    one.observe(worker_pb2.WorkerInfo(role="prefill", state="ready", outstanding_tokens=0))
    assert one.load == 40
    late.end()
    assert one.load == 0


def test_decode_load_is_every_byte_that_a_new_request_cannot_have() -> None:
    one = worker("decode", "d")
    said = worker_pb2.WorkerInfo(role="decode", state="ready")
    said.kv.reserved, said.kv.filling, said.kv.active, said.kv.retained = 1, 20, 300, 4000
    one.observe(said)
    assert one.load == 321


def test_charges_end_once_and_keep_their_sum() -> None:
    one = worker("decode", "d")
    first, second = one.charge(10), one.charge(20)
    first.resize(15)
    one.check_integrity()
    assert one.load == 35
    first.end()
    first.end()
    first.resize(99)
    assert one.load == 20
    second.end()
    one.check_integrity()
    assert (one.load, one.charges) == (0, set())


def test_integrity_notices_a_lost_charge() -> None:
    one = worker("decode", "d")
    one.charge(10)
    one.own_load -= 1
    with pytest.raises(AssertionError):
        one.check_integrity()


@pytest.mark.parametrize(("role", "state"), [("router", "ready"), ("decode", "asleep")])
def test_a_worker_that_says_nonsense_is_not_used(role: str, state: str) -> None:
    with pytest.raises(FailedPreconditionError):
        worker("decode", "d").observe(worker_pb2.WorkerInfo(role=role, state=state))


def test_only_compatible_workers_are_paired() -> None:
    async def main() -> None:
        old, new = served_model(compatibility="old"), served_model(compatibility="new")
        prefill = [FakePrefill("prefill-old", model=old), FakePrefill("prefill-new", model=new)]
        decode = [FakeDecode("decode-new", model=new), FakeDecode("decode-newer", model=served_model())]
        async with bench(prefill, decode) as b:
            assert [chosen(pair) for pair in b.router.table.pairs("toy")] == [("prefill-new", "decode-new")]
            for _ in range(3):
                placement = (await b.answer())[-1].finished.placement
                assert (placement.prefill_worker, placement.decode_worker) == ("prefill-new", "decode-new")

    run(main)


def test_concurrent_requests_use_all_workers() -> None:
    async def main() -> None:
        prefill = [FakePrefill(f"prefill-{n}") for n in range(2)]
        decode = [FakeDecode(f"decode-{n}") for n in range(2)]
        async with bench(prefill, decode) as b:
            together = asyncio.Event()
            for one in prefill:
                one.script = lambda _: [together.wait(), first_token("A", 1)]
            asked = [asyncio.create_task(b.answer()) for _ in range(8)]
            for one in prefill:
                await one.requests.reaches(4)
            assert [len(one.reserves) for one in decode] == [4, 4]
            together.set()
            await asyncio.gather(*asked)
            assert [len(one.requests) for one in prefill] == [4, 4]

    run(main)
