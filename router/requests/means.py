"""What every request of a router works with."""

from __future__ import annotations

from dataclasses import dataclass

from router.admission.admission import Admission
from router.background import Background
from router.requests.parcels import Parcels


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a worker may take, and how often a request goes on without it. Every stage has a clock of its own."""

    prefill_timeout_s: float
    """From the dispatch of a prompt to its compression."""
    transfer_timeout_s: float
    """From there to the end of the parcel's transfer; that of a resent parcel, too."""
    token_timeout_s: float
    """Without a sign of life, neither to the request nor to a poll."""
    patience_s: float
    """From the end of an answer to the end of its prefill call."""
    max_failovers: int
    """Failures of workers that a request survives."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """The parts that requests share."""

    admission: Admission
    parcels: Parcels
    background: Background
    limits: Limits
