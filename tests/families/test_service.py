"""Each family through the whole service: client, router, prefill worker and decode worker, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import vlcache

import decode_worker.worker as decode
import prefill_worker.worker as prefill
from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from router.router import Router
from shared.rpc.server import RpcServer
from tests.families.chats import QUESTION, SMALL, TALL, WIDE, inputs_of, png
from tests.families.family import REFUSE_SPARSE, Family
from tests.families.loaded import Loaded

TOKENS = 6
# some of the prompts are longer
CHUNK = 96
LONG = "Zebras quiz my jovial fox. " * 9
IMAGES = {"text": [], "one": [WIDE], "several": [TALL, SMALL]}


@contextlib.asynccontextmanager
async def served(worker: Any) -> AsyncIterator[str]:
    """Its address while it serves."""
    server = await RpcServer.start(
        name=worker.name,
        host="127.0.0.1",
        port=0,
        register=worker.register,
        services=[],
        max_request_bytes=worker.max_request_bytes,
    )
    try:
        yield server.address
        await worker.drain(5)
    finally:
        await server.stop(0)
        await worker.close()


@contextlib.asynccontextmanager
async def stack(checkpoint: Path, sockets: Path) -> AsyncIterator[vlcache.AsyncClient]:
    """A client of a router of two workers."""
    common: Any = {"model": str(checkpoint), "dtype": "float32"}
    prefills = PrefillConfig(arena_mib=4, socket_dir=sockets, preprocess_processes=1, prefill_chunk=CHUNK, **common)
    decodes = DecodeConfig(kv_memory_mib=4, **common)
    model = decode.load_model(decodes)
    workers = (
        prefill.PrefillWorker(prefills, prefill.load_model(prefills)),
        decode.DecodeWorker(decodes, model, *decode.build_engine(decodes, model)),
    )
    async with contextlib.AsyncExitStack() as servers:
        addresses = [await servers.enter_async_context(served(worker)) for worker in workers]
        router = Router(RouterConfig(registry=f"static://{','.join(addresses)}", poll_interval_s=0.05))
        await router.start()
        servers.push_async_callback(router.stop)
        yield await servers.enter_async_context(vlcache.AsyncClient(router.address))


def test_the_service_answers_as_generate_does(family: Family, loaded: Loaded) -> None:
    sampling = vlcache.Sampling(max_new_tokens=TOKENS, ignore_eos=True)

    async def ask(
        client: vlcache.AsyncClient, question: str, kind: str, retention: float, policy: str = "vl_cache"
    ) -> vlcache.Completion:
        images = [png(image) for image in IMAGES[kind]]
        compression = vlcache.Compression(retention=retention, policy=policy)
        return await client.generate(question, images=images, sampling=sampling, compression=compression)

    async def body(sockets: Path) -> None:
        async with stack(loaded.folder, sockets) as client:
            # together: they decode in one batch
            answers = await asyncio.gather(*(ask(client, QUESTION, kind, 1.0) for kind in IMAGES))
            for answer, images in zip(answers, IMAGES.values(), strict=True):
                inputs = inputs_of(loaded, [("user", [*images, QUESTION])])
                assert list(answer.token_ids) == loaded.answer(inputs, TOKENS)
                visual = int((inputs["input_ids"] == loaded.model.config.image_token_id).sum())
                assert answer.usage.visual_tokens == visual
            cut = await ask(client, LONG, "several", 0.1)
            assert cut.compression is not None
            assert cut.compression.realised_retention <= 0.1
            assert len(cut.token_ids) == TOKENS
            if family.name in REFUSE_SPARSE:
                with pytest.raises(vlcache.InvalidRequest, match="this model") as refused:
                    await ask(client, LONG, "several", 0.5, policy="fast_v")
                assert refused.value.reason == "POLICY_MODEL"

    # pytest's own folders may be too deep for a socket
    with tempfile.TemporaryDirectory() as sockets:
        asyncio.run(asyncio.wait_for(body(Path(sockets)), 100))
