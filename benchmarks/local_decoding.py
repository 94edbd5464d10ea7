"""Decodes parcels as a decode worker does, in one ragged batch that is refilled, and looks at the logits on the way.

The engine and the pool are the worker's. The logits are read off the model that the engine runs, by a hook.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from decode_worker.engine import EagerEngine
from decode_worker.kv_pool.base import Allocation, KVPool
from decode_worker.sequence import Sequence
from shared.errors import ResourceExhaustedError
from shared.kv.manifest import Manifest


@dataclass(eq=False, kw_only=True)
class Track:
    """One way of decoding a parcel: freely, or along given tokens.

    Attributes:
        along: What is fed, whatever the logits say, the first token included; None feeds what the steps draw.
        drawn: The parcel's first token, then what each step drew.
        log_probabilities: Per step, of the token that was fed next.
    """

    manifest: Manifest
    body: memoryview
    along: tuple[int, ...] | None = None
    drawn: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.drawn += self.manifest.generated

    def next_token(self, drawn: int) -> int:
        """Takes what a step drew; returns what is fed next."""
        self.drawn.append(drawn)
        return drawn if self.along is None else self.along[len(self.drawn) - 1]


@dataclass(eq=False, kw_only=True)
class _Running:
    track: Track
    sequence: Sequence
    allocation: Allocation


class LocalDecoding:
    """The decode half: pool, engine and batch. One thread."""

    def __init__(
        self, model: PreTrainedModel, pool: KVPool[Any, Any], eos_token_ids: frozenset[int], *, max_batch: int
    ) -> None:
        self._pool = pool
        self._engine = EagerEngine(model, pool)
        self._eos_token_ids = eos_token_ids
        self._max_batch = max_batch
        self._waiting: deque[Track] = deque()
        self._running: list[_Running] = []
        self._logits = torch.empty(0)
        model.register_forward_hook(self._keep_logits)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to decode."""
        return not (self._waiting or self._running)

    @property
    def num_places(self) -> int:
        """Tracks that would find a place in the batch."""
        return max(0, self._max_batch - len(self._waiting) - len(self._running))

    def add(self, track: Track) -> None:
        """The track begins when there is a place and memory."""
        self._waiting.append(track)

    @torch.inference_mode()
    def step(self) -> list[Track]:
        """One step of all that fit; returns the tracks that ended with it."""
        self._admit()
        drawn = self._engine.step([each.sequence for each in self._running])
        fed = [each.track.next_token(token) for each, token in zip(self._running, drawn, strict=True)]
        chances = self._logits.float().log_softmax(dim=-1)
        chosen = chances.gather(1, torch.tensor(fed, device=chances.device)[:, None])[:, 0].tolist()
        for each, token, chance in zip(self._running, fed, chosen, strict=True):
            each.track.log_probabilities.append(chance)
            each.sequence.accept(token)
        return self._let_go()

    def _keep_logits(self, model: object, inputs: object, output: Any) -> None:
        self._logits = output.logits[:, -1]

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_batch:
            track = self._waiting[0]
            manifest, growth = track.manifest, track.manifest.sampling.max_new_tokens - 1
            try:
                allocation = self._pool.allocate(self._pool.sequence_bytes(manifest.num_kept, growth))
            except ResourceExhaustedError:
                if not self._running:
                    raise
                return
            self._waiting.popleft()
            kv = self._pool.install(allocation, manifest.num_kept, track.body, growth)
            sequence = Sequence.from_manifest(manifest, kv, self._eos_token_ids)
            self._running.append(_Running(track=track, sequence=sequence, allocation=allocation))

    def _let_go(self) -> list[Track]:
        ended = [each for each in self._running if each.sequence.finish_reason]
        self._running = [each for each in self._running if not each.sequence.finish_reason]
        for each in ended:
            self._pool.free(each.allocation)
        return [each.track for each in ended]
