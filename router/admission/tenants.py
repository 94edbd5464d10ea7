"""Tenants: whose a request is, and whether they may ask for one more now."""

from __future__ import annotations

import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from router.admission.vacancies import Vacancies
from shared.errors import InvalidRequestError, ResourceExhaustedError

METADATA_KEY = "vlcache-tenant"
DEFAULT_TENANT = "default"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Tenants without a request in flight whose spent tokens are remembered.
MAX_IDLE = 10_000


def tenant_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The tenant that a call's metadata names; `DEFAULT_TENANT` where it names none.

    Raises:
        InvalidRequestError: The name has a wrong form, or there are several.
    """
    names = [value for key, value in metadata if key == METADATA_KEY]
    if not names:
        return DEFAULT_TENANT
    if len(names) > 1 or not isinstance(names[0], str) or not NAME.fullmatch(names[0]):
        raise InvalidRequestError(f"{METADATA_KEY} is 1 to 64 of A-Z a-z 0-9 . _ -, given once", reason="BAD_TENANT")
    return names[0]


@dataclass(frozen=True, kw_only=True)
class TenantLimits:
    """What each tenant may ask for. `concurrency` and `rate` 0 limit nothing."""

    concurrency: int = 0
    """Requests in flight, those that wait included."""
    rate: float = 0.0
    """Requests per second."""
    burst: int = 1
    """Requests that may come at once after a rest; a token bucket holds so many."""

    @property
    def refill_s(self) -> float:
        """Seconds after which an empty bucket is full."""
        return self.burst / self.rate if self.rate else 0.0


class Tenants:
    """Owner of what each tenant has in flight and of its token bucket.

    A tenant is remembered while something of it is in flight, and then until its bucket is surely full again, when
    nothing tells it from one that was never seen. Invariant (`check_integrity`): the busy ones, and only they, have
    requests in flight; at most `max_idle` others are remembered.
    """

    def __init__(
        self, limits: TenantLimits, *, max_idle: int = MAX_IDLE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._max_idle = max_idle
        self._clock = clock
        self._busy: dict[str, _Tenant] = {}
        self._idle: OrderedDict[str, _Tenant] = OrderedDict()
        """By when their last request ended."""

    def enter(self, name: str) -> Stay:
        """Counts a request of tenant `name` until its `Stay` is left.

        Raises:
            ResourceExhaustedError: It has too many in flight, or sends too many per second.
        """
        self._forget()
        tenant = self._busy.get(name) or self._idle.pop(name, None) or _Tenant(self._limits, self._clock)
        try:
            tenant.enter()
        finally:
            self._keep(name, tenant)
        return Stay(self, name)

    def leave(self, name: str) -> None:
        """A request of tenant `name` has ended. Called by its `Stay`."""
        tenant = self._busy[name]
        tenant.leave()
        self._keep(name, tenant)

    def check_integrity(self, *, idle: bool = False) -> None:
        """Asserts the invariant; `idle` says that no request is in flight."""
        assert all(tenant.in_flight > 0 for tenant in self._busy.values()), "a busy tenant without requests"
        assert all(tenant.in_flight == 0 for tenant in self._idle.values()), "requests of an idle tenant"
        assert not self._busy.keys() & self._idle.keys(), "a tenant is remembered twice"
        assert len(self._idle) <= self._max_idle, "too many idle tenants"
        assert not (idle and self._busy), "requests of nobody are counted"

    def _keep(self, name: str, tenant: _Tenant) -> None:
        if tenant.in_flight:
            self._busy[name] = tenant
            return
        self._busy.pop(name, None)
        tenant.idle_since_s = self._clock()
        self._idle[name] = tenant
        self._forget()

    def _forget(self) -> None:
        full_since_s = self._clock() - self._limits.refill_s
        while self._idle:
            oldest = next(iter(self._idle.values()))
            if len(self._idle) <= self._max_idle and oldest.idle_since_s > full_since_s:
                return
            self._idle.popitem(last=False)


class Stay:
    """One request in flight."""

    def __init__(self, tenants: Tenants, name: str) -> None:
        self._tenants = tenants
        self._name = name
        self._open = True

    def leave(self) -> None:
        """It has ended. Idempotent."""
        if self._open:
            self._open = False
            self._tenants.leave(self._name)


@dataclass(eq=False)
class _Tenant:
    limits: TenantLimits
    clock: Callable[[], float]
    in_flight: int = 0
    idle_since_s: float = 0.0
    vacancies: Vacancies = field(init=False)

    def __post_init__(self) -> None:
        self.vacancies = Vacancies(self.clock)
        self._tokens = float(self.limits.burst)
        self._filled_s = self.clock()

    def enter(self) -> None:
        limits = self.limits
        if limits.concurrency and self.in_flight >= limits.concurrency:
            raise ResourceExhaustedError(
                f"a tenant may have {limits.concurrency} requests in flight",
                reason="TENANT_CONCURRENCY",
                retry_after_s=self.vacancies.come_back_in_s(),
            )
        if limits.rate:
            self._take_token()
        if not self.in_flight:
            self.vacancies.opened()
        self.in_flight += 1

    def leave(self) -> None:
        self.in_flight -= 1
        self.vacancies.vacated()

    def _take_token(self) -> None:
        now_s, rate = self.clock(), self.limits.rate
        self._tokens = min(float(self.limits.burst), self._tokens + (now_s - self._filled_s) * rate)
        self._filled_s = now_s
        if self._tokens < 1:
            raise ResourceExhaustedError(
                f"a tenant may send {rate:g} requests per second",
                reason="TENANT_RATE",
                # rounded up: who comes back then is not early by a rounding error
                retry_after_s=math.ceil((1 - self._tokens) / rate * 1000) / 1000,
            )
        self._tokens -= 1
