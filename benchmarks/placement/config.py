"""What is simulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """A fleet, the requests that come to it, and the routers between."""

    workers: int = 100
    """Prefill workers; there are as many decode workers."""
    requests: int = 8_000
    """Requests that come, the same ones to every policy."""
    routers: tuple[int, ...] = (1, 4, 16)
    """Routers at once; each sees the load of the others in polls only."""
    slow_starts_s: tuple[float, ...] = (0.0, 10.0)
    """Slow starts, seconds, with which an empty worker comes in the middle of the requests."""
    load: float = 0.7
    """Work that comes over what the prefill workers can do without a cache hit, in (0, 1)."""
    seed: int = 1
    """Of everything that is drawn."""
    poll_interval_s: float = 1.0
    """Seconds between two load reports of a worker."""
    images: int = 5000
    """Different images; the n-th most popular one is asked about in proportion to 1/n."""
    cached_images: int = 64
    """Images of which a prefill worker remembers what it made, the last ones used."""
    hit_saves: float = 0.4
    """Share of the work on an image's tokens that a remembered one saves. An assumption, not a measurement."""
    decode_load: float = 0.4
    """Mean share of the decode workers' memory that is taken."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Where to write the figures; `-` is the last line of stdout."""

    def __post_init__(self) -> None:
        for name in ("workers", "requests", "images", "cached_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.routers or min(self.routers) < 1:
            raise ValueError(f"routers must be counts of at least 1, not {self.routers}")
        if any(seconds < 0 for seconds in self.slow_starts_s):
            raise ValueError(f"slow_starts_s must not be negative, not {self.slow_starts_s}")
        if self.poll_interval_s <= 0:
            raise ValueError(f"poll_interval_s must be greater than 0, not {self.poll_interval_s}")
        for name in ("load", "decode_load"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in (0, 1), not {getattr(self, name)}")
        if not 0 <= self.hit_saves < 1:
            raise ValueError(f"hit_saves must lie in [0, 1), not {self.hit_saves}")
