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
from decode_worker.eviction.kinds import opened
from decode_worker.kv_pool.base import Allocation, KVPool, growth_of
from decode_worker.sequence import Sequence, resumed
from shared.errors import ResourceExhaustedError
from shared.kv.manifest import Manifest
from shared.model.sampler import Drawn


@dataclass(eq=False, kw_only=True)
class Track:
    """One way of decoding a parcel: freely, or along given tokens.

    Attributes:
        manifest: Of a parcel whose sampling ignores the end of an answer: the track knows when it ends.
        along: What is fed, whatever the logits say, from the first token on; None feeds what is drawn.
        drawn: What the parcel brings of the answer, then what each step drew.
        log_probabilities: Per step, of the token that was fed next.
    """

    manifest: Manifest
    body: memoryview
    eos_token_ids: frozenset[int]
    along: tuple[int, ...] | None = None
    drawn: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for token in self.manifest.generated:
            if not (self.drawn and self.ended):
                self.drawn.append(token)

    @property
    def last_fed(self) -> int:
        """The token that goes in next."""
        return self.drawn[-1] if self.along is None else self.along[len(self.drawn) - 1]

    @property
    def ended(self) -> bool:
        """Whether there is nothing to draw any more."""
        if self.along is not None:
            return len(self.drawn) == len(self.along)
        return self.drawn[-1] in self.eos_token_ids or len(self.drawn) == self.manifest.sampling.max_new_tokens


@dataclass(eq=False, kw_only=True)
class _Running:
    track: Track
    sequence: Sequence
    allocation: Allocation


class LocalDecoding:
    """The decode half: pool, engine and batch. One thread."""

    def __init__(self, model: PreTrainedModel, pool: KVPool[Any, Any], *, max_num_seqs: int) -> None:
        self._pool = pool
        self._engine = EagerEngine(model, pool)
        self._max_num_seqs = max_num_seqs
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
        return max(0, self._max_num_seqs - len(self._waiting) - len(self._running))

    def add(self, track: Track) -> None:
        """The track, which has not ended, begins when there is a place and memory."""
        self._waiting.append(track)

    @torch.inference_mode()
    def step(self) -> list[Track]:
        """One step of all that fit; returns the tracks that ended with it."""
        self._admit()
        drawn = self._engine.step([each.sequence for each in self._running])
        for each, token in zip(self._running, drawn, strict=True):
            each.track.drawn.append(token.token)
        fed = [each.track.last_fed for each in self._running]
        for each, fed_token, chance in zip(self._running, fed, self._chances(fed), strict=True):
            each.track.log_probabilities.append(chance)
            each.sequence.accept(Drawn(fed_token))
        return self._let_go()

    def _chances(self, tokens: list[int]) -> list[float]:
        chosen = torch.tensor(tokens, device=self._logits.device)[:, None]
        return self._logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()

    def _keep_logits(self, model: object, inputs: object, output: Any) -> None:
        self._logits = output.logits[:, -1]

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            track = self._waiting[0]
            manifest, tokens = track.manifest, track.manifest.tokens_to_come
            rows, eviction = opened(manifest, track.body)
            try:
                nbytes = self._pool.sequence_bytes(manifest.num_kept, growth_of(tokens, eviction))
                allocation = self._pool.allocate(nbytes)
            except ResourceExhaustedError:
                if not self._running:
                    raise
                return
            self._waiting.popleft()
            kv = self._pool.install(allocation, manifest.num_kept, rows, tokens, eviction)
            sequence = Sequence.from_manifest(manifest, kv, resumed(manifest, frozenset()))
            sequence.last_token = track.last_fed
            self._running.append(_Running(track=track, sequence=sequence, allocation=allocation))

    def _let_go(self) -> list[Track]:
        ended = [each for each in self._running if each.track.ended]
        self._running = [each for each in self._running if not each.track.ended]
        for each in ended:
            self._pool.free(each.allocation)
        return [each.track for each in ended]
