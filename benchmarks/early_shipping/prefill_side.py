"""What a prefill worker runs from a prompt to the commit of its parcel, over random weights."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from transformers import PreTrainedModel

from benchmarks.early_shipping.decode_side import CONTEXT, EPOCH, NoText, identity
from benchmarks.local_pipeline import local_job
from benchmarks.prefill_overhead import random_prompt
from benchmarks.random_llama import ModelConfig, build_model, twin
from prefill_worker import compute
from prefill_worker.compression.eviction import parcel_bound
from prefill_worker.compression.pipeline import statistics_for
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy
from prefill_worker.compute import Completion, PrefillCompute
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.job import Event, FirstToken, PrefillJob
from prefill_worker.kv_sender import KVSender, Ticket
from prefill_worker.parcel.early_rows import Early, EarlyRows
from shared.kv.arena import Slot
from shared.kv.extents import Extent
from shared.kv.manifest import TransferId
from shared.kv.transport.base import Parcel
from shared.kv.transport.grpc_stream import GrpcTransport
from shared.model.attention import PREFILL_ATTENTION
from shared.model.spec import VLMSpec
from shared.request.params import Budget
from shared.telemetry.metrics import PrefillMetrics

MAX_NEW_TOKENS = 8
LEASE_S = 3600.0
# Who holds all KV to the end, who drops it on the way, and who sends it then, too.
VARIANTS = ("held", "cascade", "early")


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One prompt.

    Attributes:
        pass_ms: From its begin to its first token.
        pass_cpu_ms: What of that the model thread computed.
        rows_cpu_ms: What of that went into choosing and copying rows that leave early.
        hand_over_ms: From there to the commit.
        kv_bytes: Of its parcel.
        early_bytes: Of rows that were handed over to the sender before the last layer.
        waves: In so many pieces.
    """

    pass_ms: float
    pass_cpu_ms: float
    rows_cpu_ms: float
    hand_over_ms: float
    kv_bytes: int
    early_bytes: int
    waves: int


class PrefillSide:
    """One prompt and one model. Lives on the event loop; computes in a thread, as the worker does."""

    def __init__(self, config: ModelConfig, *, prompt: int, rows: int, sharpness: float) -> None:
        model = build_model(config, positions=prompt + MAX_NEW_TOKENS)
        _sharpen(model, sharpness)
        self._engine, layout = PrefillEngine(twin(model, PREFILL_ATTENTION)), config.layout
        metrics = PrefillMetrics(worker="early-shipping", model="early-shipping")
        spec = VLMSpec(
            model_type="llama",
            image_token_id=0,
            num_query_heads=config.text.query_heads,
            context_tokens=CONTEXT,
            vocabulary=config.text.vocabulary,
            eos_token_ids=frozenset(),
            layout=layout,
        )
        parts = (self._engine, NoText(), spec, identity(layout, config.text.vocabulary), metrics)
        cascading = PrefillCompute(*parts, cascade=True)
        self._computes = {"held": PrefillCompute(*parts), "cascade": cascading, "early": cascading}
        self._senders = {
            variant: KVSender(epoch=EPOCH, metrics=metrics, ships_early=variant == "early") for variant in VARIANTS
        }
        self._prompt = random_prompt(prompt, rows, config.text.vocabulary)
        self._layout = layout
        self._model_thread, self._parcel_thread = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def density(self) -> float:
        """Share of the attention entries that count for `vl_cache`, mean over layers."""
        policy, shape = VLCache(), self._prompt.shape
        prefilled = self._engine.prefill(self._prompt, statistics_for(policy, shape), threading.Event())
        return statistics.fmean(1 - policy.sparsity(layer) for layer in prefilled.observed(shape))

    def reserved_bytes(self, policy: Policy, budget: Budget) -> int:
        """Enough for its parcel and answer."""
        return self._bound(local_job(policy, budget, max_new_tokens=MAX_NEW_TOKENS)) + self._layout.full_bytes(
            MAX_NEW_TOKENS
        )

    async def deliver(
        self, variant: str, policy: Policy, budget: Budget, *, request_id: str, token: str, address: str
    ) -> Delivery:
        """From the begin of the pass to the commit."""
        job = dataclasses.replace(
            local_job(policy, budget, max_new_tokens=MAX_NEW_TOKENS),
            transfer=TransferId(request_id=request_id, attempt=0, prefill_epoch=EPOCH),
        )
        ticket = Ticket(
            decode_worker="", address=address, token=bytes.fromhex(token), transport=GrpcTransport.name, lease_s=LEASE_S
        )
        body, first = memoryview(bytearray(self._bound(job))), _FirstToken()
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        _TimedRows.cpu_s = 0.0
        async with self._senders[variant].early(ticket, self._parcel_thread) as early:
            counted = _Counted(early) if early is not None else None
            run = partial(self._computes[variant].run, job, self._prompt, body, first.take, early=counted)
            with mock.patch.object(compute, "EarlyRows", _TimedRows):
                complete = await loop.run_in_executor(self._model_thread, first.awaited, run)
            assert complete is not None, "a first token ends no answer here"
            manifest = await loop.run_in_executor(self._parcel_thread, complete)
            slot = Slot(Extent(0, manifest.body_bytes), 0)
            parcel = Parcel(manifest=manifest, body=body[: manifest.body_bytes], slot=slot)
            await self._senders[variant].send(parcel, ticket, early)
        return Delivery(
            pass_ms=1000 * (first.at - started),
            pass_cpu_ms=1000 * first.cpu_s,
            rows_cpu_ms=1000 * _TimedRows.cpu_s,
            hand_over_ms=1000 * (time.perf_counter() - first.at),
            kv_bytes=manifest.kv_bytes,
            early_bytes=counted.nbytes if counted else 0,
            waves=counted.waves if counted else 0,
        )

    async def close(self) -> None:
        """Ends threads and channels."""
        for sender in self._senders.values():
            await sender.close()
        self._model_thread.shutdown()
        self._parcel_thread.shutdown()

    def _bound(self, job: PrefillJob) -> int:
        shape = self._prompt.shape
        rows = job.rows_bound(shape.num_tokens - shape.num_visual, shape.num_visual)
        return parcel_bound(job.policy, self._layout, rows)


class _TimedRows(EarlyRows):
    """Sums up the CPU time of one pass."""

    cpu_s = 0.0

    def passed(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], held: Sequence[torch.Tensor]
    ) -> None:
        started = time.thread_time()
        super().passed(keys, values, held)
        _TimedRows.cpu_s += time.thread_time() - started


class _FirstToken:
    """When it was there, and what CPU time the thread took until then. In the model thread."""

    at = cpu_s = 0.0

    def awaited(self, run: Callable[[], Completion | None]) -> Completion | None:
        """Runs what emits it."""
        self._cpu_started_s = time.thread_time()
        return run()

    def take(self, event: Event) -> None:
        """An event, perhaps it."""
        if isinstance(event, FirstToken):
            self.at, self.cpu_s = time.perf_counter(), time.thread_time() - self._cpu_started_s


class _Counted:
    """Hands waves on and counts them."""

    def __init__(self, early: Early) -> None:
        self._early = early
        self.waves = self.nbytes = 0

    def add(self, piece: Callable[[], memoryview]) -> None:
        self.waves += 1

        def counted() -> memoryview:
            data = piece()
            self.nbytes += len(data)
            return data

        self._early.add(counted)

    def placed(self, waves: bytes) -> None:
        self._early.placed(waves)


def _sharpen(model: PreTrainedModel, sharpness: float) -> None:
    """Random weights attend to everything alike; larger queries look at less."""
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter *= sharpness
