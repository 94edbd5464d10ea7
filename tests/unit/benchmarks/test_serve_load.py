"""How the generator loads a service: arrivals, clients that wait, and what is watched meanwhile."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
import vlcache
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serve import monitor
from benchmarks.serve.arrivals import arrival_offsets_s
from benchmarks.serve.figures import OK, Outcome
from benchmarks.serve.load import ClosedLoop, OpenLoop
from benchmarks.serve.monitor import Snapshot, monitored, occupancy
from benchmarks.serve.prompts import Prompt, draw_prompts

PROMPTS = [Prompt(str(number), ()) for number in range(12)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class Service:
    """Answers in order of arrival, one turn of the loop later, and notes who was there together."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.at_s: list[float] = []
        self.running = 0
        self.most = 0

    async def send(self, prompt: Prompt) -> Outcome:
        self.asked.append(prompt.question)
        self.at_s.append(time.monotonic())
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        return Outcome(code=OK, input_tokens=int(prompt.question), arrivals_s=(0.0,))


def test_the_seed_decides_the_arrivals() -> None:
    first, same, other = (arrival_offsets_s(count=50, rate=3.0, burstiness=1.0, rng=rng(seed)) for seed in (5, 5, 6))
    assert first == same != other


@given(count=st.integers(1, 200), rate=st.floats(0.01, 1000), burstiness=st.floats(0.1, 20), seed=st.integers(0, 99))
def test_arrivals_come_in_order_at_the_rate_asked_for(count: int, rate: float, burstiness: float, seed: int) -> None:
    offsets = arrival_offsets_s(count=count, rate=rate, burstiness=burstiness, rng=rng(seed))
    assert len(offsets) == count
    assert offsets == sorted(offsets)
    assert offsets[0] >= 0
    assert offsets[-1] == pytest.approx(count / rate)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_vary_as_those_of_a_gamma_process(burstiness: float) -> None:
    offsets = arrival_offsets_s(count=40_000, rate=2.0, burstiness=burstiness, rng=rng())
    gaps = np.diff(offsets)
    assert gaps.mean() == pytest.approx(0.5, rel=0.01)
    # standard deviation over mean of a gamma distribution: 1 / sqrt(shape), 1 for Poisson arrivals
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_an_infinite_rate_sends_everything_at_once() -> None:
    assert arrival_offsets_s(count=3, rate=float("inf"), burstiness=1.0, rng=rng()) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("clients", [1, 3, 20])
def test_a_closed_loop_never_has_more_requests_than_clients(clients: int) -> None:
    service = Service()
    outcomes = asyncio.run(ClosedLoop(clients).run(service.send, PROMPTS, rng()))
    assert service.most == min(clients, len(PROMPTS))
    assert sorted(service.asked, key=int) == [prompt.question for prompt in PROMPTS]
    assert sorted(outcome.input_tokens for outcome in outcomes) == list(range(len(PROMPTS)))


def test_an_open_loop_waits_for_nobody() -> None:
    service = Service()
    asyncio.run(OpenLoop(float("inf"), 1.0).run(service.send, PROMPTS, rng()))
    assert service.most == len(PROMPTS)


def test_an_open_loop_sends_when_the_arrivals_say() -> None:
    service, load = Service(), OpenLoop(100.0, 1.0)
    started_s = time.monotonic()
    outcomes = asyncio.run(load.run(service.send, PROMPTS, rng(3)))
    assert [outcome.input_tokens for outcome in outcomes] == list(range(len(PROMPTS)))
    expected = arrival_offsets_s(count=len(PROMPTS), rate=100.0, burstiness=1.0, rng=rng(3))
    # never early; how late depends on the machine (the loop's clock ticks in steps of its own)
    assert all(at_s - started_s >= offset - 0.002 for at_s, offset in zip(service.at_s, expected, strict=True))
    assert service.asked == [prompt.question for prompt in PROMPTS]


def test_loads_have_names() -> None:
    assert [load.label for load in (ClosedLoop(1), ClosedLoop(8), OpenLoop(0.5, 1.0), OpenLoop(float("inf"), 2.0))] == [
        "1 client",
        "8 clients",
        "0.5 requests/s",
        "inf requests/s",
    ]


def test_prompts_are_seeded_png_files() -> None:
    first, same, other = (draw_prompts(seed=seed, count=2, tasks=("which",), text_only=False) for seed in (1, 1, 2))
    assert first == same
    assert first != other
    assert all(len(prompt.images) == 2 for prompt in first)
    assert all(image.startswith(b"\x89PNG") for prompt in first for image in prompt.images)


def test_text_only_prompts_ask_the_same_without_images() -> None:
    images = draw_prompts(seed=1, count=3, tasks=("read", "count"), text_only=False)
    text = draw_prompts(seed=1, count=3, tasks=("read", "count"), text_only=True)
    assert [prompt.question for prompt in text] == [prompt.question for prompt in images]
    assert not any(prompt.images for prompt in text)


def worker(role: str, running: int, reserved: int = 0) -> vlcache.Worker:
    kv = vlcache.KVBytes(capacity=100 if role == "decode" else 0, reserved=reserved, filling=5, active=10, retained=7)
    return vlcache.Worker(
        name=role,
        role=role,
        address="a",
        state="ready",
        model="m",
        requests_running=running,
        requests_waiting=0,
        kv=kv,
    )


def info(*workers: vlcache.Worker) -> vlcache.ServerInfo:
    totals = vlcache.Totals(requests=0, kv_full_bytes=0, kv_kept_bytes=0, kv_sent_bytes=0)
    return vlcache.ServerInfo(version="0", workers=workers, totals=totals)


def test_a_snapshot_sums_the_workers_of_each_role() -> None:
    seen = Snapshot.of(info(worker("decode", 3, reserved=20), worker("decode", 1), worker("prefill", 1)))
    assert seen == Snapshot(kv_used_bytes=35 + 15, kv_capacity_bytes=200, decoding=4, prefilling=1)


def test_occupancy_is_the_mean_over_time() -> None:
    seen = [
        Snapshot(kv_used_bytes=10, kv_capacity_bytes=100, decoding=1, prefilling=0),
        Snapshot(kv_used_bytes=90, kv_capacity_bytes=100, decoding=4, prefilling=1),
    ]
    assert occupancy(seen) == {"mean_kv_used_share": 0.5, "mean_decoding": 2.5, "mean_prefilling": 0.5}
    assert set(occupancy([]).values()) == {None}


class Informant:
    """The part of a client that a monitor uses."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.asked = asyncio.Event()
        self._failure = failure
        self._count = 0

    async def info(self) -> vlcache.ServerInfo:
        self._count += 1
        if self._count == 3:
            self.asked.set()
        if self._failure:
            self.asked.set()
            raise self._failure
        return info(worker("decode", self._count))


def test_a_monitor_watches_until_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "INTERVAL_S", 0)

    async def watch() -> list[Snapshot]:
        informant = Informant()
        async with monitored(informant) as snapshots:
            await informant.asked.wait()
        return snapshots

    assert [seen.decoding for seen in asyncio.run(watch())][:2] == [1, 2]


def test_a_monitor_that_cannot_see_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "INTERVAL_S", 0)

    async def watch() -> None:
        informant = Informant(OSError("gone"))
        async with monitored(informant):
            await informant.asked.wait()
            await asyncio.sleep(0)

    with pytest.raises(OSError, match="gone"):
        asyncio.run(watch())
