"""Every kind against caches that are plain lists: what is attended, and which tokens are left after each step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.eviction.facts import ABSENT
from decode_worker.eviction.ledger import RowLedger
from decode_worker.kv_pool.base import growth_of
from shared.kv.eviction import Eviction, HeavyHitters, Recall, Scope, SharedLayers, SparseRead
from shared.kv.layout import KVLayout
from tests.unit.decode_worker.eviction.kinds import parcels
from tests.unit.decode_worker.eviction.ruled import Ruled, ledger_of, step
from tests.unit.decode_worker.eviction.twin import Twin
from tests.unit.decode_worker.pools import GROUP, POOLS, SCALING, Rows, poison

CAPACITY = 1 << 18
STEPS = 14
Parcel = tuple[KVLayout, Eviction | None, tuple[int, ...], int]
storages = pytest.mark.parametrize("storage", ["slabs", "blocks of 3"])


@storages
@settings(max_examples=60, deadline=None)
@given(parcel=parcels(), seed=st.integers(0, 99))
def test_a_sequence_is_its_twin(storage: str, parcel: Parcel, seed: int) -> None:
    layout, eviction, num_kept, prompt_tokens = parcel
    pool = POOLS[storage](layout, CAPACITY)
    poison(pool)
    each = Ruled(pool, eviction, Rows(layout, num_kept, seed), prompt_tokens, room=STEPS)
    for _ in range(STEPS):
        step(pool, [each])
    assert each.kv.full
    each.leave()
    pool.check_integrity()
    assert pool.used_bytes == 0


@storages
@settings(max_examples=40, deadline=None)
@given(parcel=parcels(), seed=st.integers(0, 99), stays=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_moving_out_and_in_again_changes_nothing(storage: str, parcel: Parcel, seed: int, stays: list[int]) -> None:
    """At any moment, as often as it happens, each time into no more memory than its next tokens need."""
    layout, eviction, num_kept, prompt_tokens = parcel
    pool = POOLS[storage](layout, CAPACITY)
    poison(pool)
    each = Ruled(pool, eviction, Rows(layout, num_kept, seed), prompt_tokens, room=2)
    step(pool, [each])
    for tokens in stays:
        each.move(room=tokens)
        for _ in range(tokens):
            step(pool, [each])
        assert each.kv.full


LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype="float32")
MIXED: list[Eviction | None] = [
    None,
    HeavyHitters(budget=9, recent=4),
    SparseRead(select_layers=(0,), top=4),
    None,
    Scope(variant="adaptive", window=4, recent=2, delta=3),
    SparseRead(select_layers=(1, 2), top=3),
    Recall(budget=(9, 8, 12), recent=(2, 0, 5), sinks=1),
    SharedLayers(borrowers=(1, 2), lenders=(0, 0)),
    SharedLayers(borrowers=(2,), lenders=(0,)),
    SharedLayers(borrowers=(2,), lenders=(1,)),
]


@storages
def test_a_mixed_batch_is_each_alone(storage: str) -> None:
    """Bit by bit for those without a rule; members come and go."""

    def fresh(number: int) -> Ruled:
        eviction = MIXED[number]
        empty = eviction.empty_layers if eviction is not None else ()
        num_kept = [0 if place // LAYOUT.num_kv_heads in empty else 8 for place in range(6)]
        return Ruled(pool, eviction, Rows(LAYOUT, num_kept, seed=number), prompt_tokens=30, room=STEPS)

    pool = POOLS[storage](LAYOUT, CAPACITY)
    poison(pool)
    alone = []
    for number in range(len(MIXED)):
        each = fresh(number)
        alone.append([step(pool, [each]) for _ in range(STEPS)])
    together, done = [fresh(number) for number in range(len(MIXED))], [0] * len(MIXED)
    for turn in range(STEPS):
        present = [number for number in range(len(MIXED)) if (turn + number) % 4]
        outputs = step(pool, [together[number] for number in present])
        for place, number in enumerate(present):
            for found, expected in zip(outputs, alone[number][done[number]], strict=True):
                torch.testing.assert_close(found[place], expected[0], rtol=1e-5, atol=1e-5)
            done[number] += 1


@settings(max_examples=200, deadline=None)
@given(parcel=parcels(), tokens=st.integers(0, 60))
def test_rows_in_closed_form_are_those_of_the_twin(parcel: Parcel, tokens: int) -> None:
    """And the room that is taken is exactly what is used at the worst moment."""
    layout, eviction, num_kept, prompt_tokens = parcel
    rows = Rows(layout, num_kept, 1)
    ledger = ledger_of(eviction, rows, prompt_tokens, scores_for(eviction, num_kept))
    twin = Twin(eviction, rows.pairs, layout.num_layers, prompt_tokens)
    heads, most = layout.num_kv_heads, list(num_kept)
    zeros = torch.zeros(1, heads * GROUP, 1, layout.head_dim)
    for generated in range(1, tokens + 1):
        for layer in range(layout.num_layers):
            twin.attend(layer, zeros, zeros[:, :heads], zeros[:, :heads], None, SCALING)
        most = [max(pair) for pair in zip(most, map(len, twin.rows()), strict=True)]
        twin.complete()
        if ledger is not None:
            assert ledger.rule.held_rows(generated).ravel().tolist() == [len(cache) for cache in twin.rows()]
    growth = growth_of(tokens, ledger)
    taken = [kept + (growth if isinstance(growth, int) else growth[head]) for head, kept in enumerate(num_kept)]
    assert taken == most


def scores_for(eviction: Eviction | None, num_kept: tuple[int, ...]) -> np.ndarray | None:
    return np.zeros(sum(num_kept), dtype=np.float32) if eviction is not None and eviction.carries_scores else None


def test_of_equals_the_oldest_goes() -> None:
    rows = Rows(LAYOUT, (2,) * 6, seed=1)
    begun = ledger_of(Scope(variant="slide", window=3, recent=1, delta=1), rows, 20)
    assert begun is not None
    ledger = begun.settled(6, torch.device("cpu"))
    for generated in range(1, 9):
        for layer in range(LAYOUT.num_layers):
            ledger.observe(layer, torch.ones(2, int(ledger.lengths.max()) + 1))
        assert len(list(ledger.step())) == (generated > 3)
        for arrival in ledger.rows.arrival.flatten(0, 1).tolist():
            present = sorted(order for order in arrival if order != ABSENT)
            assert present == [-2, -1, *range(max(0, generated - 3), generated)]


def test_a_row_that_is_not_there_has_no_score() -> None:
    rows = Rows(LAYOUT, (3, 5) * 3, seed=1)
    ledger = ledger_of(HeavyHitters(budget=9, recent=2), rows, 20, np.ones(24, dtype=np.float32))
    assert ledger is not None
    assert ledger.rows.scores[0].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    damaged = ledger.settled(6, torch.device("cpu"))
    damaged.check_integrity()
    for break_it in (drop_one, know_one_too_many, count_one_twice):
        broken = ledger.settled(6, torch.device("cpu"))
        break_it(broken)
        with pytest.raises(AssertionError):
            broken.check_integrity()


def drop_one(ledger: RowLedger) -> None:
    ledger.lengths[1, 1] -= 1


def know_one_too_many(ledger: RowLedger) -> None:
    ledger.rows.arrival[0, 0, 4] = -9


def count_one_twice(ledger: RowLedger) -> None:
    ledger.rows.arrival[0, 1, 0] = -1
