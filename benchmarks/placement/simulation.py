"""Discrete events: requests come, prompts are computed, answers end, workers report."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from benchmarks.placement.config import PlacementConfig
from benchmarks.placement.peers import Clairvoyant, RandomPairs
from benchmarks.placement.servers import DecodeServer, PrefillServer
from benchmarks.placement.trace import Request, Trace
from benchmarks.placement.views import TOKEN_BYTES, View
from router.placement.base import Pair, Placement
from router.placement.catalogue import POLICIES
from router.workers.worker import PROMPT, Worker

RANDOM, CLAIRVOYANT = "random", "clairvoyant"
CONTENDERS = (RANDOM, *POLICIES, CLAIRVOYANT)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a request; seconds from its arrival."""

    queue_s: float
    """Until its prompt was begun."""
    first_token_s: float
    """Until its prompt was done."""
    placed_s: float
    """When, by the simulation's clock."""
    prefill: int
    """Number of its prefill worker."""


class Simulation:
    """One policy, one trace. Only `View` is what routers know; everything else is how it is."""

    def __init__(
        self,
        config: PlacementConfig,
        trace: Trace,
        contender: str,
        routers: int,
        *,
        newcomer_at_s: float | None = None,
        slow_start_s: float = 0.0,
    ) -> None:
        """`newcomer_at_s`: the first prefill worker comes then, not at the beginning."""
        self._config = config
        self._newcomer_at_s = newcomer_at_s
        self._slow_start_s = slow_start_s
        self._trace = trace
        self.now_s = 0.0
        self.prefill = [
            PrefillServer(speed, cached_images=config.cached_images, hit_saves=config.hit_saves)
            for speed in trace.prefill_tokens_per_s
        ]
        self._numbers = {server: number for number, server in enumerate(self.prefill)}
        self.decode = [DecodeServer(*sizes) for sizes in zip(trace.decode_speed, trace.pool_tokens, strict=True)]
        self.views = [self._view(contender, number) for number in range(routers)]
        self.outcomes: dict[int, Outcome] = {}
        self.refusals = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._waiting: deque[int] = deque()
        self._placing = trace.requests[0]
        self._polls = Random(config.seed)

    def run(self, progress: Callable[[], object] = lambda: None) -> None:
        """To the end of the last answer; `progress` is called once per request that comes."""
        for number, request in enumerate(self._trace.requests):
            self._at(request.at_s, partial(self._come, number, progress))
        for view in self.views:
            for worker in view.servers:
                self._poll_in(view, worker, self._polls.uniform(0, self._config.poll_interval_s))
            if self._newcomer_at_s is not None:
                seen_s = self._newcomer_at_s + self._polls.uniform(0, self._config.poll_interval_s)
                self._at(seen_s, partial(self._meet, view))
        while self._events:
            self.now_s, _, event = heapq.heappop(self._events)
            event()

    def check_integrity(self) -> None:
        """Asserts that every request has ended and nothing is left of any."""
        assert len(self.outcomes) == len(self._trace.requests)
        assert not self._waiting
        assert not any(server.outstanding_tokens for server in self.prefill)
        assert not any(server.used_tokens for server in self.decode)
        for view in self.views:
            view.check_integrity()

    def _view(self, contender: str, number: int) -> View:
        placement = self._placement(contender, number)
        prefill = self.prefill if self._newcomer_at_s is None else self.prefill[1:]
        view = View(placement, [*prefill, *self.decode], lambda: self.now_s, self._slow_start_s)
        if isinstance(placement, Clairvoyant):
            placement.servers.update(view.servers)
        return view

    def _placement(self, contender: str, number: int) -> Placement:
        chance = Random(self._config.seed * 1000 + number)
        if contender == RANDOM:
            return RandomPairs(chance)
        if contender == CLAIRVOYANT:
            return Clairvoyant(lambda: self._placing, lambda: self.now_s)
        return POLICIES[contender](chance)  # type: ignore[index]

    def _at(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def _poll_in(self, view: View, worker: Worker, delay_s: float) -> None:
        """Every router asks every worker in a rhythm of its own, until no request comes any more."""
        if self.now_s < self._trace.requests[-1].at_s:
            self._at(self.now_s + delay_s, partial(self._poll, view, worker))

    def _poll(self, view: View, worker: Worker) -> None:
        view.poll(worker)
        self._poll_in(view, worker, self._config.poll_interval_s)

    def _meet(self, view: View) -> None:
        self._poll_in(view, view.add(self.prefill[0]), self._config.poll_interval_s)

    def _come(self, number: int, progress: Callable[[], object]) -> None:
        progress()
        # nobody overtakes those who wait
        self._waiting.append(number)
        if len(self._waiting) == 1:
            self._place_waiting()

    def _place_waiting(self) -> None:
        while self._waiting and self._place(self._waiting[0]):
            self._waiting.popleft()

    def _place(self, number: int) -> bool:
        """Whether some decode worker had room."""
        request = self._placing = self._trace.requests[number]
        view = self.views[request.router % len(self.views)]
        full: set[Worker] = set()
        for pair in view.order(request):
            if pair.decode in full:
                continue
            if self._server(view, pair.decode).reserve(request):
                self._begin(number, request, view, pair)
                return True
            self.refusals += 1
            full.add(pair.decode)
            if len(full) == len(self.decode):
                break
        return False

    def _server(self, view: View, worker: Worker) -> DecodeServer:
        server = view.servers[worker]
        assert isinstance(server, DecodeServer)
        return server

    def _begin(self, number: int, request: Request, view: View, pair: Pair) -> None:
        prompt = pair.prefill.charge(request.prompt_tokens)
        memory = pair.decode.charge(request.kv_tokens * TOKEN_BYTES)
        server, decode = view.servers[pair.prefill], self._server(view, pair.decode)
        assert isinstance(server, PrefillServer)
        begin_s, end_s = server.admit(request, self.now_s)
        assert number not in self.outcomes
        self.outcomes[number] = Outcome(
            queue_s=begin_s - request.at_s,
            first_token_s=end_s - request.at_s,
            placed_s=self.now_s,
            prefill=self._numbers[server],
        )

        def prompt_done() -> None:
            server.done(request)
            prompt.succeeded(PROMPT)
            prompt.end()
            self._at(self.now_s + decode.answer_s(request), answer_done)

        def answer_done() -> None:
            decode.release(request)
            memory.end()
            self._place_waiting()

        self._at(end_s, prompt_done)
