"""A sequence in the running batch, as the step thread sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlcache.v1 import inference_pb2 as public

from decode_worker.kv_pool.base import SequenceKV
from shared.kv.manifest import Manifest
from shared.request.params import Sampling

FinishReason = public.FinishReason


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One request's token stream. Touched by the step thread only, from joining to leaving.

    `next_position` is the RoPE position of the token that goes in next; it starts at the original prompt length,
    whatever compression kept.
    """

    kv: SequenceKV
    sampling: Sampling
    eos_token_ids: frozenset[int]
    last_token: int
    next_position: int
    generated: int = 1
    finish_reason: FinishReason = field(default=public.FINISH_REASON_UNSPECIFIED)

    @classmethod
    def from_manifest(cls, manifest: Manifest, kv: SequenceKV, eos_token_ids: frozenset[int]) -> Sequence:
        """A sequence that goes on after the tokens that came with the parcel."""
        return cls(
            kv=kv,
            sampling=manifest.sampling,
            eos_token_ids=eos_token_ids,
            last_token=manifest.generated[-1],
            next_position=manifest.next_position,
            generated=len(manifest.generated),
        )

    def accept(self, token: int) -> None:
        """Takes the token that a step produced."""
        self.last_token = token
        self.next_position += 1
        self.generated += 1
        if token in self.eos_token_ids and not self.sampling.ignore_eos:
            self.finish_reason = public.FINISH_REASON_STOP
        elif self.generated >= self.sampling.max_new_tokens:
            self.finish_reason = public.FINISH_REASON_LENGTH
