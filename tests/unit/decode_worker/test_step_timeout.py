"""A step that hangs on its device, while the loop that answers polls turns."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import grpc
import pytest

from decode_worker.config import DecodeConfig
from decode_worker.worker import LoadedModel
from shared.errors import UnavailableError
from tests.unit.decode_worker.failover import Watched, ahead, go_on
from tests.unit.decode_worker.sequences import prefill, text_ids
from tests.unit.decode_worker.serving import Served, failure, run, until
from tests.unit.decode_worker.shipment import Shipment
from tests.unit.decode_worker.test_preemption import STORAGES
from tests.unit.decode_worker.tiny import load_whole


def test_polls_fail_until_the_step_has_ended(checkpoint: Path, loaded: LoadedModel) -> None:
    shipment = Shipment(prefill(load_whole(checkpoint), text_ids(4, 40)), loaded)
    parcel, watched, goes_on = ahead(loaded, shipment, 1), Watched(), threading.Event()
    step = watched.step
    watched.step = lambda batch: goes_on.wait(30) and step(batch)  # type: ignore[method-assign,assign,return-value]

    async def body(served: Served) -> None:
        stream = served.stream()
        await go_on(served, parcel, stream, 1)
        try:
            await until(lambda: served.worker.servicer._scheduler.pass_s > 0.2)
            error = await failure(served.info())
            assert isinstance(error, UnavailableError)
            assert error.reason == "STEP_TIMEOUT"
        finally:
            goes_on.set()
        await stream.finished(1)
        await asyncio.wait_for(answered(served), 10)

    run(loaded, body, build=watched.build(STORAGES["slabs"]), step_timeout_s=0.2)


async def answered(served: Served) -> None:
    while True:
        try:
            await served.info()
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.01)
        else:
            return


def test_the_limit_is_a_time() -> None:
    with pytest.raises(ValueError, match="step_timeout_s must be greater than 0, not 0"):
        DecodeConfig(model="tiny", step_timeout_s=0)
