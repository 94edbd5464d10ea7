"""When to come back: whoever is refused for want of a place is told when one becomes free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

SHORTEST_S, LONGEST_S = 0.5, 30.0
# Departures that the estimate looks back on.
RECENT = 32


class Vacancies:
    """How fast places become free, and to whom the next ones are promised.

    Each refusal is given a time of its own, one per expected departure, so that those who were refused together do
    not come back together.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds and never goes back."""
        self._clock = clock
        self._times_s: deque[float] = deque([clock()], maxlen=RECENT + 1)
        self._promised_s = clock()

    def opened(self) -> None:
        """Somebody comes and nobody was there: how fast places became free before says nothing."""
        self._times_s.clear()
        self._times_s.append(self._clock())

    def vacated(self) -> None:
        """Somebody has left."""
        self._times_s.append(self._clock())

    def come_back_in_s(self) -> float:
        """Seconds until the next place that is promised to nobody becomes free, if they do as they recently did."""
        now_s = self._clock()
        gap_s = (now_s - self._times_s[0]) / max(1, len(self._times_s) - 1)
        self._promised_s = min(max(self._promised_s, now_s) + gap_s, now_s + LONGEST_S)
        return max(SHORTEST_S, self._promised_s - now_s)
