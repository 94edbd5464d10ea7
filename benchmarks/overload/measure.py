"""The loads, one after another: as much as the stack takes, exactly that, and more."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
import vlcache
from tqdm import tqdm

from benchmarks.overload.config import OverloadConfig
from benchmarks.overload.watch import Moment, growth_mib, watched
from benchmarks.serve.figures import Outcome, figures, parse_objectives
from benchmarks.serve.load import OpenLoop
from benchmarks.serve.prompts import Prompt, draw_prompts

# Longer than the router lets a request wait and a worker compute: what takes longer is a failure.
DEADLINE_S = 120.0
EXHAUSTED = "RESOURCE_EXHAUSTED"


class Asker:
    """Sends prompts without trying again, and remembers how they were refused."""

    def __init__(self, client: vlcache.AsyncClient, config: OverloadConfig) -> None:
        self._client = client
        self._sampling = vlcache.Sampling(max_new_tokens=config.max_new_tokens, ignore_eos=True)
        self._compression = vlcache.Compression(retention=config.retention)
        self.refusals: Counter[str] = Counter()
        """By code and reason."""
        self.retry_after_s: list[float] = []
        """What those who were refused were told."""

    async def send(self, prompt: Prompt) -> Outcome:
        """Waits for the whole answer."""
        try:
            completion = await self._client.generate(
                prompt.question, images=prompt.images, sampling=self._sampling, compression=self._compression
            )
        except vlcache.VlcacheError as error:
            self.refusals[f"{error.code.name} {error.reason}".strip()] += 1
            if error.retry_after_s is not None:
                self.retry_after_s.append(error.retry_after_s)
            return Outcome(code=error.code.name)
        return Outcome.of(completion)


class Run:
    """Everything that is measured on one stack."""

    def __init__(self, config: OverloadConfig, address: str, metrics_address: str, pids: Mapping[str, int]) -> None:
        self._config = config
        self._address = address
        self._metrics_address = metrics_address
        self._pids = pids
        drawn = draw_prompts(seed=config.seed, count=config.prompts, tasks=config.tasks, text_only=False)
        self._prompts: Iterator[Prompt] = itertools.cycle(drawn)
        self._rng = np.random.default_rng(config.seed)

    async def measure(self) -> dict[str, Any]:
        """All figures.

        Raises:
            VlcacheError: Nobody answers.
        """
        config = self._config
        capacity = await self._closed_loop()
        rate = capacity["request_throughput"]
        exact = await self._open_loop("at capacity", rate, config.earlier_s)
        over = await self._open_loop("overload", config.rate * rate, config.overload_s)
        return {
            "capacity_requests_per_s": rate,
            "goodput_ratio": _ratio(over["request_goodput"], exact["request_goodput"]),
            "only_exhausted": all(key.startswith(EXHAUSTED) for row in (exact, over) for key in row["refused"]),
            "results": [capacity, exact, over],
        }

    async def _closed_loop(self) -> dict[str, Any]:
        """Clients that wait for their answers, until the time is over; then what they have begun ends."""
        clock = asyncio.get_running_loop().time
        until_s = clock() + self._config.earlier_s
        outcomes: list[Outcome] = []
        async with self._client() as client, self._watched(self._config.earlier_s) as moments:
            asker = Asker(client, self._config)
            with tqdm(unit="answer", file=sys.stderr, desc="capacity") as bar:

                async def ask() -> None:
                    while clock() < until_s:
                        outcomes.append(await asker.send(next(self._prompts)))
                        bar.update()

                began_s = clock()
                await asyncio.gather(*(ask() for _ in range(self._config.clients)))
                duration_s = clock() - began_s
        return self._row("capacity", outcomes, duration_s, asker, moments)

    async def _open_loop(self, label: str, rate: float, seconds: float) -> dict[str, Any]:
        prompts = list(itertools.islice(self._prompts, max(1, round(rate * seconds))))
        clock = asyncio.get_running_loop().time
        async with self._client() as client, self._watched(seconds) as moments:
            asker = Asker(client, self._config)
            with tqdm(total=len(prompts), unit="request", file=sys.stderr, desc=label) as bar:

                async def send(prompt: Prompt) -> Outcome:
                    outcome = await asker.send(prompt)
                    bar.update()
                    return outcome

                began_s = clock()
                outcomes = await OpenLoop(rate, 1.0).run(send, prompts, self._rng)
                duration_s = clock() - began_s
        row = self._row(label, outcomes, duration_s, asker, moments)
        return {"offered_requests_per_s": rate, **row}

    def _row(
        self, label: str, outcomes: Sequence[Outcome], duration_s: float, asker: Asker, moments: Sequence[Moment]
    ) -> dict[str, Any]:
        limits_s = parse_objectives(self._config.goodput)
        return {
            "load": label,
            **figures(outcomes, duration_s=duration_s, limits_s=limits_s),
            "refused": dict(asker.refusals),
            "retry_after_s": _spread(asker.retry_after_s),
            "most_waiting": max((moment.waiting for moment in moments), default=0),
            "rss_growth_mib": growth_mib(moments),
            "curve": [dataclasses.asdict(moment) for moment in moments],
        }

    def _client(self) -> vlcache.AsyncClient:
        return vlcache.AsyncClient(
            self._address, timeout=vlcache.Timeout(total_s=DEADLINE_S), retry=vlcache.RetryPolicy(max_attempts=1)
        )

    def _watched(self, duration_s: float) -> AbstractAsyncContextManager[list[Moment]]:
        return watched(self._pids, self._metrics_address, duration_s=duration_s)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Least, median and largest; None without any."""
    if not values:
        return None
    least, median, most = np.quantile(values, (0.0, 0.5, 1.0)).tolist()
    return {"least": least, "median": median, "most": most}
