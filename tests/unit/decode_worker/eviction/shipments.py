"""A prompt whose parcel says how to evict, and what must be answered with it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from decode_worker.engine import forward
from decode_worker.eviction.kinds import opened
from decode_worker.kv_pool.base import SequenceKV, growth_of
from decode_worker.sequence import Sequence, resumed
from shared.kv.eviction import Eviction
from shared.kv.manifest import Manifest, TransferId
from shared.request.sampling import Sampling
from tests.unit.decode_worker.eviction.twin import Twin
from tests.unit.decode_worker.parcels import body_of, manifest_of
from tests.unit.decode_worker.pools import Pool
from tests.unit.decode_worker.sequences import LAYOUT, Kept, Prefilled


class RuledShipment:
    """Some of a prompt, alike in all heads and layers that keep rows, so that every kind is possible."""

    def __init__(self, prompt: Prefilled, positions: Items[int], eviction: Eviction | None) -> None:
        self.prompt, self.eviction = prompt, eviction
        empty = eviction.empty_layers if eviction is not None else ()
        layers = ([] if layer in empty else [*positions] for layer in range(LAYOUT.num_layers))
        kept: Kept = [[places] * LAYOUT.num_kv_heads for places in layers]
        self._pairs = prompt.rows(kept)
        self.num_kept = [len(keys) for keys, _ in self._pairs]
        self.body, self._scores = body_of(self._pairs, LAYOUT), np.zeros(0, dtype=np.float32)
        if eviction is not None and eviction.carries_scores:
            self._scores = np.random.default_rng(5).random(sum(self.num_kept), dtype=np.float32)
            self.body += self._scores.tobytes()

    def manifest(self, name: str = "r", **changes: Any) -> Manifest:
        truth = {
            "transfer": TransferId(request_id=name, attempt=1, prefill_epoch="prefill"),
            "logical_length": self.prompt.num_tokens,
            "next_position": self.prompt.num_tokens,
            "generated": (self.prompt.first_token,),
            "eviction": self.eviction,
        }
        manifest = manifest_of(LAYOUT, self.num_kept, self.body, **(truth | changes))
        return manifest if "digest" in changes else replace(manifest, digest=manifest.digest_of(memoryview(self.body)))

    def twin(self) -> Twin:
        return Twin(self.eviction, self._pairs, LAYOUT.num_layers, self.prompt.num_tokens, self._scores.tolist())

    def installed(self, pool: Pool, room: int) -> Sequence:
        """As the worker does it; for ever."""
        manifest = self.manifest(sampling=Sampling(max_new_tokens=room + 1, ignore_eos=True))
        rows, eviction = opened(manifest, memoryview(self.body))
        allocation = pool.allocate(pool.sequence_bytes(self.num_kept, growth_of(room, eviction)))
        kv = pool.install(allocation, self.num_kept, rows, room, eviction)
        return Sequence.from_manifest(manifest, kv, resumed(manifest, frozenset()))


class TwinDecoding:
    """The whole language model over a twin's caches, one sequence, in double precision."""

    def __init__(self, model: PreTrainedModel, shipment: RuledShipment) -> None:
        self._model, self.twin = model, shipment.twin()
        self._position = shipment.prompt.num_tokens

    @torch.inference_mode()
    def step(self, token: int) -> torch.Tensor:
        """Logits after a token, [vocab]."""
        logits = forward(self._model, torch.tensor([[token]]), torch.tensor([[self._position]]), self.twin)
        self.twin.complete()
        self._position += 1
        return logits[0]


def orders(kv: SequenceKV) -> list[list[int]]:
    """Which tokens each layer and KV head still has, as `Twin.orders` says it."""
    if kv.eviction is None:
        return [[*range(-kept, kv.appended)] for kept in kv.kept.ravel().tolist()]
    arrival, lengths = kv.eviction.rows.arrival.flatten(0, 1), kv.lengths.ravel().tolist()
    return [sorted(arrival[head, :length].tolist()) for head, length in enumerate(lengths)]
