"""Many steps of one sequence at once, as members of a batch over its memory: the pools and the engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.engine import EagerEngine
from decode_worker.graph_engine import GraphEngine
from decode_worker.kv_pool.base import KVPool
from decode_worker.sequence import Sequence
from shared.kernels.dispatch import kernels_for
from shared.kernels.reference.slab_attention import slab_attention
from shared.kv.layout import KVLayout
from shared.model.loading import load_decode_model
from shared.model.sampler import Sampler
from shared.model.spec import TORCH_DTYPES
from shared.request.sampling import Sampling
from tests.unit.decode_worker.pools import (
    CPU,
    POOLS,
    SCALING,
    TOLERANCE,
    Pool,
    Rows,
    block_pool,
    install,
    poison,
    slab_pool,
)
from tests.unit.decode_worker.sequences import LAYOUT, Prefilled, advance, pooled, prefill, sequence, some, text_ids
from tests.unit.decode_worker.tiny import load_whole

CAPACITY = 1 << 20
MAX_BATCH = 8


@st.composite
def shapes(draw: st.DrawFn) -> tuple[KVLayout, tuple[int, ...]]:
    """Of which native kernels take some, by one thread or several."""
    layout = KVLayout(
        num_layers=draw(st.integers(1, 2)),
        num_kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([3, 16, 64])),
        dtype=draw(st.sampled_from([*TORCH_DTYPES])),
    )
    heads = layout.num_layers * layout.num_kv_heads
    counts = st.lists(st.sampled_from([1, 2, 15, 16, 31, 100]), min_size=heads, max_size=heads)
    return layout, tuple(draw(counts))


def steps_of(kv: Any, number: int) -> list[Any]:
    each = Sequence(kv=kv, sampler=Sampler(Sampling(max_new_tokens=9), frozenset()), last_token=0, next_position=1)
    each.known.extend(range(number))
    return [step.kv for step in each.steps_ahead(number)]


def one_by_one(pool: Pool, kv: Any, tokens: list[list[tuple[torch.Tensor, ...]]]) -> torch.Tensor:
    """Attention of each layer and token, [num_layers, tokens, num_query_heads, head_dim]."""
    outputs = []
    for step in range(len(tokens[0])):
        attention = pool.attention([kv])
        each = [
            attention.attend(layer, *(part[None] for part in parts[step]), None, SCALING)[0, 0]
            for layer, parts in enumerate(tokens)
        ]
        kv.appended += 1
        outputs.append(torch.stack(each))
    return torch.stack(outputs, dim=1)


def at_once(pool: Pool, kv: Any, tokens: list[list[tuple[torch.Tensor, ...]]]) -> torch.Tensor:
    """As `one_by_one`, in one pass."""
    number = len(tokens[0])
    attention = pool.replay(steps_of(kv, number))
    outputs = []
    for layer, parts in enumerate(tokens):
        query, key, value = (torch.stack(each) for each in zip(*parts, strict=True))
        outputs.append(attention.attend(layer, query, key, value, None, SCALING)[:, 0])
    kv.appended += number
    return torch.stack(outputs)


@pytest.mark.parametrize("storage", POOLS)
@settings(max_examples=25)
@given(
    shape=shapes(),
    before=st.integers(0, 2),
    number=st.integers(1, MAX_BATCH),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_members_of_one_memory_are_single_steps_bit_by_bit(
    storage: str, shape: tuple[KVLayout, tuple[int, ...]], before: int, number: int, threads: int, seed: int
) -> None:
    """Every sum is taken in the same order, whoever is beside it in the batch."""
    layout, num_kept = shape
    pool, rows = POOLS[storage](layout, CAPACITY), Rows(layout, num_kept, seed)
    poison(pool)
    (first, slow), (second, fast) = (install(pool, rows, before + number + 1) for _ in range(2))
    start = [[rows.token() for _ in range(before)] for _ in range(layout.num_layers)]
    tokens = [[rows.token() for _ in range(number)] for _ in range(layout.num_layers)]
    after = [[rows.token()] for _ in range(layout.num_layers)]
    if before:
        assert torch.equal(one_by_one(pool, slow, start), one_by_one(pool, fast, start))
    torch.set_num_threads(threads)
    try:
        assert torch.equal(one_by_one(pool, slow, tokens), at_once(pool, fast, tokens))
    finally:
        torch.set_num_threads(1)
    assert (fast.appended, fast.room) == (slow.appended, slow.room)
    assert bytes(pool.export(fast).body) == bytes(pool.export(slow).body)
    assert torch.equal(one_by_one(pool, slow, after), one_by_one(pool, fast, after))
    pool.check_integrity()
    pool.free(first)
    pool.free(second)
    assert pool.used_bytes == 0


def test_members_read_each_other_s_rows_in_whatever_order_threads_take_them() -> None:
    def last_first(*arguments: Any) -> torch.Tensor:
        query, key, value, pool, *places, scaling, shared = arguments
        assert shared is None
        out = torch.empty_like(query)
        for member in reversed(range(len(query))):
            mine = slice(member, member + 1)
            new, where = (each[mine] for each in (query, key, value)), (each[mine] for each in places)
            out[mine] = slab_attention(*new, pool, *where, scaling)
        return out

    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, dtype="float32")
    pool, rows = slab_pool(layout), Rows(layout, (5, 1, 3, 9), 1)
    poison(pool)
    slow, fast = (install(pool, rows, 6)[1] for _ in range(2))
    tokens = [[rows.token() for _ in range(6)] for _ in range(2)]
    pool._kernel = last_first
    assert torch.equal(one_by_one(pool, slow, tokens), at_once(pool, fast, tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_tritons_kernels_they_are_nearly_so(dtype: str) -> None:
    """The fewer sequences in a step, the more programs share each, and their sums are merged in another order."""
    pytest.importorskip("triton", reason="the extra `kernels` is not installed")
    layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim=16, dtype=dtype)
    pool = block_pool(layout, CAPACITY, block_size=4, max_tokens=64, kernels=kernels_for(CPU, "triton"))
    poison(pool)
    rows = Rows(layout, (9, 3), 1)
    slow, fast = (install(pool, rows, 6)[1] for _ in range(2))
    tokens = [[rows.token() for _ in range(6)]]
    single, together = one_by_one(pool, slow, tokens), at_once(pool, fast, tokens)
    np.testing.assert_allclose(together.double(), single.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert bytes(pool.export(fast).body) == bytes(pool.export(slow).body)


class Held:
    """One prompt in a pool of its own under an engine."""

    def __init__(self, model: Any, storage: str, prompt: Prefilled, room: int) -> None:
        self.pool: KVPool[Any, Any] = POOLS[storage](LAYOUT, CAPACITY)
        poison(self.pool)
        eager = storage == "slabs"
        self.engine = EagerEngine(model, self.pool) if eager else GraphEngine(model, self.pool, max_num_seqs=MAX_BATCH)
        self.each = sequence(prompt, pooled(self.pool, prompt, some(3, prompt.num_tokens), room), room)
        self.neighbour = sequence(prompt, pooled(self.pool, prompt, some(5, prompt.num_tokens), room), room)

    def rows(self) -> torch.Tensor:
        body = np.frombuffer(self.pool.export(self.each.kv).body, dtype=np.float32)
        return torch.from_numpy(body.copy())


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load_decode_model(checkpoint, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def prompt(checkpoint: Path) -> Prefilled:
    return prefill(load_whole(checkpoint), text_ids(4, 40))


@pytest.mark.parametrize("storage", ["slabs", "blocks of 3"])
@pytest.mark.parametrize("number", [1, 3, MAX_BATCH])
def test_a_sequence_is_after_a_replay_what_it_is_after_steps(
    model: Any, prompt: Prefilled, storage: str, number: int
) -> None:
    """Up to fp32 rounding of the linear layers, which take another number of rows at once. A neighbour is as it was."""
    slow, fast = (Held(model, storage, prompt, MAX_BATCH + 4) for _ in range(2))
    for held in (slow, fast):
        advance([held.neighbour], held.engine.step([held.neighbour]))
    drawn = []
    for _ in range(number):
        advance([slow.each], slow.engine.step([slow.each]))
        drawn.append(slow.each.last_token)
    fast.each.known.extend(drawn)
    fast.engine.replay(fast.each, number)
    assert [fast.each.recall() for _ in range(number)] == drawn
    assert not fast.each.known
    for name in ("last_token", "next_position", "generated", "finish_reason"):
        assert getattr(fast.each, name) == getattr(slow.each, name)
    torch.testing.assert_close(fast.rows(), slow.rows(), rtol=1e-4, atol=1e-4)
    for _ in range(2):
        both = [[held.each, held.neighbour] for held in (slow, fast)]
        tokens = [held.engine.step(batch) for held, batch in zip((slow, fast), both, strict=True)]
        assert tokens[0] == tokens[1]
        for batch in both:
            advance(batch, tokens[0])
    fast.pool.check_integrity()
    if storage != "slabs":
        fast.pool.tables.check_integrity()  # type: ignore[attr-defined]
