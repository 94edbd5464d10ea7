"""Three real processes for tests: started once, asked through the client, killed when a test wants it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import grpc
import vlcache
from vlcache.worker.v1 import decode_pb2_grpc, prefill_pb2_grpc, worker_pb2

from deploy.local.credentials import Credentials
from deploy.local.forks import Forks
from deploy.local.processes import Announcement
from deploy.local.stack import Modules, Stack, StackConfig

Result = TypeVar("Result")


class RunningStack:
    """A stack whose event loop lives in a thread of its own, so that plain tests can use it."""

    def __init__(self, config: StackConfig, forks: Forks) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._config = config
        self._forks = forks
        self.killed: set[str] = set()
        """Names of processes that are dead, or dying still."""

    def __enter__(self) -> RunningStack:
        self._thread.start()
        self._stack = self._run(self._start())
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._stack.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        return self._stack.address

    @property
    def base_url(self) -> str:
        """Of OpenAI's clients."""
        return self._stack.base_url

    @property
    def services(self) -> list[Announcement]:
        """Where everything listens, the router first."""
        return self._stack.services

    @property
    def clean(self) -> bool:
        return self._stack.clean

    @property
    def credentials(self) -> Credentials:
        """Of a secure stack."""
        assert self._stack.credentials is not None
        return self._stack.credentials

    def client(self, **options: Any) -> vlcache.Client:
        options = {"timeout": vlcache.Timeout(total_s=120), **self._stack.client_options, **options}
        return vlcache.Client(self.address, **options)

    def async_client(self) -> vlcache.AsyncClient:
        return self._stack.client(timeout=vlcache.Timeout(total_s=120))

    def metrics(self, role: str) -> str:
        return self.metrics_of(next(service.name for service in self._stack.services if service.role == role))

    def metrics_of(self, name: str) -> str:
        service = next(service for service in self._stack.services if service.name == name)
        with urllib.request.urlopen(f"http://{service.metrics_address}/metrics", timeout=10) as response:
            return response.read().decode()

    def child(self, name: str) -> Any:
        return self._stack.child(name)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to one process; its own children have to notice by themselves."""
        os.kill(self.child(name).pid, number)
        if number == signal.SIGKILL:
            self.killed.add(name)

    def restart(self, *names: str) -> list[int]:
        """Starts processes again where they listened before; those that still run drain first. Their exit codes."""

        self.killed.difference_update(names)

        async def all_of_them() -> list[int]:
            return await asyncio.gather(*(self._stack.restart(name) for name in names))

        return self._run(all_of_them())

    @property
    def log_dir(self) -> Path:
        return self._stack.log_dir

    def worker_infos(self, *roles: str) -> list[worker_pb2.WorkerInfo]:
        """What each worker, or each of these roles, says of itself now; the router shows only its last poll."""
        wanted = roles or ("prefill", "decode")
        return [self._ask(service) for service in self._stack.services if service.role in wanted]

    def wait_idle(self, timeout_s: float = 20.0) -> None:
        """Until no worker holds a byte for any request: what must be true after the last one has ended."""
        give_up = time.monotonic() + timeout_s
        while held := [info for info in self.worker_infos() if _held(info)]:
            assert time.monotonic() < give_up, f"still held: {held}"
            time.sleep(0.02)

    def channel_to(self, service: Announcement, role: str = "router") -> grpc.Channel:
        """A channel to a process; that of a secure stack takes the caller for what its certificate says."""
        if self._stack.credentials is None:
            return grpc.insecure_channel(service.address)
        folder = self._stack.credentials.folder
        files = [(folder / name).read_bytes() for name in ("ca.pem", f"{role}.key", f"{role}.pem")]
        return grpc.secure_channel(service.address, grpc.ssl_channel_credentials(*files))

    def _ask(self, service: Announcement) -> worker_pb2.WorkerInfo:
        stubs = {"prefill": prefill_pb2_grpc.PrefillServiceStub, "decode": decode_pb2_grpc.DecodeServiceStub}
        with self.channel_to(service) as channel:
            return stubs[service.role](channel).GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=10)

    async def _start(self) -> Stack:
        stack = await Stack(self._config, Modules(), contextlib.nullcontext(self._forks)).__aenter__()
        try:
            await stack.start()
        except BaseException:
            await stack.__aexit__(None, None, None)
            raise
        return stack

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _held(info: worker_pb2.WorkerInfo) -> int:
    kv = info.kv
    requests = info.requests_running + info.requests_waiting
    return kv.reserved + kv.filling + kv.active + kv.retained + requests + info.outstanding_tokens
