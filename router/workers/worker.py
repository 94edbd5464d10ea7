"""One worker as the router knows it: who it is, whether it can be used, how loaded and how fast it is."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vlcache.worker.v1 import worker_pb2

from router.workers.circuit import Circuits, blames_worker
from router.workers.client import WorkerClient
from router.workers.slow_start import SlowStart
from router.workers.speed import Speed
from router.workers.token_stream import TokenStream
from shared.errors import FailedPreconditionError, ServiceError, UnavailableError
from shared.kv.layout import KVLayout

log = logging.getLogger(__name__)

PREFILL, DECODE = "prefill", "decode"
READY, DRAINING, UNREACHABLE = "ready", "draining", "unreachable"
STATES = (READY, DRAINING, UNREACHABLE)

# Calls that fail independently of each other: a decode worker may promise memory well and never say a token.
PROMPT, RESERVE, TOKENS = "prompt", "reserve", "tokens"
CALLS = {PREFILL: (PROMPT,), DECODE: (RESERVE, TOKENS)}

_dispatches = itertools.count(1)


@dataclass(eq=False)
class Charge:
    """One request on one worker: its load, prompt tokens (prefill) or KV bytes (decode), and how its calls went."""

    worker: Worker
    amount: int
    ahead: int
    """Load that was there before it."""
    since_s: float
    """Dispatch, in the worker's clock."""

    def resize(self, amount: int) -> None:
        """Replaces the estimate by what is known now."""
        if self in self.worker.charges:
            self.worker.own_load += amount - self.amount
        self.amount = amount

    def succeeded(self, call: str) -> None:
        """The worker has done what `call` asked of it; for a prompt, that it is done and handed over."""
        self.worker.served(call, self)

    def failed(self, call: str, error: ServiceError) -> None:
        """The one way by which a failed call reaches placement; errors that say nothing of the worker are welcome."""
        self.worker.refused(call, self, error)

    def end(self) -> None:
        """Takes the load off. Idempotent."""
        if self in self.worker.charges:
            self.worker.charges.remove(self)
            self.worker.own_load -= self.amount
            self.worker.circuits.over(self)


