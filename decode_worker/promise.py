"""Room that a request is promised before its parcel comes, and whether the parcel keeps to it."""

from __future__ import annotations

from typing import Any

from decode_worker.eviction.kinds import rule_of
from decode_worker.kv_pool.base import Growing, KVPool, growth_of
from decode_worker.reservations import Reservation
from shared.errors import FailedPreconditionError, InvalidRequestError
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity


class Promise:
    """Arithmetic over the pool; holds nothing of a request.

    Args:
        new_tokens: Those that have room at once, beside what was delivered already; None is all.
    """

    def __init__(self, *, pool: KVPool[Any, Any], identity: ModelIdentity, new_tokens: int | None) -> None:
        self._pool = pool
        self._identity = identity
        self._new_tokens = new_tokens

    def tokens(self, max_new_tokens: int, delivered_tokens: int) -> int:
        """New tokens whose room comes with a reservation; the KV of the last token is never needed."""
        growth = max_new_tokens - 1
        return growth if self._new_tokens is None else min(growth, self._new_tokens + delivered_tokens)

    def nbytes(self, kept_tokens_bound: int, max_new_tokens: int, delivered_tokens: int) -> int:
        """Bytes to reserve for a parcel of at most `kept_tokens_bound` tokens per layer.

        Raises:
            TooLargeError: The whole pool has no room for it and all its new tokens.
        """
        self._pool.check_fits(self._pool.bound_bytes(kept_tokens_bound, max_new_tokens - 1))
        return self._pool.bound_bytes(kept_tokens_bound, self.tokens(max_new_tokens, delivered_tokens))

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
        if self._tokens_of(reservation, manifest) < len(manifest.generated):
            # their rows took all the room that was promised for new tokens: not even one step could be made
            raise InvalidRequestError(
                "more tokens were decoded ahead than this worker promises", reason="AHEAD_OF_PROMISE"
            )
        if manifest.sampling.max_new_tokens > reservation.max_new_tokens:
            raise InvalidRequestError("more new tokens than were reserved", reason="OVER_RESERVATION")
        if self.bytes_needed(reservation, manifest) > reservation.pool_bytes:
            raise InvalidRequestError("the parcel is larger than its reservation", reason="OVER_RESERVATION")
        # the promise holds fewer new tokens: outgrown, such a sequence would wait for ever
        growth = growth_of(manifest.tokens_to_come, rule_of(manifest))
        self._pool.check_fits(self._pool.sequence_bytes(manifest.num_kept, growth))

    def room(self, reservation: Reservation, manifest: Manifest, eviction: Growing | None) -> int:
        """New tokens that a sequence comes in with: as promised, or all where eviction makes them cost no more."""
        # the rows of tokens that were decoded ahead take their room from the promise
        fed = len(manifest.generated) - 1
        promised = self._tokens_of(reservation, manifest) - fed
        return self._pool.free_room(manifest.num_kept, promised, manifest.tokens_to_come, eviction)

    def bytes_needed(self, reservation: Reservation, manifest: Manifest) -> int:
        """Exact bytes of a parcel's sequence and its room."""
        rule = rule_of(manifest)
        return self._pool.sequence_bytes(manifest.num_kept, growth_of(self.room(reservation, manifest, rule), rule))

    def _tokens_of(self, reservation: Reservation, manifest: Manifest) -> int:
        return self.tokens(manifest.sampling.max_new_tokens, reservation.delivered_tokens)

    def _check_tokens(self, manifest: Manifest) -> None:
        if manifest.tokens_to_come < 1:
            # it would have no room for a step, whose failure its whole batch would share
            raise InvalidRequestError("the last token is there already", reason="NOTHING_TO_GENERATE")
        if max((*manifest.generated, *manifest.prompt_token_ids)) >= self._identity.vocabulary:
            raise InvalidRequestError("a token is not in the vocabulary", reason="UNKNOWN_TOKEN")
        # a step that fails for an index fails for its whole batch
        manifest.sampling.check_vocabulary(self._identity.vocabulary)
        if manifest.logical_length + manifest.tokens_to_come > self._identity.context_tokens:
            raise InvalidRequestError("prompt and answer exceed the model's context", reason="CONTEXT_LENGTH")
