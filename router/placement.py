"""Which prefill and which decode worker serve a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from router.worker import READY, Worker


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode worker that can exchange KV."""

    prefill: Worker
    decode: Worker

    @property
    def ready(self) -> bool:
        """Whether both accept requests."""
        return self.prefill.state == self.decode.state == READY


class Placement(Protocol):
    """A policy. Called by admission for every attempt, in the event loop, so it must be quick and must not wait.

    Afterwards admission asks the decode workers for memory in the order returned: the first pair is the choice, the
    others are what is left when a decode worker refuses.
    """

    def order(self, pairs: Sequence[Pair]) -> list[Pair]:
        """All of `pairs`, best first."""
        ...


class LeastLoaded:
    """Fewest outstanding prompt tokens, then fewest KV bytes; equals take turns.

    Load is counted at dispatch (`Worker.charge`), so a burst that arrives between two polls spreads out.
    """

    def order(self, pairs: Sequence[Pair]) -> list[Pair]:
        """All of `pairs`, best first."""
        return sorted(pairs, key=_load)


def _load(pair: Pair) -> tuple[int, int, int, int]:
    prefill, decode = pair.prefill, pair.decode
    return prefill.load, decode.load, prefill.last_dispatch, decode.last_dispatch
