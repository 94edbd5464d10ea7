"""Two ways to put load on a service: so many clients that each wait for their answer, or so many requests a second."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from benchmarks.serve.arrivals import arrival_offsets_s
from benchmarks.serve.figures import Outcome
from benchmarks.serve.prompts import Prompt

Send = Callable[[Prompt], Awaitable[Outcome]]


class Load(Protocol):
    """Called once per phase, in the event loop; returns when every request has ended."""

    @property
    def label(self) -> str:
        """The load in words."""
        ...

    async def run(self, send: Send, prompts: Sequence[Prompt], rng: np.random.Generator) -> list[Outcome]:
        """Sends every prompt once; `rng` draws what is random about it."""
        ...


@dataclass(frozen=True)
class ClosedLoop:
    """Each of `clients` sends its next request when its last one has ended."""

    clients: int

    @property
    def label(self) -> str:
        """The load in words."""
        return "1 client" if self.clients == 1 else f"{self.clients} clients"

    async def run(self, send: Send, prompts: Sequence[Prompt], rng: np.random.Generator) -> list[Outcome]:
        """See `Load.run`; nothing is random here."""
        waiting, outcomes = iter(prompts), []

        async def client() -> None:
            for prompt in waiting:
                outcomes.append(await send(prompt))

        await asyncio.gather(*(client() for _ in range(self.clients)))
        return outcomes


@dataclass(frozen=True)
class OpenLoop:
    """Requests come at `rate` per second, whatever becomes of those before; see `arrival_offsets_s`."""

    rate: float
    burstiness: float

    @property
    def label(self) -> str:
        """The load in words."""
        return f"{self.rate:g} requests/s"

    async def run(self, send: Send, prompts: Sequence[Prompt], rng: np.random.Generator) -> list[Outcome]:
        """See `Load.run`; `rng` draws the arrivals."""
        offsets_s = arrival_offsets_s(count=len(prompts), rate=self.rate, burstiness=self.burstiness, rng=rng)

        async def later(prompt: Prompt, offset_s: float) -> Outcome:
            await asyncio.sleep(offset_s)
            return await send(prompt)

        return await asyncio.gather(*map(later, prompts, offsets_s))
