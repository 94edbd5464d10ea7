"""The serving code of both workers in one process, without router and network: for measuring answers.

Every stage is the one that serves: prompt building, prefill, selection, parcel, pool, decode steps.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlcache.v1 import inference_pb2 as public

from benchmarks.local_decoding import LocalDecoding, Track
from decode_worker.config import DecodeConfig
from decode_worker.worker import build_engine
from decode_worker.worker import load_model as load_decode
from prefill_worker.compression.eviction import parcel_bound
from prefill_worker.compression.policy import Policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.config import PrefillConfig
from prefill_worker.engine.engine import Prefilled
from prefill_worker.job import Compressed, Event, PrefillJob
from prefill_worker.kv_sender import Ticket
from prefill_worker.prompt import Prompt, PromptBuilder
from prefill_worker.worker import load_model as load_prefill
from shared.config import Dtype
from shared.kv.manifest import Manifest, TransferId
from shared.request.params import Budget, Guard
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics

NO_TICKET = Ticket(decode_worker="", address="", token=b"", transport="", lease_s=30.0)
TRANSFER = TransferId(request_id="local", attempt=0, prefill_epoch="local")
NO_GUARD = Guard()
MAX_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class LocalParcel:
    """What a decode worker would receive, and what the client would be told of it."""

    manifest: Manifest
    body: memoryview
    compression: public.Compression
    eos_token_ids: frozenset[int]

    def track(self, along: tuple[int, ...] | None = None) -> Track:
        """A way to decode it, not begun yet."""
        return Track(manifest=self.manifest, body=self.body, eos_token_ids=self.eos_token_ids, along=along)


class LocalPipeline:
    """One model with both workers' engines.

    Attributes:
        decoding: The decode side; takes the tracks of this pipeline's parcels.
        sharing: Which layers of the model may share KV.
    """

    def __init__(self, model: str, *, dtype: Dtype, threads: int, kv_memory_mib: int, max_num_seqs: int) -> None:
        prefill = load_prefill(PrefillConfig(model=model, dtype=dtype, threads=threads))
        decode_config = DecodeConfig(
            model=model, dtype=dtype, threads=threads, kv_memory_mib=kv_memory_mib, max_num_seqs=max_num_seqs
        )
        decode = load_decode(decode_config)
        self._tokenizer: Any = prefill.processor.tokenizer
        self._spec = prefill.spec
        self.sharing = prefill.sharing
        self._builder = PromptBuilder(prefill.processor, prefill.spec, max_images=MAX_IMAGES)
        metrics = PrefillMetrics(worker="local", model="local")
        self._compute = PrefillCompute(prefill.engine, self._tokenizer, prefill.spec, prefill.identity, metrics)
        pool, _ = build_engine(decode_config, decode)
        self.decoding = LocalDecoding(decode.model, pool, max_num_seqs=max_num_seqs)

    def build(self, messages: list[public.Message], *, max_new_tokens: int) -> Prompt:
        """The prompt of a conversation."""
        return self._builder.build(messages, max_new_tokens=max_new_tokens)

    def prefill(self, prompt: Prompt, jobs: Sequence[PrefillJob]) -> Prefilled:
        """One pass that can be compressed for every one of the jobs."""
        return self._compute.prefill(jobs, prompt, threading.Event())

    def compress(self, prompt: Prompt, prefilled: Prefilled, job: PrefillJob) -> LocalParcel:
        """The parcel of a `local_job`."""
        events: list[Event] = []
        body = self._room(job, prompt)

        def more_room(budget: Budget) -> memoryview:
            nonlocal body
            body = self._room(replace(job, budget=budget), prompt)
            return body

        complete = self._compute.compress(job, prompt, prefilled, body, events.append, more_room)
        assert complete is not None, "no first token ends an answer that ignores the end"
        manifest, compressed = complete(), events[-1]
        assert isinstance(compressed, Compressed)
        return LocalParcel(
            manifest=manifest,
            body=body[: manifest.body_bytes],
            compression=compressed.message,
            eos_token_ids=self._spec.eos_token_ids,
        )

    def _room(self, job: PrefillJob, prompt: Prompt) -> memoryview:
        visual = prompt.shape.num_visual
        rows = job.rows_bound(prompt.shape.num_tokens - visual, visual)
        return memoryview(bytearray(parcel_bound(job.policy, self._spec.layout, rows)))

    def text(self, tokens: Sequence[int]) -> str:
        """What a client would read."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def local_job(policy: Policy, budget: Budget, *, max_new_tokens: int, guard: Guard = NO_GUARD) -> PrefillJob:
    """A request that has come without a router.

    Args:
        max_new_tokens: At least 2. Whoever decodes knows when the answer ends.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, ignore_eos=True)
    return PrefillJob(
        transfer=TRANSFER,
        messages=(),
        sampling=sampling,
        budget=budget,
        policy=policy,
        ticket=NO_TICKET,
        guard=guard,
    )
