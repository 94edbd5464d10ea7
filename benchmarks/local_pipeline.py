"""The serving code of both workers in one process, without router and network: for measuring answers.

Every stage is the one that serves: prompt building, prefill, selection, parcel, pool, decode steps.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from vlcache.v1 import inference_pb2 as public

from decode_worker.config import DecodeConfig
from decode_worker.kv_pool.base import Allocation
from decode_worker.sequence import Sequence
from decode_worker.worker import build_engine
from decode_worker.worker import load_model as load_decode
from prefill_worker.compression.policy import Policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.config import PrefillConfig
from prefill_worker.job import Compressed, Event, FirstToken, PrefillJob
from prefill_worker.kv_sender import Ticket
from prefill_worker.prompt import Prompt, PromptBuilder
from prefill_worker.worker import load_model as load_prefill
from shared.kv.manifest import TransferId
from shared.request.params import Budget, Sampling
from shared.telemetry.metrics import PrefillMetrics

NO_TICKET = Ticket(decode_worker="", address="", token=b"", transport="", lease_s=30.0)
TRANSFER = TransferId(request_id="local", attempt=0, prefill_epoch="local")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one question got. `compression` is None when the first token ended the answer."""

    tokens: tuple[int, ...]
    text: str
    compression: public.Compression | None


@dataclass(eq=False, kw_only=True)
class _Decoding:
    tokens: list[int]
    compression: public.Compression | None
    sequence: Sequence | None
    allocation: Allocation | None


class LocalPipeline:
    """Answers questions with one model; decodes many at once."""

    def __init__(self, model: str, *, dtype: str, threads: int, kv_memory_mib: int) -> None:
        prefill = load_prefill(PrefillConfig(model=model, dtype=dtype, threads=threads))  # type: ignore[arg-type]
        decode_config = DecodeConfig(model=model, dtype=dtype, threads=threads, kv_memory_mib=kv_memory_mib)  # type: ignore[arg-type]
        decode = load_decode(decode_config)
        self._tokenizer = prefill.processor.tokenizer
        self._spec = prefill.spec
        self._builder = PromptBuilder(prefill.processor, prefill.spec, max_images=16)
        metrics = PrefillMetrics(worker="local", model="local")
        self._compute = PrefillCompute(prefill.engine, self._tokenizer, prefill.spec, prefill.identity, metrics)
        self._pool, self._engine = build_engine(decode_config, decode)

    def build(self, messages: list[public.Message], *, max_new_tokens: int) -> Prompt:
        """The prompt of a conversation."""
        return self._builder.build(messages, max_new_tokens=max_new_tokens)

    def answer(self, prompts: Many[Prompt], policy: Policy, retention: float, max_new_tokens: int) -> list[Answer]:
        """Greedy answers: prompts are prefilled one by one and decoded as one ragged batch."""
        budget, sampling = Budget(retention=retention), Sampling(max_new_tokens=max_new_tokens)
        batch = [self._prefill(prompt, policy, budget, sampling) for prompt in prompts]
        self._decode([item for item in batch if item.sequence is not None])
        return [self._finish(item) for item in batch]

    def _prefill(self, prompt: Prompt, policy: Policy, budget: Budget, sampling: Sampling) -> _Decoding:
        job = PrefillJob(
            transfer=TRANSFER, messages=(), sampling=sampling, budget=budget, policy=policy, ticket=NO_TICKET
        )
        layout, events = self._spec.layout, list[Event]()
        visual = prompt.shape.num_visual
        bound = layout.full_bytes(budget.kept_tokens_bound(prompt.shape.num_tokens - visual, visual))
        body = memoryview(bytearray(bound))
        complete = self._compute.run(job, prompt, body, events.append)
        first = next(event for event in events if isinstance(event, FirstToken))
        compression = next((event.message for event in events if isinstance(event, Compressed)), None)
        if complete is None:
            return _Decoding(tokens=[first.token], compression=compression, sequence=None, allocation=None)
        manifest, growth = complete(), sampling.max_new_tokens - 1
        allocation = self._pool.allocate(self._pool.sequence_bytes(manifest.num_kept, growth))
        kv = self._pool.install(allocation, manifest.num_kept, body[: manifest.body_bytes], growth)
        sequence = Sequence.from_manifest(manifest, kv, self._spec.eos_token_ids)
        return _Decoding(tokens=[first.token], compression=compression, sequence=sequence, allocation=allocation)

    @torch.inference_mode()
    def _decode(self, batch: list[_Decoding]) -> None:
        running = batch
        while running:
            sequences = [item.sequence for item in running if item.sequence is not None]
            for item, sequence, token in zip(running, sequences, self._engine.step(sequences), strict=True):
                sequence.accept(token)
                item.tokens.append(token)
            running = [item for item in running if item.sequence is not None and not item.sequence.finish_reason]

    def _finish(self, item: _Decoding) -> Answer:
        if item.allocation is not None:
            self._pool.free(item.allocation)
        text = self._tokenizer.decode(item.tokens, skip_special_tokens=True)
        return Answer(tokens=tuple(item.tokens), text=text, compression=item.compression)
