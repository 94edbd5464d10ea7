"""Circuit breakers: a worker that keeps failing a call is left alone for a while, then tried with a single request."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from shared.errors import InternalError, ServiceError, UnavailableError

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half_open"
CIRCUIT_STATES = (CLOSED, HALF_OPEN, OPEN)

MAX_CONSECUTIVE = 5
MIN_CALLS, WINDOW_S = 10, 10.0
OPEN_S = 5.0


class Circuit:
    """One kind of call on one worker.

        closed ── 5 failures in a row, or half of at least 10 calls within 10 s ──▶ open
          ▲                                                                          │ 5 s
          └── the probe succeeded ── half-open (one request at a time) ◀─────────────┘
                                         └── the probe failed ──▶ open

    Requests are known by whatever object stands for them (`Charge`): while the circuit is half-open only the probe's
    outcome counts, those of requests that were sent before say nothing new.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Closed; `clock` gives seconds and never goes back."""
        self._clock = clock
        self._in_a_row = 0
        self._recent: deque[tuple[float, bool]] = deque()
        self._recent_failures = 0
        self._half_open_at_s: float | None = None
        self._probe: object | None = None

    @property
    def state(self) -> str:
        """One of `CIRCUIT_STATES`."""
        if self._half_open_at_s is None:
            return CLOSED
        return OPEN if self._clock() < self._half_open_at_s else HALF_OPEN

    @property
    def admits(self) -> bool:
        """Whether a request may be sent now."""
        state = self.state
        return state == CLOSED or (state == HALF_OPEN and self._probe is None)

    def sent(self, request: object) -> None:
        """`request` goes to the worker; in a half-open circuit it is the probe."""
        if self.state == HALF_OPEN and self._probe is None:
            self._probe = request

    def over(self, request: object) -> None:
        """`request` has ended, however; a probe that told nothing makes room for the next one. Idempotent."""
        if self._probe is request:
            self._probe = None

    def succeeded(self, request: object) -> bool:
        """The call did what it should; True when that closed the circuit."""
        if self._half_open_at_s is None:
            self._in_a_row = 0
            self._remember(failed=False)
            return False
        if self._probe is not request:
            return False
        self._half_open_at_s = self._probe = None
        return True

    def failed(self, request: object) -> None:
        """The call failed, and the worker is to blame."""
        if self._half_open_at_s is not None:
            if self._probe is request:
                self._open()
            return
        self._in_a_row += 1
        self._remember(failed=True)
        many = len(self._recent) >= MIN_CALLS and 2 * self._recent_failures >= len(self._recent)
        if many or self._in_a_row >= MAX_CONSECUTIVE:
            self._open()

    def _open(self) -> None:
        self._half_open_at_s = self._clock() + OPEN_S
        self._probe = None
        self._in_a_row = self._recent_failures = 0
        self._recent.clear()

    def _remember(self, *, failed: bool) -> None:
        now_s = self._clock()
        self._recent.append((now_s, failed))
        self._recent_failures += failed
        while self._recent[0][0] <= now_s - WINDOW_S:
            self._recent_failures -= self._recent.popleft()[1]


class Circuits:
    """Those of one worker, one per kind of call; what it is sent goes through all of them."""

    def __init__(self, calls: Iterable[str], clock: Callable[[], float]) -> None:
        """All closed."""
        self._by_call = {call: Circuit(clock) for call in calls}
        self._in_doubt = False

    def __getitem__(self, call: str) -> Circuit:
        return self._by_call[call]

    @property
    def admits(self) -> bool:
        """Whether a request may be sent now."""
        # asked of every worker for every request, and nearly always all are closed
        return not self._in_doubt or all(circuit.admits for circuit in self._by_call.values())

    @property
    def state(self) -> str:
        """The worst."""
        if not self._in_doubt:
            return CLOSED
        return max((circuit.state for circuit in self._by_call.values()), key=CIRCUIT_STATES.index)

    def sent(self, request: object) -> None:
        """`request` goes to the worker."""
        for circuit in self._by_call.values():
            circuit.sent(request)

    def over(self, request: object) -> None:
        """`request` has ended, however. Idempotent."""
        for circuit in self._by_call.values():
            circuit.over(request)

    def succeeded(self, call: str, request: object) -> bool:
        """True when that closed a circuit."""
        closed = self._by_call[call].succeeded(request)
        self._look()
        return closed

    def failed(self, call: str, request: object) -> None:
        """The worker is to blame."""
        self._by_call[call].failed(request)
        self._look()

    def _look(self) -> None:
        self._in_doubt = any(circuit.state != CLOSED for circuit in self._by_call.values())


def blames_worker(error: ServiceError) -> bool:
    """Whether `error` says that the worker does not work: unreachable, silent, or broken.

    Refusals, wrong requests and the client's own deadline say nothing, nor does one that leaves in good order.
    """
    return isinstance(error, (UnavailableError, InternalError)) and error.reason != "DRAINING"
