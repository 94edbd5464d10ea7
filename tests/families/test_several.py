"""Several answers of one parcel, of which the first has tokens that were decoded ahead, in models of every family.

Where layers have windows, the first answer is further on than the others: each must see what is in its own sight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from decode_worker.arrivals import Arrivals
from decode_worker.engine import EagerEngine
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.promise import Promise
from decode_worker.reservations import Reservations
from decode_worker.sequence import Sequence, resumed
from prefill_worker.compression.policies.look_ahead import LookAheadPolicy
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity
from shared.request.params import Budget
from shared.request.sampling import Sampling
from tests.families.catalogue import FAMILIES
from tests.families.chats import inputs_of
from tests.families.oracle import Evicted, Oracle
from tests.families.prefilling import Prefilling
from tests.families.test_prefill_to_decode import CUT
from tests.unit.decode_worker.pools import Pool, block_pool, slab_pool
from tests.unit.decode_worker.sequences import advance
from tests.unit.decode_worker.test_engine import Recorded
from tests.unit.prefill_worker.pieces import job as plain_job

AHEAD, STEPS, RETENTION = 6, 8, 0.3
N = 3


def dropped(manifest: Manifest) -> Evicted:
    """Tokens that are not kept, per layer and head; those of an answer always are."""
    layout, prompt = manifest.layout, manifest.logical_length - manifest.fed
    bitmaps = np.frombuffer(b"".join(manifest.kept_tokens), np.uint8)
    bitmaps = bitmaps.reshape(layout.num_layers, layout.num_kv_heads, -1)
    kept = np.unpackbits(bitmaps, axis=2, count=prompt, bitorder="little")
    return [[np.flatnonzero(head == 0).tolist() for head in layer] for layer in kept]


def installed(pool: Pool, prefilling: Prefilling, manifest: Manifest, body: memoryview) -> dict[int, Sequence]:
    """By choice, as the worker does it."""
    identity = ModelIdentity.of("tiny", prefilling.loaded.folder, prefilling.spec)
    promise = Promise(pool=pool, identity=identity, new_tokens=None)
    wanted = promise.wanted(manifest.logical_length, manifest.sampling.max_new_tokens, dict.fromkeys(range(N), 0))
    reservation = Reservations(pool, lease_s=1.0).reserve(
        request_id=manifest.transfer.request_id,
        attempt=manifest.transfer.attempt,
        prefill_epoch=manifest.transfer.prefill_epoch,
        wanted=wanted,
        max_new_tokens=manifest.sampling.max_new_tokens,
        arena=None,
        now=0.0,
        delivered_tokens=dict.fromkeys(range(N), 0),
    )
    promise.check(reservation, manifest)
    arrival = promise.arrival(reservation, manifest)
    answers, arrivals = list(reservation.answers.values()), Arrivals(pool=pool, promise=promise)
    kvs = arrivals.copy(answers, arrival, manifest, body, verify=True, in_waves=False)
    return {
        choice: Sequence.from_manifest(alone, kvs[choice], resumed(alone, frozenset()))
        for choice, alone in arrival.alone.items()
    }


@pytest.mark.parametrize("family", FAMILIES, indirect=True, scope="session")
@pytest.mark.parametrize("storage", [slab_pool, block_pool], ids=["slabs", "blocks"])
def test_each_sees_what_a_masked_full_cache_shows(
    prefilling: Prefilling, decoder: Recorded, oracle: Oracle, storage: Any
) -> None:
    prompt = prefilling.prompt(CUT["images first"], STEPS + AHEAD)
    layout = prefilling.spec.layout
    body = memoryview(bytearray(layout.full_bytes(prompt.shape.num_tokens + AHEAD)))
    sampling = Sampling(max_new_tokens=STEPS + AHEAD, ignore_eos=True, temperature=1.0, seed=3, n=N)
    policy = LookAheadPolicy(tokens=AHEAD)
    work = dataclasses.replace(
        plain_job(), sampling=sampling, policy=policy, budget=Budget(retention=RETENTION), explain=True
    )
    complete = prefilling.compute.run(work, prompt, body, lambda _: None)
    assert complete is not None
    manifest = Manifest.from_proto(complete().to_proto())
    assert (manifest.choices, manifest.fed) == ((0, 1, 2), AHEAD)
    pool: Pool = storage(layout, 1 << 23)
    assert isinstance(pool, SlabPool) == (storage is slab_pool)
    sequences = installed(pool, prefilling, manifest, body[: manifest.body_bytes])
    engine, fed, evicted = EagerEngine(decoder, pool), list(manifest.generated), dropped(manifest)  # type: ignore[arg-type]
    made: dict[int, list[torch.Tensor]] = {choice: [] for choice in sequences}
    said = {choice: [each.last_token] for choice, each in sequences.items()}
    for _ in range(STEPS - 1):
        batch = list(sequences.values())
        advance(batch, engine.step(batch))
        for number, (choice, each) in enumerate(sequences.items()):
            made[choice].append(decoder.logits[number].double())
            said[choice].append(each.last_token)
    for choice, logits in made.items():
        oracle.prefill(inputs_of(prefilling.loaded, CUT["images first"]))
        position = prompt.next_position
        if choice == 0:
            for token in fed[:-1]:
                oracle.step(token, position, [[[]] * layout.num_kv_heads] * layout.num_layers)
                position += 1
        for step, found in enumerate(logits):
            expected = oracle.step(said[choice][step], position + step, evicted)
            assert (found - expected).abs().max() / expected.abs().max() < 2e-5, (choice, step)
