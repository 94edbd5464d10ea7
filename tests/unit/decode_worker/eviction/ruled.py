"""Sequences with an eviction, beside their twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from decode_worker.eviction.kinds import rule_of
from decode_worker.eviction.ledger import RowLedger
from decode_worker.kv_pool.base import SequenceKV, growth_of
from shared.kv.eviction import Eviction
from tests.unit.decode_worker.eviction.twin import Twin
from tests.unit.decode_worker.parcels import manifest_of
from tests.unit.decode_worker.pools import SCALING, TOLERANCE, Pool, Rows, poison


def ledger_of(
    eviction: Eviction | None, rows: Rows, prompt_tokens: int, scores: np.ndarray | None = None
) -> RowLedger | None:
    """As the worker makes it of a parcel."""
    manifest = manifest_of(rows.layout, rows.num_kept, rows.body, eviction=eviction, logical_length=prompt_tokens)
    rule = rule_of(manifest)
    return None if rule is None else RowLedger.begin(rule, scores)


class Ruled:
    """A sequence in a pool and its twin, which get the same tokens."""

    def __init__(self, pool: Pool, eviction: Eviction | None, rows: Rows, prompt_tokens: int, room: int) -> None:
        self.pool, self.rows = pool, rows
        scores = None
        if eviction is not None and eviction.carries_scores:
            scores = np.random.default_rng(3).random(sum(rows.num_kept), dtype=np.float32)
        self.twin = Twin(
            eviction, rows.pairs, rows.layout.num_layers, prompt_tokens, [] if scores is None else scores.tolist()
        )
        ledger = ledger_of(eviction, rows, prompt_tokens, scores)
        self.allocation, self.kv = self._install(rows.num_kept, rows.body, room, ledger)

    def _install(
        self, num_kept: Sequence[int], body: memoryview, room: int, ledger: RowLedger | None
    ) -> tuple[Any, SequenceKV]:
        allocation = self.pool.allocate(self.pool.sequence_bytes(num_kept, growth_of(room, ledger)))
        return allocation, self.pool.install(allocation, num_kept, body, room, ledger)

    def move(self, room: int) -> None:
        """Out of the pool and in again."""
        exported = self.pool.export(self.kv)
        self.leave()
        self.allocation, self.kv = self._install(exported.num_kept, exported.body, room, exported.eviction)
        again = self.pool.export(self.kv)
        assert bytes(again.body) == bytes(exported.body)

    def leave(self) -> None:
        self.pool.free(self.allocation)
        poison(self.pool, self.allocation)

    def check(self) -> None:
        """The same tokens are left, bit by bit and wherever they lie; what is known of them is true."""
        exported = self.pool.export(self.kv)
        sections = self.rows.layout.sections(exported.num_kept)
        found = []
        for section in sections:
            halves = [exported.body[section.key_offset : section.value_offset]]
            halves.append(exported.body[section.value_offset : section.end])
            found += cut(halves, section.rows, self.rows.layout.row_bytes)
        ledger = self.kv.eviction
        if ledger is not None and ledger.rule.merges:
            self._check_merged(found, ledger)
        else:
            for places, cache in zip(found, self.twin.rows(), strict=True):
                assert sorted(places) == sorted(self._bits(token.key) + self._bits(token.value) for token in cache)
        if ledger is not None:
            ledger.check_integrity()
            self._check_facts()

    def _check_merged(self, found: Sequence[Sequence[bytes]], ledger: RowLedger) -> None:
        """Rows that were computed are alike, not equal."""
        dtype, tolerance = self.rows.pairs[0][0].dtype, TOLERANCE[self.rows.layout.dtype]
        for places, arrival, cache in zip(found, ledger.rows.arrival.flatten(0, 1), self.twin.rows(), strict=True):
            tokens = {token.order: np.concatenate((token.key, token.value)) for token in cache}
            for row, order in zip(places, arrival.tolist(), strict=False):
                values = torch.frombuffer(bytearray(row), dtype=dtype).double().numpy()
                np.testing.assert_allclose(values, tokens[order], rtol=tolerance, atol=tolerance)

    def _check_facts(self) -> None:
        assert self.kv.eviction is not None
        rows = self.kv.eviction.rows
        arrival = rows.arrival.flatten(0, 1)
        for head, (length, cache) in enumerate(zip(rows.lengths.ravel().tolist(), self.twin.rows(), strict=True)):
            orders = arrival[head, :length].tolist()
            assert sorted(orders) == [token.order for token in cache]
            if rows.scores.shape[2]:
                scores = dict(zip(orders, rows.scores.flatten(0, 1)[head].tolist(), strict=False))
                expected = {token.order: token.score for token in cache}
                np.testing.assert_allclose([scores[order] for order in expected], [*expected.values()], rtol=1e-4)

    def _bits(self, row: np.ndarray) -> bytes:
        return torch.from_numpy(row).to(self.rows.pairs[0][0].dtype).view(torch.uint8).numpy().tobytes()


def cut(halves: Sequence[memoryview], rows: Sequence[int], row_bytes: int) -> list[list[bytes]]:
    """K and V of each row of each head of a layer, together."""
    heads, at = [], 0
    for count in rows:
        pieces = [slice(place * row_bytes, (place + 1) * row_bytes) for place in range(at, at + count)]
        heads.append([bytes(halves[0][piece]) + bytes(halves[1][piece]) for piece in pieces])
        at += count
    return heads


def step(pool: Pool, batch: Sequence[Ruled]) -> list[torch.Tensor]:
    """One token for each; compares what is attended and what is left. Returns the output per layer."""
    outputs = []
    attention = pool.attention([each.kv for each in batch])
    for layer in range(pool.layout.num_layers):
        drawn = [each.rows.token() for each in batch]
        query, key, value = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        outputs.append(attention.attend(layer, query, key, value, None, SCALING))
        for number, (each, token) in enumerate(zip(batch, drawn, strict=True)):
            expected = each.twin.attend(layer, *(part[None] for part in token), None, SCALING)
            tolerance = TOLERANCE[pool.layout.dtype]
            torch.testing.assert_close(outputs[-1][number], expected[0], rtol=tolerance, atol=tolerance)
    pool.complete([each.kv for each in batch])
    for each in batch:
        each.twin.complete()
        each.check()
    return outputs
