"""Kills workers at random and starts them again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal

import vlcache

from deploy.local.stack import Stack

LOOK_S = 0.2


class Killer:
    """Use as a context manager: while it is open a worker dies every `interval_s`; after it all are back."""

    def __init__(self, stack: Stack, client: vlcache.AsyncClient, *, interval_s: float, seed: int) -> None:
        self._stack = stack
        self._client = client
        self._interval_s = interval_s
        self._chance = random.Random(seed)
        self._roles = {service.name: service.role for service in stack.services if service.role != "router"}
        self._down: set[str] = set()
        self._births: list[asyncio.Task[None]] = []
        self.deaths_s: list[float] = []
        """When workers died, by the loop's clock."""

    async def __aenter__(self) -> Killer:
        self._killing = asyncio.create_task(self._kill())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._killing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._killing
        await asyncio.gather(*self._births)

    async def _kill(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            victims = [name for name in self._roles if self._can_be_spared(name)]
            if victims:
                name = self._chance.choice(victims)
                self._down.add(name)
                os.kill(self._stack.child(name).pid, signal.SIGKILL)
                self.deaths_s.append(asyncio.get_running_loop().time())
                self._births.append(asyncio.create_task(self._bring_back(name)))

    def _can_be_spared(self, name: str) -> bool:
        others = {other for other, role in self._roles.items() if role == self._roles[name]} - {name}
        return name not in self._down and bool(others - self._down)

    async def _bring_back(self, name: str) -> None:
        """Until the router counts on it."""
        await self._stack.restart(name)
        while True:
            workers = (await self._client.info()).workers
            if any(worker.name == name and worker.state == "ready" for worker in workers):
                self._down.discard(name)
                return
            await asyncio.sleep(LOOK_S)
