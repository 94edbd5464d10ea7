"""One worker as the router knows it: who it is, whether it can be used, how loaded it is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from vlcache.worker.v1 import worker_pb2

from router.token_stream import TokenStream
from router.worker_client import WorkerClient
from shared.errors import FailedPreconditionError
from shared.kv.layout import KVLayout

PREFILL, DECODE = "prefill", "decode"
READY, DRAINING, UNREACHABLE = "ready", "draining", "unreachable"
STATES = (READY, DRAINING, UNREACHABLE)

_dispatches = itertools.count(1)


@dataclass(eq=False)
class Charge:
    """The load of one request on one worker: prompt tokens (prefill) or KV bytes (decode)."""

    worker: Worker
    amount: int

    def resize(self, amount: int) -> None:
        """Replaces the estimate by what is known now."""
        if self in self.worker.charges:
            self.worker.own_load += amount - self.amount
        self.amount = amount

    def end(self) -> None:
        """Takes the load off. Idempotent."""
        if self in self.worker.charges:
            self.worker.charges.remove(self)
            self.worker.own_load -= self.amount


@dataclass(eq=False)
class Worker:
    """One life of a worker process. A restart under the same address is another `Worker`."""

    client: WorkerClient
    info: worker_pb2.WorkerInfo
    """Its last answer."""
    state: str = UNREACHABLE
    charges: set[Charge] = field(default_factory=set)
    """Load of this router's running requests, one by one."""
    own_load: int = 0
    """Its sum: what this router has sent here and not yet seen end."""
    last_dispatch: int = 0
    """Ordinal of the last request sent here; breaks ties in turn."""
    tokens: TokenStream = field(init=False)
    _own_at_poll: int = 0

    def __post_init__(self) -> None:
        self.tokens = TokenStream(self.client.open_token_stream)
        self.layout = KVLayout.from_proto(self.info.model.layout)
        self.observe(self.info)

    @property
    def key(self) -> tuple[str, str]:
        """Model and compatibility hash: workers with equal keys can exchange KV."""
        return self.info.model.name, self.info.model.compatibility

    @property
    def load(self) -> int:
        """Prompt tokens (prefill) or KV bytes (decode) that stand before a new request.

        The worker's own report knows the requests of other routers but is up to a poll interval old; what we sent
        or saw end since then is added. Never less than what we know ourselves.
        """
        since_poll = self.own_load - self._own_at_poll
        return max(self.own_load, reported_load(self.info) + since_poll)

    def charge(self, amount: int) -> Charge:
        """Counts a request from now on, before the worker has heard of it."""
        charge = Charge(self, amount)
        self.charges.add(charge)
        self.own_load += amount
        self.last_dispatch = next(_dispatches)
        return charge

    def observe(self, info: worker_pb2.WorkerInfo) -> None:
        """Takes in a fresh answer of the same process.

        Raises:
            FailedPreconditionError: The role or the state is none that a router knows.
        """
        if info.role not in (PREFILL, DECODE) or info.state not in (READY, DRAINING):
            raise FailedPreconditionError(f"a worker says role {info.role!r}, state {info.state!r}")
        self.info = info
        self.state = info.state
        self._own_at_poll = self.own_load

    def check_integrity(self) -> None:
        """Asserts that the load is the sum of its parts."""
        parts = sum(charge.amount for charge in self.charges)
        assert self.own_load == parts, f"load {self.own_load} of {self.info.name} is not the sum {parts} of its charges"


def reported_load(info: worker_pb2.WorkerInfo) -> int:
    """The load in a worker's own words, in the unit of its role."""
    if info.role == PREFILL:
        return info.outstanding_tokens
    return info.kv.reserved + info.kv.filling + info.kv.active
