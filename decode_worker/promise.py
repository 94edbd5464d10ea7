"""Room that a request is promised before its parcel comes, and whether the parcel keeps to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decode_worker.answers import Answer, Reservation, Wanted
from decode_worker.eviction.kinds import rule_of
from decode_worker.kv_pool.base import Growing, KVPool, growth_of
from shared.errors import FailedPreconditionError, InvalidRequestError
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What a parcel brings for the answers of a reservation.

    Attributes:
        alone: By choice, the parcel as it would be with that answer alone.
        wanted: Exact bytes of their sequences and their room.
        shared_rows: How many of the prompt's rows they read in common, layer-major; empty where none.
    """

    alone: Mapping[int, Manifest]
    wanted: Wanted
    shared_rows: tuple[int, ...]


class Promise:
    """Arithmetic over the pool; holds nothing of a request.

    Args:
        new_tokens: Those that have room at once, beside what was delivered already; None is all.
    """

    def __init__(self, *, pool: KVPool[Any, Any], identity: ModelIdentity, new_tokens: int | None) -> None:
        self._pool = pool
        self._identity = identity
        self._new_tokens = new_tokens

    def tokens(self, max_new_tokens: int, delivered_tokens: int = 0) -> int:
        """New tokens whose room comes with an answer; the KV of the last token is never needed."""
        growth = max_new_tokens - 1
        return growth if self._new_tokens is None else min(growth, self._new_tokens + delivered_tokens)

    def wanted(
        self, kept_tokens_bound: int, max_new_tokens: int, delivered_tokens: Mapping[int, int], *, copies: bool = False
    ) -> Wanted:
        """What to reserve for a parcel of at most `kept_tokens_bound` tokens per layer.

        Args:
            delivered_tokens: Of each answer, by choice.
            copies: Whether each has the kept tokens for itself; one alone has in any case.

        Raises:
            TooLargeError: The whole pool has no room for it and all its new tokens.
        """
        shares = len(delivered_tokens) > 1 and not copies

        def bound(tokens: Mapping[int, int]) -> Wanted:
            if not shares:
                own = {choice: self._pool.bound_bytes(kept_tokens_bound, growth) for choice, growth in tokens.items()}
                return Wanted(own)
            own = {choice: self._pool.own_bound_bytes(growth) for choice, growth in tokens.items()}
            return Wanted(own, self._pool.shared_bound_bytes(kept_tokens_bound))

        self._pool.check_fits(bound(dict.fromkeys(delivered_tokens, max_new_tokens - 1)).nbytes)
        return bound({choice: self.tokens(max_new_tokens, known) for choice, known in delivered_tokens.items()})

    def check(self, reservation: Reservation, manifest: Manifest) -> None:
        """Compares a parcel with what was reserved, before anything is allocated or read.

        Raises:
            FailedPreconditionError: Another model, or another transfer.
            InvalidRequestError: It is larger than the reservation, or no step could be made of it.
            TooLargeError: The whole pool has no room for it and all its new tokens.
        """
        manifest.check_compatible(compatibility=self._identity.compatibility, layout=self._identity.layout)
        transfer = manifest.transfer
        expected = (reservation.request_id, reservation.attempt, reservation.prefill_epoch)
        if (transfer.request_id, transfer.attempt, transfer.prefill_epoch) != expected:
            raise FailedPreconditionError("the parcel belongs to another transfer", reason="TRANSFER_ID")
        self._check_tokens(manifest)
        if manifest.sampling.max_new_tokens > reservation.max_new_tokens:
            raise InvalidRequestError("more new tokens than were reserved", reason="OVER_RESERVATION")
        answers = [answer for choice, answer in reservation.answers.items() if choice in manifest.choices]
        if not answers:
            raise InvalidRequestError("the parcel has none of the reserved answers", reason="NOTHING_TO_GENERATE")
        if reservation.shares and manifest.eviction is not None:
            raise InvalidRequestError("rows that will be rewritten were reserved once", reason="OVER_RESERVATION")
        for answer in answers:
            self._check_room(answer, manifest.alone(answer.choice))
        self._check_bytes(reservation, self.arrival(reservation, manifest).wanted)
        self._pool.check_fits(self._arrival(reservation, manifest, whole=True).wanted.nbytes)

    def arrival(self, reservation: Reservation, manifest: Manifest) -> Arrival:
        """What a parcel brings for the answers that have not ended."""
        return self._arrival(reservation, manifest, whole=False)

    def room(self, answer: Answer, alone: Manifest, eviction: Growing | None) -> int:
        """New tokens that a sequence comes in with: as promised, or all where eviction makes them cost no more."""
        # the rows of tokens that were decoded ahead take their room from the promise
        promised = self._tokens_of(answer, alone) - alone.fed
        return self._pool.free_room(alone.num_kept, promised, alone.tokens_to_come, eviction)

    def _arrival(self, reservation: Reservation, manifest: Manifest, *, whole: bool) -> Arrival:
        """With room as it is promised, or for the whole answers."""
        chosen = {choice: answer for choice, answer in reservation.answers.items() if choice in manifest.choices}
        alone = {choice: manifest.alone(choice) for choice in chosen}
        shared: tuple[int, ...] = ()
        if reservation.shares:
            fed = manifest.fed
            shared = self._pool.shareable([kept - fed for kept in manifest.num_kept])
        own = {}
        for choice, answer in chosen.items():
            rule = rule_of(alone[choice])
            room = alone[choice].tokens_to_come if whole else self.room(answer, alone[choice], rule)
            rows = own_rows(alone[choice].num_kept, shared)
            own[choice] = self._pool.sequence_bytes(rows, growth_of(room, rule))
        nbytes = self._pool.sequence_bytes(shared, 0) if reservation.shares else None
        return Arrival(alone=alone, wanted=Wanted(own, nbytes), shared_rows=shared)

    def _check_room(self, answer: Answer, alone: Manifest) -> None:
        if alone.tokens_to_come < 1:
            # it would have no room for a step, whose failure its whole batch would share
            raise InvalidRequestError("the last token is there already", reason="NOTHING_TO_GENERATE")
        if self._tokens_of(answer, alone) < len(alone.generated):
            # their rows took all the room that was promised for new tokens: not even one step could be made
            raise InvalidRequestError(
                "more tokens were decoded ahead than this worker promises", reason="AHEAD_OF_PROMISE"
            )

    def _check_bytes(self, reservation: Reservation, wanted: Wanted) -> None:
        shared = reservation.shared
        fits = shared is None or wanted.shared is None or wanted.shared <= shared.allocation.nbytes
        own = all(nbytes <= reservation.answers[choice].pool_bytes for choice, nbytes in wanted.own.items())
        if not (fits and own):
            raise InvalidRequestError("the parcel is larger than its reservation", reason="OVER_RESERVATION")

    def _tokens_of(self, answer: Answer, alone: Manifest) -> int:
        return self.tokens(alone.sampling.max_new_tokens, answer.delivered_tokens)

    def _check_tokens(self, manifest: Manifest) -> None:
        drawn = (*manifest.generated, *(other.first_token for other in manifest.others))
        if max((*drawn, *manifest.prompt_token_ids)) >= self._identity.vocabulary:
            raise InvalidRequestError("a token is not in the vocabulary", reason="UNKNOWN_TOKEN")
        # a step that fails for an index fails for its whole batch
        manifest.sampling.check_vocabulary(self._identity.vocabulary)
        longest = manifest.logical_length - manifest.fed + manifest.sampling.max_new_tokens
        if longest - 1 > self._identity.context_tokens:
            raise InvalidRequestError("prompt and answer exceed the model's context", reason="CONTEXT_LENGTH")


def own_rows(num_kept: Sequence[int], shared_rows: Sequence[int]) -> tuple[int, ...]:
    """Rows that are not read in common with others."""
    return tuple(kept - shared for kept, shared in zip(num_kept, shared_rows or [0] * len(num_kept), strict=True))
