"""Leases of retained parcels: renewed together, given up together, and never forgotten."""

from __future__ import annotations

import asyncio
from typing import Any

from router.background import Background
from router.requests.parcels import Parcels
from shared import errors
from tests.unit.router.fakes import FakePrefill, bench, compression, first_token, forever, hang, retained, run, transfer
from tests.unit.router.test_failures import error_of


def test_parcels_of_all_running_requests_are_renewed_in_one_call() -> None:
    async def main() -> None:
        prefill = FakePrefill()
        prefill.parcel_lease_s = 0.6
        async with bench([prefill]) as b:
            b.decode[0].script = hang
            calls = [b.ask() for _ in range(5)]
            await b.decode[0].attached.reaches(5)
            while len(await prefill.renewals.reaches(len(prefill.renewals) + 1)) < 5:
                pass
            assert set(prefill.renewals[-1]) == prefill.parcels
            before = len(prefill.renewals)
            await prefill.renewals.reaches(before + 2)
            for call in calls:
                call.cancel()
            await b.idle()
            assert prefill.parcels == set()
            after = len(prefill.renewals)
            await asyncio.sleep(0.3)
            assert len(prefill.renewals) == after

    run(main)


def test_requests_that_end_together_are_released_together_and_at_once() -> None:
    async def main() -> None:
        async with bench() as b:
            together = asyncio.Event()

            async def script(stream: Any, handle: int, token: bytes) -> None:
                await together.wait()
                await usual(stream, handle, token)

            usual, b.decode[0].script = b.decode[0].script, script
            asked = [asyncio.create_task(b.answer()) for _ in range(20)]
            await b.decode[0].attached.reaches(20)
            together.set()
            await asyncio.gather(*asked)
            await b.idle()
            released = [secret for batch in b.prefill[0].parcel_releases for secret in batch]
            assert len(released) == len(set(released)) == 20
            assert len(b.prefill[0].parcel_releases) < 20

    run(main)


def test_a_parcel_that_its_worker_does_not_know_is_gone_and_not_asked_for_again() -> None:
    async def main() -> None:
        prefill = FakePrefill()
        prefill.parcel_lease_s = 0.3
        async with bench([prefill]) as b:
            b.decode[0].script = hang
            call = b.ask()
            await b.decode[0].attached.reaches(1)
            await prefill.renewals.reaches(1)
            prefill.parcels.clear()
            prefill.renewals.clear()
            await prefill.renewals.reaches(1)
            renewals = len(prefill.renewals)
            await asyncio.sleep(0.2)
            assert len(prefill.renewals) <= renewals + 1
            call.cancel()
            await b.idle()
            assert prefill.parcel_releases == []

    run(main)


def test_a_worker_that_does_not_answer_keeps_its_parcels_in_our_books() -> None:
    async def main() -> None:
        async with bench(poll_interval_s=60.0) as b:
            background = Background()
            parcels = Parcels(background)
            worker = b.worker("prefill-0")
            event = b.prefill[0]._retaining(retained(), b"secret")
            event.retained.lease_s = 0.3
            await b.prefill[0].stop()
            parcel = parcels.hold(worker, event.retained)
            await asyncio.sleep(0.15)
            assert not parcel.gone
            parcels.check_integrity()
            parcel.release()
            parcel.release()
            await background.settle(5)
            parcels.check_integrity(idle=True)
            b.prefill[0].parcels.clear()
            await b.prefill[0].start(int(b.prefill[0].address.rpartition(":")[2]))

    run(main)


def test_a_client_that_leaves_while_the_parcel_is_reported_leaves_none() -> None:
    """The worker may have ended its call by then: nobody but the router can release it."""

    async def main() -> None:
        async with bench() as b:
            b.decode[0].script = hang
            for script in ([retained()], [retained(), transfer()], [retained(), forever()]):
                b.prefill[0].script = lambda _, script=script: [first_token(), compression(), *script]
                call = b.ask()
                await b.decode[0].attached.reaches(len(b.decode[0].attached) + 1)
                call.cancel()
                await b.idle()
                assert b.prefill[0].parcels == set()

    run(main)


def test_a_client_that_leaves_before_the_parcel_is_reported_leaves_none() -> None:
    """The worker ends its call without having heard of that, and keeps what it has made."""

    async def main() -> None:
        async with bench() as b:
            goes_on = asyncio.Event()
            b.decode[0].script = hang
            b.prefill[0].script = lambda _: [first_token(), compression(), goes_on.wait(), retained()]
            call = b.ask()
            await b.decode[0].attached.reaches(1)
            call.cancel()
            await asyncio.wait_for(b.router.generations.idle(), 5)
            goes_on.set()
            await b.prefill[0].parcel_releases.reaches(1)
            assert b.prefill[0].cancelled == []
            assert b.prefill[0].parcels == set()

    run(main)


def test_an_answer_that_fails_gives_its_parcel_up() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = lambda _: [
                first_token(),
                compression(),
                retained(),
                errors.InvalidRequestError("broken", stage="transfer", worker="decode-0"),
            ]
            b.decode[0].script = hang
            assert (await error_of(b)).code == "INVALID_ARGUMENT"
            await b.idle()
            assert len(b.prefill[0].parcel_releases) == 1

    run(main)
