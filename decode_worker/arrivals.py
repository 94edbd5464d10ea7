"""From a parcel body to sequences in the pool: one for each answer, which read the prompt's rows in common or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from decode_worker.answers import Answer, Shared
from decode_worker.eviction.kinds import opened
from decode_worker.kv_pool.base import KVPool, SequenceKV
from decode_worker.kv_pool.parts import divided
from decode_worker.kv_pool.seen_rows import SeenRows
from decode_worker.parcel_reader import plain_body
from decode_worker.promise import Arrival, Promise, own_rows
from shared.errors import InvalidRequestError
from shared.kv.eviction import SCORE_BYTES
from shared.kv.manifest import Manifest
from shared.model.wave_order import in_body_order


class Arrivals:
    """Copies parcels into memory that was reserved; holds nothing of a request. Runs in the install thread."""

    def __init__(self, *, pool: KVPool[Any, Any], promise: Promise) -> None:
        self._pool = pool
        self._promise = promise

    def copy(
        self,
        answers: Sequence[Answer],
        arrival: Arrival,
        manifest: Manifest,
        body: memoryview,
        *,
        verify: bool,
        in_waves: bool,
    ) -> dict[int, SequenceKV]:
        """The sequences of `answers`, which are those of `arrival`, by choice. See `DecodeRunner.install`.

        Raises:
            DataLossError: The digest does not match.
            InvalidRequestError: An encoded body contradicts its manifest, or a score is not a number.
        """
        if in_waves:
            body = in_body_order(manifest, body)
        if manifest.encoding is not None:
            body, verify = plain_body(manifest, body, verify=verify), False
        shared = self._share(answers[0].shared, arrival, manifest, body)
        kvs = {answer.choice: self._install(answer, arrival, manifest, body, shared) for answer in answers}
        if verify:
            # after the copies: a slot that was reused meanwhile shows
            manifest.check_digest(body)
        for kv in kvs.values():
            if kv.eviction is not None and not kv.eviction.rows.scores.isfinite().all():
                raise InvalidRequestError("a score is not a number", reason="PARCEL_SCORES")
        return kvs

    def _share(
        self, shared: Shared | None, arrival: Arrival, manifest: Manifest, body: memoryview
    ) -> SequenceKV | None:
        """The rows that all of them read, in the pool."""
        if shared is None:
            return None
        first, _ = divided(manifest.layout, manifest.num_kept, body, arrival.shared_rows)
        shared.kv = self._pool.install(shared.allocation, arrival.shared_rows, first, 0)
        return shared.kv

    def _install(
        self, answer: Answer, arrival: Arrival, manifest: Manifest, body: memoryview, shared: SequenceKV | None
    ) -> SequenceKV:
        alone = arrival.alone[answer.choice]
        if answer.choice != manifest.choice:
            body = _without_fed(manifest, body)
        rows, eviction = opened(alone, body)
        if shared is not None:
            _, rows = divided(alone.layout, alone.num_kept, rows, arrival.shared_rows)
        own = own_rows(alone.num_kept, arrival.shared_rows)
        room = self._promise.room(answer, alone, eviction)
        seen = SeenRows.of(manifest)
        if seen is not None and answer.choice != manifest.choice:
            seen = replace(seen, age=0)
        return self._pool.install(answer.allocation, own, rows, room, eviction, seen, shared)


def _without_fed(manifest: Manifest, body: memoryview) -> memoryview:
    """A plain body without the rows of the first answer's tokens, and without their scores."""
    if not manifest.fed:
        return body
    fed = np.full(len(manifest.num_kept), manifest.fed)
    prompt = np.array(manifest.num_kept) - fed
    end = len(body) - manifest.score_bytes
    rows, _ = divided(manifest.layout, manifest.num_kept, body[:end], prompt)
    if not manifest.score_bytes:
        return rows
    scores = np.frombuffer(body[end:], dtype=np.uint8).reshape(-1, SCORE_BYTES)
    stays = np.repeat(np.tile([True, False], len(prompt)), np.stack([prompt, fed], axis=1).ravel())
    return memoryview(bytes(rows) + scores[stays].tobytes())
