"""A sequence in the running batch, as the step thread sees it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import islice

from vlcache.v1 import inference_pb2 as public

from decode_worker.kv_pool.base import SequenceKV
from shared.kv.manifest import Manifest
from shared.model.grammar import Grammar
from shared.model.sampler import Drawn, Sampler
from shared.request.sampling import Sampling
from shared.telemetry.scope import NOBODY, Scope

FinishReason = public.FinishReason


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One request's token stream. Touched by the step thread only, from joining to leaving.

    `next_position` is the RoPE position of the token that goes in next; it starts at the original prompt length,
    whatever compression kept.

    `known` are tokens of the answer that a lost worker drew: they are taken before anything is drawn here, and nobody
    is sent them again. `known_since` is when they were named, `waits_since` when it last asked for a place in the
    batch, `runs_since` when it got the first one (0 before), in monotonic seconds.
    """

    kv: SequenceKV
    sampler: Sampler
    last_token: int
    next_position: int
    generated: int = 1
    known: deque[int] = field(default_factory=deque)
    known_since: float = 0.0
    waits_since: float = 0.0
    runs_since: float = 0.0
    scope: Scope = NOBODY
    finish_reason: FinishReason = field(default=public.FINISH_REASON_UNSPECIFIED)

    @classmethod
    def from_manifest(cls, manifest: Manifest, kv: SequenceKV, sampler: Sampler, scope: Scope = NOBODY) -> Sequence:
        """A sequence that goes on after the tokens that came with the parcel, which the sampler was told."""
        return cls(
            kv=kv,
            sampler=sampler,
            last_token=manifest.generated[-1],
            next_position=manifest.next_position,
            generated=len(manifest.generated),
            scope=scope,
        )

    @property
    def sampling(self) -> Sampling:
        """How its tokens are drawn, and when it ends."""
        return self.sampler.sampling

    @property
    def replays(self) -> bool:
        """Whether known tokens go in many at a time; what an eviction does depends on every step before."""
        return bool(self.known) and self.kv.eviction is None

    def steps_ahead(self, number: int) -> list[Sequence]:
        """The next `number` steps as sequences of one batch; each feeds the token that the one before it made known."""
        tokens = [self.last_token, *islice(self.known, number - 1)]
        return [
            replace(
                self,
                kv=replace(self.kv, appended=self.kv.appended + ahead),
                last_token=token,
                next_position=self.next_position + ahead,
            )
            for ahead, token in enumerate(tokens)
        ]

    def recall(self) -> int:
        """Takes the next known token, as `accept` does; none of them ends the answer, for it went on."""
        token = self.known.popleft()
        self._advance(token)
        return token

    def accept(self, drawn: Drawn) -> None:
        """Takes the token that a step produced."""
        self._advance(drawn.token)
        if self.sampler.ended:
            self.finish_reason = public.FINISH_REASON_STOP
        elif self.generated >= self.sampling.max_new_tokens:
            self.finish_reason = public.FINISH_REASON_LENGTH

    def _advance(self, token: int) -> None:
        self.sampler.push(token)
        self.last_token = token
        self.next_position += 1
        self.generated += 1


def resumed(manifest: Manifest, eos_token_ids: frozenset[int], grammar: Grammar | None = None) -> Sampler:
    """What goes on drawing an answer after the tokens that came with its parcel.

    Raises:
        InvalidRequestError: These break the sampling's constraint.
    """
    sampler = Sampler(manifest.sampling, eos_token_ids, manifest.prompt_token_ids, grammar)
    for token in manifest.generated:
        sampler.push(token)
    sampler.check()
    return sampler
