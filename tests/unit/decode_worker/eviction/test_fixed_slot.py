"""The lengths of Elastic Cache to the token (test E2), and which tokens go."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from decode_worker.eviction.fixed_slot import FixedSlotRule
from shared.kv.eviction import FixedSlot
from shared.kv.layout import KVLayout
from tests.unit.decode_worker.eviction.ruled import Ruled, step
from tests.unit.decode_worker.pools import POOLS, Rows, poison

storages = pytest.mark.parametrize("storage", POOLS)
LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")
FIFTH = (Fraction(1, 5),) * 2
E2_LENGTHS = [101, 101, 101, 101, 101, 102, 102, 102, 102, 102, 103, 103]


@storages
def test_e2(storage: str) -> None:
    """Prompt 500, a fifth kept: lengths after steps 1 to 12; slot 75 goes at every step except 1, 6 and 11."""
    pool, rows = POOLS[storage](LAYOUT, 1 << 20), Rows(LAYOUT, (100,) * 4, seed=1)
    poison(pool)
    each = Ruled(pool, FixedSlot(retention=FIFTH, distance=-25), rows, prompt_tokens=500, room=12)
    gone: list[int] = []
    for length in E2_LENGTHS:
        step(pool, [each])
        assert set(each.kv.lengths.ravel().tolist()) == {length}
        present = set(each.twin.orders()[0])
        gone = sorted(order for order in range(-100, each.twin.generated) if order not in present)
    # slot 75 of the prompt is 25 before its end, and later rows move up
    assert gone == [*range(-25, -16)]


def test_e2_takes_no_more_room_than_it_holds() -> None:
    pool, rows = POOLS["slabs"](LAYOUT, 1 << 20), Rows(LAYOUT, (100,) * 4, seed=1)
    each = Ruled(pool, FixedSlot(retention=FIFTH, distance=-25), rows, prompt_tokens=500, room=12)
    # 103 rows after the last token, and one more before the old one goes
    assert each.allocation.nbytes == LAYOUT.body_bytes([104] * 4)
    assert pool.sequence_bytes(rows.num_kept, 12) == LAYOUT.body_bytes([112] * 4)


def rule(kept: int, prompt_tokens: int, retention: str) -> FixedSlotRule:
    return FixedSlotRule(FixedSlot(retention=(Fraction(retention),), distance=-25), np.array([[kept]]), prompt_tokens)


@pytest.mark.parametrize("retention", ["1/5", "0.1", "0.29", "1/3", "0.999", "1e-9"])
@pytest.mark.parametrize("prompt_tokens", [1, 7, 99, 500, 503])
def test_lengths_in_closed_form_are_those_of_the_published_loop(retention: str, prompt_tokens: int) -> None:
    share = Fraction(retention)
    for kept in {max(1, int(share * prompt_tokens)), min(prompt_tokens, 16), prompt_tokens}:
        made, length, most = rule(kept, prompt_tokens, retention), kept, kept
        for generated in range(1, 80):
            length, most = length + 1, max(most, length + 1)
            if int(length - (prompt_tokens + generated) * share) > 0:
                length -= 1
            assert made.held(0, kept, generated) == length
            assert made.most(0, kept, generated) == most


@pytest.mark.parametrize("distance", [-1, -3, -25])
@storages
def test_a_short_prompt_loses_its_middle(storage: str, distance: int) -> None:
    pool, rows = POOLS[storage](LAYOUT, 1 << 20), Rows(LAYOUT, (1, 3, 9, 4), seed=2)
    each = Ruled(pool, FixedSlot(retention=FIFTH, distance=distance), rows, prompt_tokens=20, room=20)
    for _ in range(20):
        step(pool, [each])


@storages
def test_each_layer_has_its_own_share_as_in_prefix_kv(storage: str) -> None:
    pool, rows = POOLS[storage](LAYOUT, 1 << 20), Rows(LAYOUT, (20, 20, 5, 5), seed=3)
    shares = (Fraction(2, 5), Fraction(1, 10))
    each = Ruled(pool, FixedSlot(retention=shares, distance=-4), rows, prompt_tokens=50, room=30)
    for _ in range(30):
        step(pool, [each])
    assert each.kv.lengths.tolist() == [[32, 32], [8, 8]]
