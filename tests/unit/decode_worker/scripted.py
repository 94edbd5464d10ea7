"""A decode worker whose engine says what it is told and whose threads can be held."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from typing import Any

from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.sequence import Sequence
from decode_worker.worker import LoadedModel
from shared.model.sampler import Drawn
from shared.request.sampling import Sampling
from tests.unit.decode_worker.serving import Served, frames
from tests.unit.decode_worker.shipment import MAX_NEW_TOKENS, Shipment

WAIT_S = 15


class Gate:
    """Open at first; a thread that comes while it is shut waits."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._reached = threading.Event()
        self._open.set()

    def shut(self) -> None:
        self._open.clear()
        self._reached.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self) -> None:
        self._reached.set()
        assert self._open.wait(WAIT_S)

    async def reached(self) -> None:
        """Waits for a thread to stand at the gate."""
        assert await asyncio.get_running_loop().run_in_executor(None, self._reached.wait, WAIT_S)


class ScriptedEngine:
    """Answers by the sequence's seed: `answers[seed]`, then 10, 11, 12, ..."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.answers: dict[int, list[int]] = {}
        self.batches: list[list[int]] = []
        self.replays: list[int] = []
        self.error: Exception | None = None

    def step(self, batch: list[Sequence]) -> list[Drawn]:
        self.gate.pass_through()
        self.batches.append([each.sampling.seed for each in batch])
        if self.error is not None:
            raise self.error
        for each in batch:
            each.kv.appended += 1
        return [Drawn(self._next(each)) for each in batch]

    def replay(self, each: Sequence, number: int) -> None:
        self.gate.pass_through()
        self.replays.append(number)
        each.kv.appended += number

    def _next(self, each: Sequence) -> int:
        script = self.answers.get(each.sampling.seed, [])
        done = each.generated - 1
        return script[done] if done < len(script) else 10 + done


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScriptedModel(LoadedModel):
    """A checkpoint whose engine is replaced."""

    engine: ScriptedEngine


def scripted(loaded: LoadedModel) -> tuple[ScriptedModel, ScriptedEngine]:
    """The loaded model with another engine."""
    engine = ScriptedEngine()
    return ScriptedModel(
        **{field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)}, engine=engine
    ), engine


def held_installs(monkeypatch: Any) -> Gate:
    """A gate before every copy of a parcel into the pool."""
    gate, install = Gate(), SlabPool.install

    def waiting(*args: Any) -> Any:
        gate.pass_through()
        return install(*args)

    monkeypatch.setattr(SlabPool, "install", waiting)
    return gate


async def deliver(served: Served, shipment: Shipment, name: str = "r", *, seed: int = 0, **sampling: Any) -> bytes:
    """Reserves and installs a parcel; returns the reservation's secret."""
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "ignore_eos": True, "seed": seed, **sampling}
    promise = await served.reserve(request_id=name, max_new_tokens=settings["max_new_tokens"])
    manifest = shipment.manifest(name, sampling=Sampling(**settings))
    await served.put(frames(promise.token, manifest, shipment.body))
    return promise.token
