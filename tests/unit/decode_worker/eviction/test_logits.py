"""The language model over caches that evict, against the same model in double precision over lists of tokens."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from decode_worker.engine import EagerEngine
from decode_worker.graph_engine import GraphEngine
from decode_worker.sequence import Sequence
from shared.kv.eviction import Eviction, FixedSlot, HeavyHitters, Recall, Scope, SharedLayers, SparseRead, TextGuard
from shared.kv.extents import aligned
from shared.model.loading import load_decode_model
from shared.model.sampler import Drawn
from tests.unit.decode_worker.eviction.shipments import RuledShipment, TwinDecoding, orders
from tests.unit.decode_worker.pools import CPU, POOLS, Pool, block_pool, poison
from tests.unit.decode_worker.sequences import LAYOUT, advance, prefill, text_ids
from tests.unit.decode_worker.tiny import load_whole

STEPS, PROMPT = 20, 40
KEPT = range(1, PROMPT, 3)
FIFTH, THIRD = (Fraction(1, 5),) * 3, (Fraction(2, 5), Fraction(1, 5), Fraction(1, 3))
KINDS: dict[str, Eviction | None] = {
    "nothing": None,
    "elastic": FixedSlot(retention=FIFTH, distance=-5),
    "prefix": FixedSlot(retention=THIRD, distance=-25),
    "h2o": HeavyHitters(budget=len(KEPT), recent=6),
    "d2o": Recall(budget=(len(KEPT), len(KEPT) + 3, len(KEPT) + 6), recent=(5, 0, 9), sinks=2),
    "slide": Scope(variant="slide", window=6, recent=2, delta=3),
    "adaptive": Scope(variant="adaptive", window=6, recent=2, delta=3),
    "discontinuous": Scope(variant="discontinuous", window=6, recent=2, delta=5),
    "tgv": TextGuard(retention=THIRD, sinks=4, text=(3, 0, 5)),
    "tidal": SparseRead(select_layers=(0,), top=7),
    "tidal, anew": SparseRead(select_layers=(0, 2), top=3),
    "sharer": SharedLayers(borrowers=(1, 2), lenders=(0, 0)),
    "sharer, one": SharedLayers(borrowers=(2,), lenders=(1,)),
}


class Noting:
    """A model whose logits can be looked at after each call."""

    device = CPU

    def __init__(self, model: Any) -> None:
        self._model, self.logits = model, torch.empty(0)

    def __call__(self, **inputs: Any) -> Any:
        output = self._model(**inputs)
        self.logits = output.logits[:, -1].clone()
        return output


@pytest.fixture(scope="module")
def single(checkpoint: Path) -> Noting:
    return Noting(load_decode_model(checkpoint, dtype=torch.float32, device=CPU))


@pytest.fixture(scope="module")
def double(checkpoint: Path) -> Any:
    return load_decode_model(checkpoint, dtype=torch.float64, device=CPU)


@pytest.fixture(scope="module")
def shipments(checkpoint: Path) -> dict[str, RuledShipment]:
    prompt = prefill(load_whole(checkpoint), text_ids(4, PROMPT))
    return {kind: RuledShipment(prompt, KEPT, eviction) for kind, eviction in KINDS.items()}


@pytest.fixture(params=["slabs", "blocks of 3"])
def pool(request: pytest.FixtureRequest) -> Pool:
    made = POOLS[request.param](LAYOUT, 1 << 20)
    poison(made)
    return made


def same(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((logits.double() - expected).abs().max() / expected.abs().max() < 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_kept_tokens_are_those_of_the_twin(
    single: Noting, double: Any, shipments: dict[str, RuledShipment], pool: Pool, kind: str
) -> None:
    each, twin = shipments[kind].installed(pool, STEPS), TwinDecoding(double, shipments[kind])
    engine = EagerEngine(single, pool)  # type: ignore[arg-type]
    for step in range(STEPS):
        expected = twin.step(each.last_token)
        engine.step([each])
        # an untrained model repeats itself, and which of equal tokens at equal distances is the most similar is a tie
        advance([each], [Drawn(20 + step)])
        assert same(single.logits[0], expected)
        assert orders(each.kv) == twin.twin.orders()
    kept = shipments[kind].num_kept
    dropped = sum(map(len, orders(each.kv))) < sum(kept) + STEPS * sum(map(bool, kept))
    assert dropped == (KINDS[kind] is not None and KINDS[kind].evicts)  # type: ignore[union-attr]


def test_the_kinds_say_something_else_than_everything_kept(double: Any, shipments: dict[str, RuledShipment]) -> None:
    """Or the comparisons above would prove little."""
    made = {}
    for kind, shipment in shipments.items():
        twin, token = TwinDecoding(double, shipment), shipment.prompt.first_token
        for step in range(STEPS):
            logits = twin.step(token)
            token = 20 + step
        made[kind] = logits
    for kind, logits in made.items():
        assert same(logits, made["nothing"]) == (kind == "nothing")


def decode(engine: Any, batch: list[Sequence], steps: int) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in batch]
    for _ in range(steps):
        advance(batch, engine.step(batch))
        for tokens, each in zip(made, batch, strict=True):
            tokens.append(each.last_token)
    return made


def test_all_kinds_in_one_batch_say_what_each_says_alone(single: Noting, shipments: dict[str, RuledShipment]) -> None:
    pool = POOLS["slabs"](LAYOUT, 1 << 20)
    engine = EagerEngine(single, pool)  # type: ignore[arg-type]
    alone = [decode(engine, [shipment.installed(pool, STEPS)], STEPS)[0] for shipment in shipments.values()]
    together = decode(engine, [shipment.installed(pool, STEPS) for shipment in shipments.values()], STEPS)
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) > len(alone) // 2


def test_a_graph_engine_steps_a_batch_with_evictions_eagerly(
    checkpoint: Path, single: Noting, shipments: dict[str, RuledShipment]
) -> None:
    """And goes back to its graphs as soon as the last of them has left; nobody notices."""
    kinds = ["nothing", "h2o", "sharer", "tidal"]
    slabs = POOLS["slabs"](LAYOUT, 1 << 20)
    eager = EagerEngine(single, slabs)  # type: ignore[arg-type]
    expected = [decode(eager, [shipments[kind].installed(slabs, STEPS)], STEPS)[0] for kind in kinds]
    pool = block_pool(LAYOUT, 1 << 20, block_size=4, max_num_seqs=4)
    poison(pool)
    engine = GraphEngine(load_decode_model(checkpoint, dtype=torch.float32, device=CPU), pool, max_num_seqs=4)
    batch = [shipments[kind].installed(pool, STEPS) for kind in kinds]
    made = decode(engine, batch[:1], 3)[0]
    for place, tokens in enumerate(decode(engine, batch, STEPS - 3)):
        assert (made + tokens if place == 0 else tokens) == expected[place][: STEPS - (0 if place == 0 else 3)]
    decode(engine, batch[1:], 3)
    pool.tables.check_integrity()
    plain = shipments["nothing"].installed(pool, STEPS)
    assert decode(engine, [plain], STEPS)[0] == expected[0]


ROOM = 300
# rows of each layer after so many tokens, and one more before the last old one goes
MOST_ROWS = {
    "nothing": (len(KEPT) + ROOM,) * 3,
    "elastic": (69, 69, 69),
    "prefix": (137, 69, 114),
    "h2o": (len(KEPT) + 1,) * 3,
    "d2o": (len(KEPT) + 1, len(KEPT) + 4, len(KEPT) + 7),
    "slide": (len(KEPT) + 7,) * 3,
    "tgv": (137, 69, 114),
    "sharer": (len(KEPT) + ROOM, 0, 0),
}


@pytest.mark.parametrize("kind", MOST_ROWS)
def test_memory_is_what_the_rows_need_and_no_more(shipments: dict[str, RuledShipment], pool: Pool, kind: str) -> None:
    each = shipments[kind].installed(pool, ROOM)
    most = [rows for rows in MOST_ROWS[kind] for _ in range(LAYOUT.num_kv_heads)]
    more = [rows - kept for rows, kept in zip(most, shipments[kind].num_kept, strict=True)]
    assert pool.used_bytes == aligned(pool.sequence_bytes(shipments[kind].num_kept, more))
    assert each.kv.room == ROOM
