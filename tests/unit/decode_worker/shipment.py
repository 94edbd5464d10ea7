"""A prompt that is ready to be shipped, and the tokens that the decode worker must answer with."""

from __future__ import annotations

from typing import Any

from decode_worker.engine import EagerEngine
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.worker import LoadedModel
from shared.kv.manifest import Manifest, TransferId
from shared.request.sampling import Sampling
from tests.unit.decode_worker.parcels import body_of, manifest_of
from tests.unit.decode_worker.sequences import LAYOUT, Kept, Prefilled, advance, pooled, sequence, some
from tests.unit.decode_worker.serving import Served

MAX_NEW_TOKENS = 8


class Shipment:
    """Keeps different tokens in every layer and head of one prompt, unless `kept` says otherwise."""

    def __init__(self, prompt: Prefilled, loaded: LoadedModel, kept: Kept | None = None) -> None:
        self.prompt, self._loaded = prompt, loaded
        self._kept = kept or some(3, prompt.num_tokens)
        self.num_kept = [len(indices) for heads in self._kept for indices in heads]
        self.body = body_of(prompt.rows(self._kept), LAYOUT)
        self.expected = self.tokens()

    def manifest(self, request_id: str = "r", attempt: int = 1, **changes: Any) -> Manifest:
        truth = {
            "transfer": TransferId(request_id=request_id, attempt=attempt, prefill_epoch="prefill"),
            "compatibility": self._loaded.identity.compatibility,
            "logical_length": self.prompt.num_tokens,
            "next_position": self.prompt.num_tokens,
            "generated": (self.prompt.first_token,),
            "sampling": Sampling(max_new_tokens=MAX_NEW_TOKENS, ignore_eos=True),
        }
        return manifest_of(LAYOUT, self.num_kept, self.body, **(truth | changes))

    def tokens(self, steps: int = MAX_NEW_TOKENS - 1, **sampling: Any) -> list[int]:
        """What follows the first token, computed without a worker."""
        pool = SlabPool(1 << 20, LAYOUT)
        engine = EagerEngine(self._loaded.model, pool)
        each = sequence(self.prompt, pooled(pool, self.prompt, self._kept, steps), steps, **sampling)
        made = []
        for _ in range(steps):
            advance([each], engine.step([each]))
            made.append(each.last_token)
        return made


async def answers(served: Served, token: bytes, shipment: Shipment) -> None:
    """Asserts that an installed sequence says what it must and then leaves nothing behind."""
    stream = served.stream()
    await stream.attach(7, token)
    assert await stream.tokens(7) == shipment.expected
    await served.nothing_is_held()
