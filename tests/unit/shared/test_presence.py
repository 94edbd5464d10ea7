"""The beats of a listed process. How Redis itself behaves is shown by the integration tests."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence

import pytest
from vlcache.worker.v1 import worker_pb2

from shared.errors import UnavailableError
from shared.registry import presence
from shared.registry.entry import Entry
from shared.registry.presence import Presence, listed
from tests.unit.shared.scripted import run


class Paper:
    """A listing that can be torn away."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, str]] = []
        self.gone = False
        self._grown = asyncio.Event()

    async def publish(self, entries: Sequence[Entry]) -> None:
        self._write(entries[0].info.state)

    async def withdraw(self, entries: Sequence[Entry]) -> None:
        self._write("withdrawn")

    async def close(self) -> None:
        raise AssertionError("who opened it closes it")

    async def reaches(self, calls: int) -> None:
        while len(self.calls) < calls:
            self._grown.clear()
            await self._grown.wait()

    @property
    def words(self) -> list[str]:
        return [word for _, word in self.calls]

    @property
    def gaps_s(self) -> list[float]:
        times = [time for time, _ in self.calls]
        return [after - before for before, after in itertools.pairwise(times)]

    def _write(self, word: str) -> None:
        self.calls.append((asyncio.get_running_loop().time(), "failed" if self.gone else word))
        self._grown.set()
        if self.gone:
            raise UnavailableError("torn")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thirtieth of the real times."""
    for name in ("BEAT_S", "FIRST_RETRY_S", "MAX_RETRY_S"):
        monkeypatch.setattr(presence, name, getattr(presence, name) / 30)


def entry(state: str = "ready") -> Entry:
    return Entry(address="a:1", info=worker_pb2.WorkerInfo(role="decode", epoch="1", state=state))


def test_it_beats_with_jitter_and_withdraws_at_the_end() -> None:
    async def main() -> None:
        paper = Paper()
        beating = Presence(paper, lambda: [entry()])
        running = asyncio.create_task(beating.run())
        await paper.reaches(7)
        beating.leave()
        await running
        assert paper.words == ["ready"] * 7 + ["withdrawn"]
        beats_s = paper.gaps_s[:-1]
        assert min(beats_s) >= 0.8 * presence.BEAT_S
        assert len({round(beat_s, 6) for beat_s in beats_s}) == len(beats_s)
        assert paper.gaps_s[-1] < 0.8 * presence.BEAT_S, "leaving waited for a beat"

    run(main)


def test_a_change_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "BEAT_S", 1000.0)

    async def main() -> None:
        paper, state = Paper(), ["ready"]
        beating = Presence(paper, lambda: [entry(state[0])])
        running = asyncio.create_task(beating.run())
        await paper.reaches(1)
        state[0] = "draining"
        beating.renew()
        await paper.reaches(2)
        beating.leave()
        await running
        assert paper.words == ["ready", "draining", "withdrawn"]

    run(main)


def test_an_outage_is_logged_once_and_tried_ever_less_often(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        paper = Paper()
        beating = Presence(paper, lambda: [entry()])
        paper.gone = True
        running = asyncio.create_task(beating.run())
        await paper.reaches(6)
        paper.gone = False
        await paper.reaches(8)
        paper.gone = True
        beating.leave()
        await running
        assert paper.words == ["failed"] * 6 + ["ready"] * 2 + ["failed"]
        retries_s = paper.gaps_s[:5]
        # 1, 2, 4, 8, 8 times the first, each up to a fifth more or less
        for retry_s, factor in zip(retries_s, (1, 2, 4, 8, 8), strict=True):
            assert retry_s >= 0.8 * factor * presence.FIRST_RETRY_S

    with caplog.at_level(logging.INFO, logger=presence.__name__):
        run(main)
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in said] == ["WARNING", "INFO"]
    assert "torn" in said[0][1]
    assert "again after 6 failed calls" in said[1][1]


def test_without_a_registry_nothing_happens() -> None:
    async def main() -> None:
        async with listed("", lambda: [entry()]) as renew:
            renew()
            assert len(asyncio.all_tasks()) == 2  # `run` and its time limit

    run(main)
