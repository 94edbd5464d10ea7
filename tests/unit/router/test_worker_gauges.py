"""What a router's gauges say of its workers: how long they are silent, how full they are, and nothing of those gone."""

from __future__ import annotations

import asyncio

from tests.unit.router.fakes import FakeDecode, FakePrefill, bench, run

CAPACITY = 1000


def test_the_silence_of_a_worker_grows_until_it_answers_again() -> None:
    async def main() -> None:
        async with bench() as b:
            b.router.accounting.show_workers(b.router.table.workers())
            worker = b.worker("decode-0")
            now_s = worker.heard_s
            worker.clock = lambda: now_s
            assert b.metric("worker_heartbeat_age_seconds", name="decode-0") == 0
            now_s += 7
            assert b.metric("worker_heartbeat_age_seconds", name="decode-0") == 7
            worker.observe(worker.info)
            assert b.metric("worker_heartbeat_age_seconds", name="decode-0") == 0

    run(main)


def test_a_worker_that_is_gone_has_no_age() -> None:
    async def main() -> None:
        async with bench() as b:
            accounting = b.router.accounting
            accounting.show_workers(b.router.table.workers())
            assert b.metric("worker_heartbeat_age_seconds", name="prefill-0") is not None
            accounting.show_workers([b.worker("decode-0")])
            assert b.metric("worker_heartbeat_age_seconds", name="prefill-0") is None
            assert b.metric("worker_state", name="prefill-0", state="ready") is None
            assert b.metric("worker_heartbeat_age_seconds", name="decode-0") is not None

    run(main)


def test_usage_is_that_of_all_pools_that_answer() -> None:
    async def main() -> None:
        async with bench(decode=[FakeDecode("decode-0"), FakeDecode("decode-1")]) as b:
            workers = [b.worker(name) for name in ("prefill-0", "decode-0", "decode-1")]
            for worker, active in zip(workers[1:], (100, 600), strict=True):
                worker.info.kv.capacity, worker.info.kv.active = CAPACITY, active
                worker.capacity = CAPACITY
            b.router.accounting.show_workers(workers)
            assert b.metric("kv_cache_usage_ratio") == 0.35
            workers[1].state = "unreachable"
            b.router.accounting.show_workers(workers)
            assert b.metric("kv_cache_usage_ratio") == 0.6
            workers[2].state = "unreachable"
            b.router.accounting.show_workers(workers)
            assert b.metric("kv_cache_usage_ratio") == 0

    run(main)


def test_models_without_a_pair_are_not_served() -> None:
    async def main() -> None:
        prefill = FakePrefill()
        async with bench(prefill=[prefill]) as b:
            await b.becomes(lambda: b.metric("served_models") == 1)
            await prefill.stop()
            await asyncio.wait_for(b.becomes(lambda: b.metric("served_models") == 0), 30)

    run(main)
