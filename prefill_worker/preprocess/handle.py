"""One preprocessing process, seen from its worker."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prefill_worker.preprocess.processed import ProcessedPrompt
from prefill_worker.preprocess.processing import PromptLimits
from prefill_worker.preprocess.wire import PREFIX, Frame, FrameError, read_reply, sizes
from shared.telemetry.logs import LogFormat, LogLevel

ROOT = Path(__file__).parents[2]
# One process, one core: the pool is what is parallel.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


class PreprocessProcess:
    """A started process and the socket to it. Lives on the event loop; one request at a time."""

    def __init__(self, process: subprocess.Popen[bytes], peer: socket.socket) -> None:
        self._process = process
        self._peer = peer

    @classmethod
    def launch(
        cls,
        checkpoint: Path,
        limits: PromptLimits,
        *,
        memory_bytes: int,
        log_level: LogLevel = "INFO",
        log_format: LogFormat = "text",
    ) -> PreprocessProcess:
        """Starts a process and does not wait for it."""
        peer, its_own = socket.socketpair()
        peer.setblocking(False)
        logging = {"level": log_level, "log_format": log_format}
        settings = json.dumps({"limits": asdict(limits), "logging": logging})
        arguments = (str(os.getpid()), str(memory_bytes), str(checkpoint.resolve()), settings)
        with its_own:
            process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                (sys.executable, "-m", "prefill_worker.preprocess.child", *arguments),
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                stdin=its_own.fileno(),
                stdout=subprocess.DEVNULL,
                # ctrl-C is for the worker, which lets its requests finish
                start_new_session=True,
            )
        return cls(process, peer)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def peer(self) -> socket.socket:
        """Readable when the process has become ready, or has ended."""
        return self._peer

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    async def ready(self) -> None:
        """Waits until it has loaded everything; once, before the first request.

        Raises:
            EOFError: It has ended.
        """
        await self._receive()

    async def ask(self, request: Frame) -> ProcessedPrompt:
        """The answer to one request; after a failure or a cancellation nothing more may be asked.

        Raises:
            ServiceError: The request was refused.
            EOFError: The process has ended.
            FrameError: The answer is none.
            OSError: The process has ended, too.
        """
        for piece in request.pieces():
            await asyncio.get_running_loop().sock_sendall(self._peer, piece)
        return read_reply(*await self._receive())

    async def end(self) -> None:
        """Kills it at once; nothing is left of it, also when the caller is cancelled meanwhile."""
        self._peer.close()
        self._process.kill()
        # a large process takes the kernel a while to clear away
        gone = asyncio.get_running_loop().run_in_executor(None, self._process.wait)
        try:
            await asyncio.shield(gone)
        except asyncio.CancelledError:
            await gone
            raise

    async def _receive(self) -> tuple[Mapping[str, Any], memoryview]:
        header_bytes, body_bytes = sizes(await self._exactly(PREFIX.size))
        try:
            header = json.loads(bytes(await self._exactly(header_bytes)))
        except ValueError as error:
            raise FrameError("a header that is no JSON") from error
        return header, await self._exactly(body_bytes)

    async def _exactly(self, count: int) -> memoryview:
        # not cleared first: a page is touched when its bytes come
        data = np.empty(count, np.uint8).data
        view = data
        while view:
            got = await asyncio.get_running_loop().sock_recv_into(self._peer, view)
            if not got:
                raise EOFError("the preprocessing process has ended")
            view = view[got:]
        return data
