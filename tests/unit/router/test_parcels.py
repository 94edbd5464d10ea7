"""Leases of retained parcels: renewed together, given up together, and never forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from router.background import Background
from router.requests.parcels import Parcels
from shared import errors
from shared.kv.secret import SECRET_BYTES
from tests.unit.router.fakes import (
    FakePrefill,
    Log,
    bench,
    compression,
    first_token,
    forever,
    hang,
    prompt_done,
    retained,
    run,
    transfer,
)
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
            await b.prefill[0].stop()
            parcel = parcels.name(worker)
            parcel.keep(0.3)
            await asyncio.sleep(0.15)
            assert not parcel.gone
            parcels.check_integrity()
            parcel.release()
            parcel.release()
            await background.settle(5)
            parcels.check_integrity(idle=True)
            await b.prefill[0].start(int(b.prefill[0].address.rpartition(":")[2]))

    run(main)


@pytest.mark.parametrize("hears_cancels", [True, False])
@pytest.mark.parametrize("said", range(len(prompt_done()) + 1))
def test_a_client_that_leaves_after_any_event_leaves_no_parcel(said: int, hears_cancels: bool) -> None:
    """The worker may have made it by then, or be making it, and may not hear of the cancellation before it has."""

    async def main() -> None:
        prefill, all_said = FakePrefill(), asyncio.Event()

        async def then_hangs() -> None:
            all_said.set()
            await forever()

        prefill.hears_cancels = hears_cancels
        prefill.script = lambda _: [*prompt_done()[:said], then_hangs()]
        async with bench([prefill]) as b:
            b.decode[0].script = hang
            call = b.ask()
            await all_said.wait()
            call.cancel()
            await asyncio.wait_for(b.idle(), 1.0)
            assert prefill.parcels == set()
            assert prefill.cancelled
            assert prefill.parcel_releases == [[prefill.requests[0].parcel]]

    run(main)


@pytest.mark.parametrize("ends", ["as it should", "with an error"])
def test_a_client_that_leaves_when_the_prefill_call_is_over_leaves_no_parcel(ends: str) -> None:
    async def main() -> None:
        refused = errors.AbortedError("released", stage="transfer", worker="decode-0")
        last = transfer() if ends == "as it should" else refused
        async with bench() as b:
            b.prefill[0].script = lambda _: [first_token(), compression(), retained(), last]
            b.decode[0].script = hang
            call = b.ask()
            await b.decode[0].attached.reaches(1)
            call.cancel()
            await asyncio.wait_for(b.idle(), 1.0)
            assert b.prefill[0].parcels == set()

    run(main)


def test_every_run_of_a_prompt_has_a_secret_of_its_own() -> None:
    async def main() -> None:
        async with bench() as b:
            for _ in range(3):
                await b.answer()
            secrets = {request.parcel for request in b.prefill[0].requests}
            assert {len(secret) for secret in secrets} == {SECRET_BYTES}
            assert len(secrets) == 3

    run(main)


def test_where_nothing_was_retained_nothing_is_renewed_and_nothing_released() -> None:
    async def main() -> None:
        prefill = FakePrefill()
        prefill.parcel_lease_s = 0.1
        prefill.script = lambda _: [first_token(), compression(), transfer()]
        async with bench([prefill]) as b:
            assert (await b.answer())[-1].HasField("finished")
            b.decode[0].script = hang
            call = b.ask()
            await b.decode[0].attached.reaches(2)
            await asyncio.sleep(0.1)
            call.cancel()
            await b.idle()
            assert (prefill.renewals, prefill.parcel_releases) == ([], [])

    run(main)


def test_a_parcel_is_not_renewed_before_it_is_there() -> None:
    async def main() -> None:
        prefill, made = FakePrefill(), asyncio.Event()
        prefill.parcel_lease_s = 0.3
        async with bench([prefill]) as b:
            b.decode[0].script = hang
            calls = [b.ask()]
            await b.decode[0].attached.reaches(1)
            prefill.script = lambda _: [first_token(), compression(), made.wait(), retained(), transfer()]
            calls.append(b.ask())
            await b.decode[0].attached.reaches(2)
            there, later = (request.parcel for request in prefill.requests)
            renewed = len(prefill.renewals)
            assert await prefill.renewals.reaches(renewed + 2) == [there]
            made.set()
            while later not in await prefill.renewals.reaches(len(prefill.renewals) + 1):
                pass
            for call in calls:
                call.cancel()
            await b.idle()

    run(main)


class Holder:
    """A worker that holds all parcels, and its client."""

    def __init__(self) -> None:
        self.client = self
        self.renewals, self.releases = Log(), Log()

    async def renew_parcels(self, parcels: Sequence[bytes]) -> Sequence[bytes]:
        self.renewals.append(parcels)
        return ()

    async def release_parcels(self, parcels: Sequence[bytes]) -> None:
        # others are given up while the call is under way
        await asyncio.sleep(0.001)
        self.releases.append(parcels)


def test_however_many_are_released_the_others_are_renewed() -> None:
    async def main() -> None:
        background, holder = Background(), Holder()
        parcels = Parcels(background)
        kept = parcels.name(holder)  # type: ignore[arg-type]
        kept.keep(0.3)
        while len(holder.renewals) < 3:
            parcels.name(holder).release()  # type: ignore[arg-type]
            await asyncio.sleep(0)
        assert set(map(tuple, holder.renewals)) == {(kept.secret,)}
        assert holder.releases
        kept.release()
        await background.settle(5)
        parcels.check_integrity(idle=True)

    run(main)


def test_a_client_that_leaves_a_worker_that_has_died_holds_nobody_up() -> None:
    async def main() -> None:
        async with bench(poll_interval_s=60.0) as b:
            b.prefill[0].script = lambda _: [first_token(), forever()]
            call = b.ask()
            await b.prefill[0].requests.reaches(1)
            await b.prefill[0].stop()
            call.cancel()
            await b.idle()
            await b.prefill[0].start(int(b.prefill[0].address.rpartition(":")[2]))

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
