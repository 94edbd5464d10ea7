"""Prompt to parcel to decode pool, through the code of both halves."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from decode_worker.engine import EagerEngine
from decode_worker.kv_pool.seen_rows import SeenRows
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.sequence import Sequence, resumed
from prefill_worker.prompt import Prompt
from shared.kv.manifest import Manifest
from shared.request.params import Budget
from shared.request.sampling import Sampling
from tests.families.chats import CHATS, SMALL, TALL, WIDE, Chat, asked, inputs_of
from tests.families.family import KV_HEADS, LAYERS
from tests.families.oracle import Evicted, Oracle
from tests.families.prefilling import Prefilling
from tests.unit.decode_worker.sequences import advance
from tests.unit.decode_worker.test_engine import Recorded
from tests.unit.prefill_worker.pieces import job as plain_job

STEPS = 10
# so many tokens that a tenth of them is more than every layer keeps anyway
LONG = "Zebras quiz my jovial fox. " * 9
CUT: dict[str, Chat] = {
    "images first": asked(TALL, SMALL, LONG),
    "image last": asked(LONG, WIDE),
    "text": asked(LONG),
}
# some of different lengths, which decode together
TOGETHER = ("tiles", "text", "several images", "image last")


class Decoding:
    """A decode pool that parcels of prompts come into."""

    def __init__(self, prefilling: Prefilling, decoder: Recorded) -> None:
        self._prefilling = prefilling
        self._layout = prefilling.spec.layout
        self._pool = SlabPool(1 << 22, self._layout)
        self.engine = EagerEngine(decoder, self._pool)  # type: ignore[arg-type]

    def bring(self, chat: Chat, retention: float) -> tuple[Prompt, Manifest, Sequence]:
        """A conversation's first token, and what follows it."""
        prompt = self._prefilling.prompt(chat, STEPS + 1)
        return prompt, *self.bring_prompt(prompt, retention)

    def bring_prompt(self, prompt: Prompt, retention: float) -> tuple[Manifest, Sequence]:
        """The same of a prompt that may show videos."""
        body = memoryview(bytearray(self._layout.full_bytes(prompt.shape.num_tokens)))
        sampling = Sampling(max_new_tokens=STEPS + 1, ignore_eos=True)
        work = dataclasses.replace(plain_job(), sampling=sampling, budget=Budget(retention=retention), explain=True)
        complete = self._prefilling.compute.run(work, prompt, body, lambda _: None)
        assert complete is not None
        manifest = Manifest.from_proto(complete().to_proto())
        manifest.check_digest(body[: manifest.body_bytes])
        allocation = self._pool.allocate(self._pool.sequence_bytes(manifest.num_kept, STEPS))
        kept = body[: manifest.body_bytes]
        kv = self._pool.install(allocation, manifest.num_kept, kept, STEPS, seen=SeenRows.of(manifest))
        return manifest, Sequence.from_manifest(manifest, kv, resumed(manifest, frozenset()))


def evicted_of(manifest: Manifest) -> Evicted:
    bitmaps = np.frombuffer(b"".join(manifest.kept_tokens), np.uint8).reshape(LAYERS, KV_HEADS, -1)
    kept = np.unpackbits(bitmaps, axis=2, count=manifest.logical_length, bitorder="little")
    return [[np.flatnonzero(head == 0).tolist() for head in layer] for layer in kept]


def test_at_retention_1_a_ragged_batch_gives_the_tokens_of_generate(prefilling: Prefilling, decoder: Any) -> None:
    decoding = Decoding(prefilling, decoder)
    batch = [decoding.bring(CHATS[kind], 1.0)[2] for kind in TOGETHER]
    answers = [[each.last_token] for each in batch]
    for _ in range(STEPS):
        advance(batch, decoding.engine.step(batch))
        for answer, each in zip(answers, batch, strict=True):
            answer.append(each.last_token)
    for kind, answer in zip(TOGETHER, answers, strict=True):
        assert answer == prefilling.loaded.answer(inputs_of(prefilling.loaded, CHATS[kind]), STEPS + 1)


@pytest.mark.parametrize("kind", CUT)
def test_at_retention_a_tenth_logits_are_those_of_a_masked_full_cache(
    prefilling: Prefilling, decoder: Recorded, oracle: Oracle, kind: str
) -> None:
    decoding = Decoding(prefilling, decoder)
    prompt, manifest, sequence = decoding.bring(CUT[kind], 0.1)
    assert manifest.realised_retention <= 0.1
    logits = oracle.prefill(inputs_of(prefilling.loaded, CUT[kind]))
    check_steps(decoding, decoder, oracle, prompt, manifest, sequence, logits)


def check_steps(
    decoding: Decoding,
    decoder: Recorded,
    oracle: Oracle,
    prompt: Prompt,
    manifest: Manifest,
    sequence: Sequence,
    logits: torch.Tensor,
) -> None:
    """Logits of the first token, [vocab], and of every step are the oracle's."""
    evicted = evicted_of(manifest)
    assert sequence.last_token == int(logits.argmax())
    for step in range(STEPS):
        token = sequence.last_token
        advance([sequence], decoding.engine.step([sequence]))
        expected = oracle.step(token, prompt.next_position + step, evicted)
        error = (decoder.logits[0].double() - expected).abs().max() / expected.abs().max()
        assert error < 2e-5
