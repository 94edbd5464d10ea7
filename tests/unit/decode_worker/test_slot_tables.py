"""Slots: each sequence finds its own lengths and blocks, wherever it was between two steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from decode_worker.kv_pool.slot_tables import BlockKV, SlotTables
from shared.kv.layout import KVLayout
from tests.unit.decode_worker.pools import CPU, Rows, block_pool, install, poison, step

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32")
SLOTS, MAX_BLOCKS, TRASH_BLOCK = 4, 6, 0


def tables() -> SlotTables:
    return SlotTables(layout=LAYOUT, slots=SLOTS, max_blocks=MAX_BLOCKS, trash_block=TRASH_BLOCK, device=CPU)


def kv_of(number: int, width: int = 3) -> BlockKV:
    """A sequence whose blocks and lengths are no one else's."""
    blocks = np.arange(4 * width, dtype=np.int32).reshape(2, 2, width) + 100 * (number + 1)
    kept = np.array([[1, 2], [3, 4]]) + 10 * (number + 1)
    return BlockKV(kept=kept, room=1000, blocks=blocks)


def test_a_slot_stays_while_its_sequence_does() -> None:
    made = tables()
    first, second, third = (kv_of(number) for number in range(3))
    before = made.bind([first, second])
    assert made.bind([second, first]) == before[::-1]
    assert made.bind([third, second])[1] == before[1]
    assert len({*made.bind([third, second]), made.trash}) == 3


def test_who_leaves_makes_room_for_others() -> None:
    made = tables()
    for start in range(0, 12, SLOTS):
        slots = made.bind([kv_of(number) for number in range(start, start + SLOTS)])
        assert sorted(slots) == list(range(SLOTS))
        made.check_integrity()


def test_padding_rows_never_grow() -> None:
    made = tables()
    (slot,) = made.bind([kv_of(0)])
    for _ in range(3):
        made.advance(torch.tensor([slot, made.trash, made.trash, made.trash]))
    assert set(made.lengths[:, made.trash].ravel().tolist()) == {1}
    assert set(made.blocks[:, made.trash].ravel().tolist()) == {TRASH_BLOCK}
    assert made.lengths[:, slot].tolist() == [[14, 15], [16, 17]]
    others = [other for other in range(SLOTS) if other != slot]
    assert set(made.lengths[:, others].ravel().tolist()) == {1}, "nobody else grows"


class Turns(RuleBasedStateMachine):
    """Any batch may follow any other, whether its sequences were in the last one or not."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = tables()
        self.all = [kv_of(number, width=1 + number % MAX_BLOCKS) for number in range(7)]

    @rule(batch=st.permutations(range(7)), size=st.integers(1, SLOTS), fill=st.integers(0, 3))
    def turn(self, batch: list[int], size: int, fill: int) -> None:
        present = [self.all[number] for number in batch[:size]]
        slots = self.tables.bind(present)
        assert len(set(slots)) == size
        self.tables.advance(torch.tensor(slots + [self.tables.trash] * fill))
        for slot, kv in zip(slots, present, strict=True):
            kv.appended += 1
            assert self.tables.lengths[:, slot].tolist() == kv.lengths.tolist()
            assert self.tables.blocks[:, slot, :, : kv.blocks.shape[-1]].tolist() == kv.blocks.tolist()

    @rule(number=st.integers(0, 6))
    def comes_back_from_elsewhere(self, number: int) -> None:
        """Parked and installed again: other blocks, the same tokens."""
        kv = self.all[number]
        self.all[number] = BlockKV(kept=kv.lengths, room=kv.room, blocks=kv.blocks + 1000)

    @invariant()
    def every_slot_is_someone_s_or_free(self) -> None:
        self.tables.check_integrity()


Turns.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestTurns = Turns.TestCase


def test_a_slot_s_next_sequence_reads_nothing_of_the_last_one() -> None:
    """Neither its longer table nor its blocks, which are someone else's by now."""
    pool = block_pool(LAYOUT, block_size=4, max_num_seqs=1)
    long, short = Rows(LAYOUT, (30, 20, 9, 33), 0), Rows(LAYOUT, (1, 2, 3, 1), 1)
    held: list[Any] = []
    for rows in (long, short):
        allocation, kv = install(pool, rows, 3)
        step(pool, [(rows, kv)])
        step(pool, [(rows, kv)])
        rows.check(pool.export(kv))
        pool.free(allocation)
        poison(pool, allocation)
        held.append(kv)
    assert pool.tables.bind([held[1]]) == [0]
