"""Requests whose every row says whose it is and which, and whose answers are known beforehand."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import torch

from decode_worker.answers import Answer
from decode_worker.sequence import Sequence
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest, TransferId
from shared.model.sampler import Drawn
from shared.request.sampling import Sampling
from tests.unit.decode_worker.parcels import body_of, manifest_of
from tests.unit.decode_worker.pools import Pool
from tests.unit.decode_worker.serving import EPOCH

LAYOUT = KVLayout(num_layers=1, num_kv_heads=2, head_dim=4, dtype="float32")
FIRST_TOKEN, EOS = 5, 1


class MarkingEngine:
    """Writes rows that say whose they are and which, and reads all of a sequence's rows back at every step."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.fails = False
        self.batches: list[list[int]] = []

    def step(self, batch: list[Sequence]) -> list[Drawn]:
        self._fail()
        self.batches.append([each.sampling.seed for each in batch])
        attention = self._pool.attention([each.kv for each in batch])
        new = torch.stack([marked(each.sampling.seed, each.generated - 1)[-1:] for each in batch])
        key = new[:, None].expand(-1, LAYOUT.num_kv_heads, -1, -1)
        attention.attend(0, torch.zeros(len(batch), 4, 1, LAYOUT.head_dim), key, -key, None, 1.0)
        for each in batch:
            each.kv.appended += 1
            assert bytes(self._pool.export(each.kv).body) == parcel_body(each.sampling.seed, each.generated)
        return [Drawn(answer(each.sampling.seed)[each.generated - 1]) for each in batch]

    def replay(self, each: Sequence, number: int) -> None:
        self._fail()
        steps, last = each.steps_ahead(number), each.generated - 1 + number
        assert [step.last_token for step in steps[1:]] == answer(each.sampling.seed)[each.generated - 1 : last - 1]
        attention = self._pool.replay([step.kv for step in steps])
        new = marked(each.sampling.seed, last - 1)[-number:]
        key = new[:, None, None].expand(-1, LAYOUT.num_kv_heads, -1, -1)
        attention.attend(0, torch.zeros(number, 4, 1, LAYOUT.head_dim), key, -key, None, 1.0)
        each.kv.appended += number
        assert bytes(self._pool.export(each.kv).body) == parcel_body(each.sampling.seed, last)

    def _fail(self) -> None:
        if self.fails:
            self.fails = False
            raise RuntimeError("a bug")


def num_kept(seed: int) -> tuple[int, int]:
    return 1 + seed % 5, 1 + seed * 3 % 7


def marked(seed: int, appended: int, kept: int = 0) -> torch.Tensor:
    """Rows of a KV head, [kept + 1 + appended, head_dim]; the generated ones are marked by their number."""
    marks = [*range(1000, 1000 + kept), *range(1 + appended)]
    return (torch.tensor(marks, dtype=torch.float32) + seed * 2000)[:, None].repeat(1, LAYOUT.head_dim)


def parcel_body(seed: int, appended: int) -> bytes:
    """K and V of both heads after so many steps; V is -K."""
    heads = [torch.cat([marked(seed, -1, kept), marked(seed, appended - 1)]) for kept in num_kept(seed)]
    return bytes(body_of([(rows, -rows) for rows in heads], LAYOUT))


def answer(seed: int) -> list[int]:
    """What a sequence says after its first token; some end by themselves."""
    tokens = [10 + (7 * seed + number) % 80 for number in range(100)]
    return [*tokens[: seed % 11 + 1], EOS] if seed % 4 == 3 else tokens


def whole_answer(seed: int, max_new_tokens: int) -> list[int]:
    """All that is said after the first token."""
    said = answer(seed)[: max_new_tokens - 1]
    return said[: said.index(EOS) + 1] if EOS in said else said


@dataclass(eq=False)
class Client:
    """One request, its reader and what it heard; of its answer it has `known` tokens beside the first already."""

    seed: int
    max_new_tokens: int
    token: bytes
    stream: int
    held: Answer
    known: int = 0
    put: asyncio.Task[Any] | None = None
    attached: bool = False
    left: bool = False
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    error: str = ""

    @property
    def expected(self) -> list[int]:
        return whole_answer(self.seed, self.max_new_tokens)[self.known :]

    @property
    def delivered(self) -> bool:
        return self.held.sequence is not None


def manifest_for(client: Client) -> Manifest:
    """Of the parcel that belongs to a reservation."""
    return manifest_of(
        LAYOUT,
        num_kept(client.seed),
        memoryview(parcel_body(client.seed, 0)),
        transfer=TransferId(request_id=str(client.seed), attempt=1, prefill_epoch=EPOCH),
        generated=(FIRST_TOKEN,),
        sampling=Sampling(max_new_tokens=client.max_new_tokens, seed=client.seed),
    )
