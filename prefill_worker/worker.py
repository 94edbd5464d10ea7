"""Builds a prefill worker from its configuration: what depends on what, in one place."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from transformers import PreTrainedModel
from vlcache.worker.v1 import prefill_pb2_grpc, worker_pb2

from prefill_worker.compression.layer_sharing import LayerSharing
from prefill_worker.compression.registry import CHOICES, DEFAULT_POLICY
from prefill_worker.compute import PrefillCompute
from prefill_worker.config import PrefillConfig
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.engine.unlisted import check_unlisted
from prefill_worker.kv_sender import KVSender
from prefill_worker.parcel.pinning import pin
from prefill_worker.parcel.retained import RetainedParcels
from prefill_worker.parcel.store import ParcelStore
from prefill_worker.preprocess.handle import PreprocessProcess
from prefill_worker.preprocess.pool import PreprocessPool
from prefill_worker.preprocess.processing import PromptLimits, PromptProcessor
from prefill_worker.prompt import prompt_limits
from prefill_worker.runner import PrefillRunner
from prefill_worker.scheduler import PrefillScheduler
from prefill_worker.service import SERVICE_NAME, PrefillServicer
from shared.kv.arena import Arena
from shared.kv.arena_socket import ArenaServer
from shared.kv.transport.local import LocalReceiver
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.grammars import Grammars
from shared.model.identity import ModelIdentity
from shared.model.loading import load_prefill_model
from shared.model.processor import load_processor
from shared.model.spec import VLMSpec
from shared.rpc.identity import Identity
from shared.rpc.lifecycle import new_epoch
from shared.rpc.options import MAX_REQUEST_BYTES, MIB
from shared.telemetry.metrics import PrefillMetrics
from shared.telemetry.tracer import open_tracer

EXPIRY_PERIOD_S = 0.5


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Everything that comes from the checkpoint, and where that lies."""

    path: Path
    engine: PrefillEngine
    processor: Any
    spec: VLMSpec
    identity: ModelIdentity
    sharing: LayerSharing | None = None


def load_model(config: PrefillConfig) -> LoadedModel:
    """Loads the checkpoint. Takes seconds; nothing is served before.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        UnsupportedModelError: Its architecture cannot be served.
    """
    checkpoint = open_checkpoint(config)
    return with_model(
        checkpoint, load_prefill_model(checkpoint.path, dtype=checkpoint.dtype, device=checkpoint.device), config
    )


def with_model(checkpoint: Checkpoint, model: PreTrainedModel, config: PrefillConfig) -> LoadedModel:
    """The same around a model that is loaded, with the caches that were asked for.

    Raises:
        UnsupportedModelError: Its family has no entry and does not behave like most.
    """
    processor = load_processor(checkpoint.path)
    check_unlisted(model, processor, checkpoint.spec)
    return LoadedModel(
        path=checkpoint.path,
        engine=PrefillEngine(
            model,
            vision_cache_bytes=config.vision_cache_mib * MIB,
            prefix_cache_bytes=config.prefix_cache_mib * MIB,
            chunk_tokens=config.prefill_chunk,
        ),
        processor=processor,
        spec=checkpoint.spec,
        identity=checkpoint.identity,
        sharing=LayerSharing.load(checkpoint.path, checkpoint.spec.layout.num_layers),
    )


