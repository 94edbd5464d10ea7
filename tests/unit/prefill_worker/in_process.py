"""Preprocessing without processes, whose start takes longer than most tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from unittest import mock

from vlcache.v1 import inference_pb2 as pb

from prefill_worker.config import PrefillConfig
from prefill_worker.preprocess.processing import PromptLimits, PromptProcessor
from prefill_worker.prompt import Prompt
from prefill_worker.worker import LoadedModel


class InProcess:
    """Does what the pool's processes do, on the event loop."""

    def __init__(self, config: PrefillConfig, model: LoadedModel, limits: PromptLimits, metrics: object) -> None:
        self._processor = PromptProcessor(model.processor, limits)
        self._spec = model.spec

    def wait_ready(self) -> None: ...

    async def build(self, messages: Sequence[pb.Message], *, max_new_tokens: int, tenant: str = "") -> Prompt:
        # as with processes, others get their turn and a cancellation its moment
        await asyncio.sleep(0)
        return Prompt.of(
            self._processor.process(messages, max_new_tokens=max_new_tokens), spec=self._spec, tenant=tenant
        )

    async def close(self) -> None: ...

    def check_integrity(self) -> None: ...


def preprocessing_in_process() -> AbstractContextManager[Callable[..., InProcess]]:
    """While open, new prefill workers start no preprocessing processes."""
    return mock.patch("prefill_worker.worker._preprocess_pool", InProcess)
