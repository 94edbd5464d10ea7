"""What placement chooses from, what it may know of a request, and what a policy is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from router.workers.worker import Worker

# Transports by which a parcel is handed over in memory.
IN_MEMORY = ("memory", "local")


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode worker that can exchange KV."""

    prefill: Worker
    decode: Worker

    @property
    def ready(self) -> bool:
        """Whether both take a request now."""
        return self.prefill.ready and self.decode.ready

    @property
    def in_memory(self) -> bool:
        """Whether parcels are thought to be handed over in memory: same host, as far as addresses and answers tell."""
        return self.prefill.neighbourhood == self.decode.neighbourhood

    def learn(self, transport: str) -> None:
        """What a reservation was answered: the decode worker has tried to map the prefill worker's arena."""
        if transport in IN_MEMORY:
            self.prefill.neighbourhood = self.decode.neighbourhood
        elif self.in_memory:
            # the same address, but no common socket directory: it lives on its own
            self.decode.neighbourhood = self.decode.client.address


@dataclass(frozen=True)
class Group:
    """Workers that said at their last poll that they are ready, and of which every pair can exchange KV.

    Not all of them need be `Worker.ready`: circuits open and close between polls.
    """

    prefill: Sequence[Worker]
    decode: Sequence[Worker]

    def without(self, avoid: Collection[Worker]) -> Group:
        """The others."""
        prefill = [worker for worker in self.prefill if worker not in avoid]
        return Group(prefill, [worker for worker in self.decode if worker not in avoid])

    @property
    def ready(self) -> bool:
        """Whether some pair of it is."""
        return any(worker.ready for worker in self.prefill) and any(worker.ready for worker in self.decode)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """A request, as far as placement goes."""

    prompt_tokens: int
    """Upper bound of its prompt, visual tokens included."""
    kv_tokens: int
    """Upper bound of the tokens whose KV decode will hold, those to come included."""
    image_key: Callable[[], int | None] = lambda: None
    """Hash of its first image's content, computed when asked for; None without images."""


class Placement(Protocol):
    """A policy. Called by admission for every attempt, in the event loop, so it must be quick and must not wait.

    Admission then asks the decode workers for memory in the order of the pairs. The first pair is the choice and what
    a policy is judged by; the others are needed when a decode worker refuses, so they are made one by one.
    """

    def order(self, groups: Sequence[Group], demand: Demand) -> Iterator[Pair]:
        """Every ready pair of `groups` once, best first."""
        ...