class PrefillWorker:
    """A ready worker; must be built on the event loop that it serves on.

    Args:
        epoch: Boot id of the process; a new one without it.
        local: The decode half of the same process; its reservations need no transfer.
        identity: Of the process, to decode workers; plaintext without one.
    """

    role = "prefill"
    services = (SERVICE_NAME,)
    max_request_bytes = MAX_REQUEST_BYTES

    def __init__(
        self,
        config: PrefillConfig,
        model: LoadedModel,
        *,
        epoch: str | None = None,
        local: LocalReceiver | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.name, self.listen = config.name, config.listen
        epoch = epoch or new_epoch()
        limits = prompt_limits(
            model.spec,
            max_images=config.max_images,
            max_video_frames=config.max_video_frames,
            max_video_tokens=config.max_video_tokens,
        )
        self.metrics = PrefillMetrics(worker=config.name, model=model.identity.name)
        self._tracer = open_tracer(config.otlp_endpoint, role=self.role, name=config.name)
        self._preprocess = _preprocess_pool(config, model, limits, self.metrics)
        self._arena = Arena(config.arena_mib * MIB)
        if model.engine.device.type == "cuda":
            pin(self._arena.memory)
        self._arena_server = ArenaServer.start(config.socket_dir, f"{config.name}-{epoch}", self._arena, epoch)
        store = ParcelStore(self._arena)
        retained = RetainedParcels(store, capacity=config.retained_bytes, lease_s=config.parcel_lease_s)
        self._sender = KVSender(
            epoch=epoch, metrics=self.metrics, local=local, ships_early=config.early_shipping, identity=identity
        )
        scheduler = PrefillScheduler(max_waiting=config.max_waiting)
        tokenizer = model.processor.tokenizer
        self.runner = PrefillRunner(
            preprocess=self._preprocess,
            compute=PrefillCompute(
                model.engine, tokenizer, model.spec, model.identity, self.metrics, cascade=config.cascade
            ),
            scheduler=scheduler,
            store=store,
            retained=retained,
            sender=self._sender,
            layout=model.spec.layout,
            metrics=self.metrics,
            grammars=Grammars(tokenizer, vocabulary=model.identity.vocabulary, eos_token_ids=model.spec.eos_token_ids),
        )
        self.servicer = PrefillServicer(
            name=config.name,
            epoch=epoch,
            model=_served_model(config, model.identity, PromptProcessor(model.processor, limits)),
            arena_socket=str(self._arena_server.path),
            arena_bytes=self._arena.capacity,
            runner=self.runner,
            scheduler=scheduler,
            retained=retained,
            vocabulary=model.identity.vocabulary,
            max_dropped_attention=config.max_dropped_attention,
            sharing=model.sharing,
            tracer=self._tracer,
        )
        self._expiry = asyncio.get_running_loop().create_task(self._expire_leases())
        self.metrics.watch_resident("filling", lambda: retained.filling_bytes)
        self.metrics.watch_resident("retained", lambda: retained.used_bytes)
        self.metrics.orphan_bytes.set_function(lambda: self.runner.orphan_bytes)
        self.metrics.cache_usage.set_function(lambda: store.used_bytes / self._arena.capacity)
        self.metrics.requests_running.set_function(lambda: scheduler.running)
        self.metrics.requests_waiting.set_function(lambda: scheduler.waiting)
        self.metrics.outstanding_tokens.set_function(lambda: scheduler.outstanding_tokens)
        self._features, self._prefixes = model.engine.features, model.engine.prefixes
        self.metrics.vision_cache_bytes.set_function(lambda: self._features.used_bytes)
        self.metrics.prefix_cache_bytes.set_function(lambda: self._prefixes.used_bytes)
        self._preprocess.wait_ready()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the worker's services to a server."""
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self.servicer, server)

    def info(self) -> worker_pb2.WorkerInfo:
        """Who it is and how loaded it is now."""
        return self.servicer.info()

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests and lets the others finish for `timeout_s`."""
        self.servicer.start_draining()
        await self.runner.drain(timeout_s)

    async def close(self) -> None:
        """Gives everything back; the worker was drained."""
        self._expiry.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._expiry
        self.runner.close()
        await self._preprocess.close()
        await self._sender.close()
        await self._arena_server.stop()
        await self._tracer.close()
        self.runner.check_integrity()
        self._preprocess.check_integrity()
        self._features.check_integrity()
        self._prefixes.check_integrity()
        self._arena.close()

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_PERIOD_S)
            self.runner.expire(time.monotonic())


def _preprocess_pool(
    config: PrefillConfig, model: LoadedModel, limits: PromptLimits, metrics: PrefillMetrics
) -> PreprocessPool:
    launch = partial(
        PreprocessProcess.launch,
        model.path,
        limits,
        memory_bytes=config.preprocess_memory_mib * MIB,
        log_level=config.log_level,
        log_format=config.log_format,
    )
    return PreprocessPool(
        launch,
        model.spec,
        metrics,
        processes=config.preprocess_processes,
        timeout_s=config.preprocess_timeout_s,
        max_waiting=config.max_waiting,
        max_waiting_bytes=config.preprocess_queue_mib * MIB,
    )


def _served_model(
    config: PrefillConfig, identity: ModelIdentity, processing: PromptProcessor
) -> worker_pb2.ServedModel:
    served = identity.to_proto()
    served.max_images = config.max_images
    served.template_tokens = processing.template_tokens()
    *closer, most = processing.image_bounds()
    served.image_bounds.extend(worker_pb2.ImageBound(**bound._asdict()) for bound in closer)
    served.max_marker_tokens_per_image = processing.marker_tokens()
    served.max_tokens_per_image = most.visual_tokens + served.max_marker_tokens_per_image
    if processing.reads_videos:
        served.max_marker_tokens_per_video = processing.video_marker_tokens()
        served.max_tokens_per_video = config.max_video_tokens + served.max_marker_tokens_per_video
    served.policies.extend(sorted(CHOICES))
    served.rewriting_policies.extend(sorted(name for name, policy in CHOICES.items() if policy.rewrites()))
    served.default_policy = DEFAULT_POLICY
    served.default_retention = config.default_retention
    served.max_new_tokens = config.max_new_tokens
    served.default_max_new_tokens = config.default_max_new_tokens
    return served