@dataclass(eq=False)
class Worker:
    """One life of a worker process. A restart under the same address is another `Worker`.

    Two things leave it out of placement: its state, which is what its last poll said, and its circuits, which know
    how calls went. A call that nobody answered makes it unreachable until it has answered a poll, which comes at once.
    Circuits move requests to other workers; where there is no other one, they stop none: requests that break things
    must not close a service to everybody else's.
    """

    client: WorkerClient
    info: worker_pb2.WorkerInfo
    """Its last answer."""
    clock: Callable[[], float] = time.monotonic
    slow_start: SlowStart = field(default_factory=lambda: SlowStart(0.0))
    typical: Speed | None = None
    """Of the workers of its role, for as long as its own speed is unknown."""
    on_lost: Callable[[], None] = lambda: None
    """Called when a call has failed as if nobody were there: a poll should follow at once."""
    has_stand_in: Callable[[Worker], bool] = lambda worker: True
    """Whether another worker could do what this one does."""
    state: str = UNREACHABLE
    charges: set[Charge] = field(default_factory=set)
    """This router's running requests, one by one."""
    own_load: int = 0
    """Sum of the charges: what this router has sent here and not yet seen end."""
    last_dispatch: int = 0
    """Ordinal of the last request sent here; breaks ties in turn."""
    heard_s: float = 0.0
    """When it last answered a poll, in its clock."""
    tokens: TokenStream = field(init=False)
    _ready_since_s: float = 0.0
    _is_new: bool = True
    """Whether its share may be less than all."""

    def __post_init__(self) -> None:
        self.tokens = TokenStream(self.client.open_token_stream)
        self.layout = KVLayout.from_proto(self.info.model.layout)
        self.token_bytes = self.layout.token_bytes
        self.speed = Speed(self.typical)
        self.neighbourhood = _neighbourhood(self.client.address, self.info)
        """Workers with equal values are thought to hand parcels over in memory (`Pair.learn`)."""
        self.observe(self.info)
        self.circuits = Circuits(CALLS[self.info.role], self.clock)

    @property
    def key(self) -> tuple[str, str, int]:
        """Model, compatibility hash and context: workers with equal keys can exchange KV of every prompt."""
        model = self.info.model
        return model.name, model.compatibility, model.context_tokens

    @property
    def ready(self) -> bool:
        """Whether it takes a request now."""
        return self.state == READY and (self.circuits.admits or not self.has_stand_in(self))

    @property
    def leaves(self) -> bool:
        """Whether it has said, to a poll or in its token stream, that its sequences should go on elsewhere."""
        return self.state == DRAINING or self.tokens.draining

    @property
    def share(self) -> float:
        """Of what it would get otherwise, in (0, 1]: less while it is new."""
        if self._is_new:
            share = self.slow_start.share(self._ready_since_s)
            self._is_new = share < 1
            return share
        return 1.0

    @property
    def load(self) -> int:
        """Prompt tokens (prefill) or KV bytes (decode) that stand before a new request.

        The worker's own report knows the requests of other routers but is up to a poll interval old; what we sent
        or saw end since then is added. Never less than what we know ourselves.
        """
        own = self.own_load
        known = own + self._reported_by_others
        return known if known > own else own

    def charge(self, amount: int) -> Charge:
        """Counts a request from now on, before the worker has heard of it."""
        charge = Charge(self, amount, ahead=self.load, since_s=self.clock())
        self.charges.add(charge)
        self.own_load += amount
        self.last_dispatch = next(_dispatches)
        self.circuits.sent(charge)
        return charge

    def served(self, call: str, charge: Charge) -> None:
        """`charge` got what it was sent for."""
        now_s = self.clock()
        if self.circuits.succeeded(call, charge):
            log.info("%s works again: %s", self.info.name, call)
            self._comes()
        if call == PROMPT:
            self.speed.observe(charge.ahead + charge.amount, now_s - charge.since_s)

    def refused(self, call: str, charge: Charge, error: ServiceError) -> None:
        """`charge` got an error instead; one that happened elsewhere is none of this worker's."""
        if error.worker not in ("", self.info.name):
            return
        if blames_worker(error):
            self.circuits.failed(call, charge)
        if isinstance(error, (UnavailableError, FailedPreconditionError)):
            # gone, or restarted since the last poll; a stream may also have broken by itself
            if call != TOKENS:
                self.state = UNREACHABLE
            self.on_lost()

    def observe(self, info: worker_pb2.WorkerInfo) -> None:
        """Takes in a fresh answer of the same process.

        Raises:
            FailedPreconditionError: The role or the state is none that a router knows.
        """
        if info.role not in (PREFILL, DECODE) or info.state not in (READY, DRAINING):
            raise FailedPreconditionError(f"a worker says role {info.role!r}, state {info.state!r}")
        if self.state != READY:
            self._comes()
        self.info = info
        self.heard_s = self.clock()
        self.state = info.state
        self.capacity = info.kv.capacity
        # below zero when the report is from before our last requests
        self._reported_by_others = reported_load(info) - self.own_load

    def _comes(self) -> None:
        self._ready_since_s, self._is_new = self.clock(), True

    def check_integrity(self) -> None:
        """Asserts that the load is the sum of its parts."""
        parts = sum(charge.amount for charge in self.charges)
        assert self.own_load == parts, f"load {self.own_load} of {self.info.name} is not the sum {parts} of its charges"


def _neighbourhood(address: str, info: worker_pb2.WorkerInfo) -> str:
    """The host, for those who could share memory there: to begin with, addresses are all that is known."""
    return address.rpartition(":")[0] if info.role == DECODE or info.arena_socket else address


def reported_load(info: worker_pb2.WorkerInfo) -> int:
    """The load in a worker's own words, in the unit of its role."""
    if info.role == PREFILL:
        return info.outstanding_tokens
    return info.kv.reserved + info.kv.filling + info.kv.active
