"""Sequences leave a draining decode worker before it has left, and nobody loses a token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.background import Background
from router.requests.migration import Migration
from shared import errors
from tests.unit.router.fakes import (
    Bench,
    FakeDecode,
    FakePrefill,
    Log,
    Stream,
    bench,
    compression,
    first_token,
    forever,
    go_on,
    rest,
    run,
    transfer,
)
from tests.unit.router.test_failover import check_counted_once, check_whole, pairs
from tests.unit.router.test_failures import full


class Leaving:
    """A bench with a sequence of which four tokens were said, on a worker that then begins to drain."""

    def __init__(self, b: Bench) -> None:
        self.b = b

    async def begin(self) -> None:
        self.call = self.b.ask(request_id="moves")
        self.seen = [await self.call.read() for _ in range(7)]
        (self.old,) = (worker for worker in self.b.decode if worker.live)
        self.others = [worker for worker in self.b.decode if worker is not self.old]
        for worker in self.others:
            worker.script = go_on()

    def drain(self, how: str = "poll") -> None:
        if how == "stream":
            self.old.streams[0].say_draining()
        else:
            self.old.info.state = "draining"

    async def check_whole(self) -> None:
        check_whole([*self.seen, *await rest(self.call)])
        await self.b.idle()
        check_counted_once(self.b)

    @property
    def migrations(self) -> float:
        return self.b.metric("failovers_total", kind="migration", reason="DRAINING") or 0.0


def stays(prefill: int = 1, decode: int = 2) -> tuple[list[FakePrefill], list[FakeDecode]]:
    """Workers whose sequences stop after four tokens."""
    senders, receivers = pairs(prefill, decode)
    for worker in receivers:
        worker.script = go_on(until=4, then=lambda *_: forever())
    return senders, receivers


@pytest.mark.parametrize("how", ["poll", "stream"])
def test_a_sequence_moves_to_another_worker_with_room(how: str) -> None:
    async def main() -> None:
        prefill, decode = stays()
        async with bench(prefill, decode) as b:
            leaving = Leaving(b)
            await leaving.begin()
            leaving.drain(how)
            await leaving.check_whole()
            (other,) = leaving.others
            assert other.delivered == [[1, 2, 3, 4]]
            assert leaving.old.releases == [b"token-1"]
            assert leaving.migrations == 1
            assert b.metric("failover_seconds_count", answer="begun") == 1
            assert len(prefill[0].requests) == len(prefill[0].resends) == 1

    run(main)


def test_it_works_on_where_it_is_until_the_parcel_has_arrived() -> None:
    async def main() -> None:
        prefill, decode = stays()
        arrived, asked_for = asyncio.Event(), asyncio.Event()
        more = asyncio.Event()

        async def old(stream: Stream, handle: int, token: bytes) -> None:
            await go_on(until=4)(stream, handle, token)
            await more.wait()
            stream.delivered[handle] = [1, 2, 3, 4]
            await go_on(until=6)(stream, handle, token)
            await forever()

        def travels(_: Any) -> Any:
            asked_for.set()
            return arrived.wait()

        for worker in decode:
            worker.script = old
        prefill[0].on_resend = travels
        async with bench(prefill, decode) as b:
            leaving = Leaving(b)
            await leaving.begin()
            leaving.drain()
            await asked_for.wait()
            assert leaving.old.cancels == []
            more.set()
            leaving.seen += [await leaving.call.read() for _ in range(2)]
            arrived.set()
            await leaving.check_whole()
            assert leaving.others[0].delivered == [[1, 2, 3, 4, 5, 6]]

    run(main)


def test_without_room_elsewhere_it_stays_and_tries_again() -> None:
    async def main() -> None:
        prefill, decode = stays()
        async with bench(prefill, decode) as b:
            leaving = Leaving(b)
            await leaving.begin()
            (other,) = leaving.others
            other.admit = full
            leaving.drain()
            await other.reserves.reaches(1)
            assert leaving.old.cancels == []
            assert b.metric("num_requests_waiting") == 0
            other.admit = lambda _: None
            await leaving.check_whole()
            # the first refusal ended the round, so there was at most one in each
            assert 2 <= len(other.reserves) <= 4
            assert leaving.migrations == 1

    run(main)


@pytest.mark.parametrize("why", ["no parcel", "no other worker", "parcel gone"])
def test_it_ends_where_it_is_when_it_cannot_leave(why: str) -> None:
    async def main() -> None:
        prefill, decode = stays(decode=1 if why == "no other worker" else 2)
        ends = asyncio.Event()

        async def ends_later(stream: Stream, handle: int, token: bytes) -> None:
            await go_on(until=4)(stream, handle, token)
            await ends.wait()
            stream.delivered[handle] = [1, 2, 3, 4]
            await go_on()(stream, handle, token)

        for worker in decode:
            worker.script = ends_later
        if why == "no parcel":
            prefill[0].script = lambda _: [first_token(), compression(), transfer()]
        async with bench(prefill, decode) as b:
            leaving = Leaving(b)
            await leaving.begin()
            if why == "parcel gone":
                prefill[0].parcels.clear()
            leaving.drain()
            await b.becomes(lambda: b.worker(leaving.old.info.name).state == "draining")
            if why == "parcel gone":
                await prefill[0].resends.reaches(1)
            ends.set()
            await leaving.check_whole()
            assert leaving.migrations == 0
            assert leaving.old.cancels == []

    run(main)


def test_a_resend_that_fails_leaves_it_where_it_is() -> None:
    async def main() -> None:
        prefill, decode = stays()

        def refuse(request: Any) -> None:
            raise errors.AbortedError(
                "released", reason="RELEASED", stage="transfer", worker=request.ticket.decode_worker
            )

        prefill[0].on_resend = refuse
        async with bench(prefill, decode) as b:
            leaving = Leaving(b)
            await leaving.begin()
            leaving.drain()
            await prefill[0].resends.reaches(1)
            await leaving.others[0].releases.reaches(1)
            assert leaving.old.cancels == []
            prefill[0].on_resend = lambda _: None
            await leaving.check_whole()
            assert leaving.migrations == 1

    run(main)


@pytest.mark.parametrize("phase", ["reserve", "resend"])
@pytest.mark.parametrize("event", ["client leaves", "worker dies"])
def test_what_happens_during_a_move_leaves_nothing_behind(phase: str, event: str) -> None:
    async def main() -> None:
        prefill, decode = stays()
        goes_on = asyncio.Event()
        async with bench(prefill, decode, control_timeout_s=2.0) as b:
            leaving = Leaving(b)
            await leaving.begin()
            (other,) = leaving.others
            if phase == "reserve":
                other.admit = lambda _: goes_on.wait()
            else:
                prefill[0].on_resend = lambda _: goes_on.wait()
            leaving.drain()
            await (other.reserves if phase == "reserve" else prefill[0].resends).reaches(1)
            if event == "client leaves":
                leaving.call.cancel()
                await asyncio.wait_for(b.router.generations.idle(), 5)
                goes_on.set()
                await b.idle()
                assert leaving.migrations == 0
            else:
                leaving.old.streams[0].end()
                goes_on.set()
                await leaving.check_whole()

    run(main)


def test_a_crowd_moves_a_few_at_a_time() -> None:
    async def main() -> None:
        prefill, decode = stays()
        travelling, most = 0, 0

        async def travels(_: Any) -> None:
            nonlocal travelling, most
            travelling += 1
            most = max(most, travelling)
            await asyncio.sleep(0.01)
            travelling -= 1

        prefill[0].on_resend = travels
        # everybody begins at the first worker
        decode[1].info.state = "draining"
        async with bench(prefill, decode) as b:
            await b.becomes(lambda: b.worker("decode-1").state == "draining")
            asked = [asyncio.create_task(b.answer()) for _ in range(30)]
            await decode[0].attached.reaches(30)
            decode[1].script = go_on()
            decode[1].info.state = "ready"
            await b.becomes(lambda: b.worker("decode-1").state == "ready")
            decode[0].info.state = "draining"
            for events in await asyncio.gather(*asked):
                check_whole(events)
            await b.idle()
            assert b.metric("failovers_total", kind="migration", reason="DRAINING") == 30
            assert 1 < most <= 8

    run(main)


class Table:
    """Is asked whether anyone leaves."""

    def __init__(self) -> None:
        self.leaves = False
        self.asked = Log()

    @property
    def anyone_leaves(self) -> bool:
        self.asked.append(self.leaves)
        return self.leaves


def test_requests_are_looked_at_only_while_a_worker_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.requests.migration.LOOK_S", 0.001)

    async def main() -> None:
        table, looks = Table(), Log()

        def running() -> list[Any]:
            looks.append("all")
            return []

        migrating = asyncio.create_task(Migration(table, running, Background()).run())  # type: ignore[arg-type]
        await table.asked.reaches(5)
        assert looks == []
        table.leaves = True
        await looks.reaches(2)
        migrating.cancel()
        await asyncio.gather(migrating, return_exceptions=True)

    run(main)
