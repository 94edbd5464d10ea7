"""Builds a decode worker from its configuration: what depends on what, in one place."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from transformers import PreTrainedModel
from vlcache.worker.v1 import decode_pb2_grpc, worker_pb2

from decode_worker.answers import Stage
from decode_worker.arena_directory import ArenaDirectory
from decode_worker.config import DecodeConfig
from decode_worker.engine import DecodeEngine, EagerEngine
from decode_worker.graph_engine import GraphEngine
from decode_worker.kv_pool.base import KVPool
from decode_worker.kv_pool.blocks import BlockPool
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.kv_receiver import SERVICE_NAME as TRANSFER_SERVICE_NAME
from decode_worker.kv_receiver import KVReceiver
from decode_worker.reservations import Reservations
from decode_worker.runner import DecodeRunner
from decode_worker.scheduler import DecodeScheduler, StepOutcome
from decode_worker.service import SERVICE_NAME, DecodeServicer
from shared.kernels.dispatch import kernels_for
from shared.model.checkpoint import open_checkpoint
from shared.model.identity import ModelIdentity
from shared.model.loading import load_decode_model, load_tokenizer
from shared.model.spec import VLMSpec
from shared.rpc.lifecycle import new_epoch
from shared.rpc.options import MAX_CONTROL_BYTES, MIB
from shared.telemetry.metrics import DecodeMetrics
from shared.telemetry.tracer import open_tracer

EXPIRY_PERIOD_S = 0.5


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Everything that comes from the checkpoint: the language model and the tokenizer, no vision."""

    model: PreTrainedModel
    tokenizer: Any
    spec: VLMSpec
    identity: ModelIdentity


def load_model(config: DecodeConfig) -> LoadedModel:
    """Loads the checkpoint. Takes seconds; nothing is served before.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        UnsupportedModelError: Its architecture cannot be served.
    """
    checkpoint = open_checkpoint(config)
    return LoadedModel(
        model=load_decode_model(checkpoint.path, dtype=checkpoint.dtype, device=checkpoint.device),
        tokenizer=load_tokenizer(checkpoint.path),
        spec=checkpoint.spec,
        identity=checkpoint.identity,
    )


def build_engine(config: DecodeConfig, model: LoadedModel) -> tuple[KVPool[Any, Any], DecodeEngine]:
    """The KV pool and the steps over it that suit the device; takes all memory that decoding will need."""
    capacity, layout, device = config.kv_memory_mib * MIB, model.identity.layout, model.model.device
    if device.type == "cpu":
        slabs = SlabPool(capacity, layout)
        return slabs, EagerEngine(model.model, slabs)
    blocks = BlockPool(
        capacity,
        layout,
        device=device,
        kernels=kernels_for(device),
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_tokens=model.identity.context_tokens,
    )
    return blocks, GraphEngine(model.model, blocks, max_num_seqs=config.max_num_seqs)


class DecodeWorker:
    """A ready worker over what `build_engine` made; must be built on the event loop that it serves on.

    Args:
        epoch: Boot id of the process, shared with a prefill half that lives in it; a new one without it.
    """

    role = "decode"
    services = (SERVICE_NAME, TRANSFER_SERVICE_NAME)
    max_request_bytes = MAX_CONTROL_BYTES

    def __init__(
        self,
        config: DecodeConfig,
        model: LoadedModel,
        pool: KVPool[Any, Any],
        engine: DecodeEngine,
        *,
        epoch: str | None = None,
    ) -> None:
        self.name, self.listen = config.name, config.listen
        self.metrics = DecodeMetrics(worker=config.name, model=model.identity.name)
        self._tracer = open_tracer(config.otlp_endpoint, role=self.role, name=config.name)
        self._reservations = Reservations(pool, lease_s=config.lease_s)
        self.runner = DecodeRunner(
            pool=pool,
            reservations=self._reservations,
            identity=model.identity,
            tokenizer=model.tokenizer,
            eos_token_ids=model.spec.eos_token_ids,
            promised_tokens=config.promised_tokens,
            metrics=self.metrics,
        )
        loop = asyncio.get_running_loop()

        def deliver(outcome: StepOutcome) -> None:
            loop.call_soon_threadsafe(self.runner.deliver, outcome)

        scheduler = DecodeScheduler(engine, deliver, max_num_seqs=config.max_num_seqs, metrics=self.metrics)
        self.runner.connect(scheduler)
        self._arenas = ArenaDirectory() if config.transport == "auto" else None
        self.receiver = KVReceiver(self.runner, self._reservations, model.identity.layout)
        self.servicer = DecodeServicer(
            name=config.name,
            epoch=epoch or new_epoch(),
            identity=model.identity,
            pool=pool,
            reservations=self._reservations,
            runner=self.runner,
            scheduler=scheduler,
            arenas=self._arenas,
            step_timeout_s=config.step_timeout_s,
            tracer=self._tracer,
        )
        self._expiry = loop.create_task(self._expire_leases())
        for stage in Stage:
            self.metrics.watch_resident(stage.value, partial(self._reservations.bytes_in, stage))
        self.metrics.watch_resident("parked", lambda: self._reservations.parked_bytes)
        self.metrics.orphan_bytes.set_function(lambda: self._reservations.orphan_bytes)
        self.metrics.saved_bytes.set_function(lambda: self._reservations.saved_bytes)
        self.metrics.cache_usage.set_function(lambda: pool.used_bytes / pool.capacity)
        self.metrics.fragmentation.set_function(lambda: pool.fragmentation)
        self.metrics.requests_running.set_function(lambda: scheduler.running)
        self.metrics.requests_waiting.set_function(lambda: self.runner.waiting)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the worker's services to a server."""
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self.servicer, server)
        self.receiver.register(server)

    def info(self) -> worker_pb2.WorkerInfo:
        """Who it is and how loaded it is now."""
        return self.servicer.info()

    async def drain(self, timeout_s: float) -> None:
        """Refuses new reservations and lets the others finish for `timeout_s`."""
        self.servicer.start_draining()
        await self.runner.drain(timeout_s)

    async def close(self) -> None:
        """Gives everything back; the worker was drained."""
        self._expiry.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._expiry
        self.runner.close()
        if self._arenas:
            self._arenas.close()
        await self._tracer.close()
        self.runner.check_integrity()

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_PERIOD_S)
            self.runner.expire(time.monotonic())
