"""Router and workers on this machine, started and stopped in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import vlcache

from decode_worker.config import DecodeConfig
from deploy.local.credentials import Credentials, authority_module
from deploy.local.forks import Forks
from deploy.local.processes import Announcement, Child, ChildFailedError
from models.shapes_vlm.paths import CHECKPOINT
from shared.config import Dtype, WorkerConfig
from shared.registry.location import open_listing
from shared.rpc.lifecycle import stop_signal

# What a child may take beyond its own drain time before it is killed.
STOP_MARGIN_S = 10.0
# Of a page for which nobody names an HTTP port.
PAGE_PORT = 8000
EXIT_FAILED = 1


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """What is started."""

    host: str = "127.0.0.1"
    """Address that the router binds; the workers stay on 127.0.0.1."""
    port: int = 0
    """gRPC port of the router; 0 picks a free one."""
    http_port: int | None = None
    """Port of OpenAI's chat API at the router; 0 picks a free one, and without it there is none."""
    ui: bool = False
    """The router's page for people, at its HTTP port, which then is 8000 unless said otherwise."""
    model: str = str(CHECKPOINT)
    """Checkpoint: a directory, or a Hugging Face hub id."""
    revision: str = WorkerConfig.revision
    """Branch, tag or commit of a hub id; its main branch when empty."""
    served_model_name: str = "shapes-vlm"
    """Name under which clients ask for it."""
    dtype: Dtype = WorkerConfig.dtype
    """Precision of weights and KV; auto is bfloat16 on a GPU or an AMX machine, else float32."""
    device: str = WorkerConfig.device
    """torch device of all workers, such as cpu or cuda:0."""
    max_model_len: int | None = WorkerConfig.max_model_len
    """Tokens of prompt and answer together; the model's own limit when absent."""
    max_num_seqs: int = DecodeConfig.max_num_seqs
    """Sequences in one step of a process that decodes, at most; more wait their turn."""
    prefill_workers: int = 1
    """Processes that compute prompts."""
    decode_workers: int = 1
    """Processes that generate tokens."""
    combined_workers: int = 0
    """Processes that do both over one copy of the weights: for a single GPU."""
    arena_mib: int = 64
    """Memory of each process that prefills for parcels on their way, MiB."""
    kv_memory_mib: int = 256
    """Memory of each process that decodes for KV, MiB."""
    registry: str = ""
    """Where the workers publish themselves and the router finds them: redis://... or rediss://...; empty tells the
    router their addresses."""
    secure: bool = False
    """TLS between all of them, with certificates that are made for the occasion, and a token for clients."""
    threads: int = 0
    """torch threads of each role of each worker; 0 shares the cores out, because threads that outnumber them wait for
    each other."""
    worker_flags: tuple[str, ...] = ()
    """More flags of every worker."""
    prefill_flags: tuple[str, ...] = ()
    """More flags of every process that prefills."""
    decode_flags: tuple[str, ...] = ()
    """More flags of every process that decodes."""
    router_flags: tuple[str, ...] = ()
    """More flags of the router."""
    start_timeout_s: float = 180.0
    """Seconds that a process may take to listen, and the router to see its workers."""
    drain_s: float = 30.0
    """Seconds that running requests get to finish at the end."""

    def __post_init__(self) -> None:
        for name in ("prefill_workers", "decode_workers", "combined_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, as {getattr(self, name)} is")
        if not (self.prefill_roles and self.decode_roles):
            raise ValueError("without combined_workers, prefill_workers and decode_workers must be greater than 0")
        if self.registry:
            open_listing(self.registry)
        if self.secure:
            authority_module()
        if self.start_timeout_s <= 0:
            raise ValueError(f"start_timeout_s must be greater than 0, not {self.start_timeout_s}")

    @property
    def router_http_port(self) -> int | None:
        """Where the router serves HTTP, if at all."""
        return PAGE_PORT if self.ui and self.http_port is None else self.http_port

    @property
    def prefill_roles(self) -> int:
        """Workers that a router sees computing prompts."""
        return self.prefill_workers + self.combined_workers

    @property
    def decode_roles(self) -> int:
        """Workers that a router sees generating tokens."""
        return self.decode_workers + self.combined_workers


@dataclass(frozen=True, kw_only=True)
class Modules:
    """What is run; tests put others in their place."""

    prefill: str = "prefill_worker"
    decode: str = "decode_worker"
    combined: str = "deploy.combined"
    router: str = "router"
    imported: tuple[str, ...] = ("prefill_worker", "decode_worker", "deploy.combined")
    """Those that are forked with their imports done. Not the router, which is small and must not have torch."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a child was started."""

    module: str
    flags: tuple[str, ...]
    """All but where to listen."""
    roles: int


class Stack:
    """Use as a context manager: leaving it stops whatever was started, the router first, then the workers."""

    def __init__(
        self, config: StackConfig, modules: Modules, forks: contextlib.AbstractContextManager[Forks] | None = None
    ) -> None:
        """Nothing is started yet.

        Args:
            forks: Where processes come from; it is left when the stack is.
        """
        self._config = config
        self._modules = modules
        self._exits = contextlib.ExitStack()
        self._opened = forks or Forks(modules.imported)
        self._folder = tempfile.TemporaryDirectory(prefix="vlcache-")
        self._workers: list[Child] = []
        self._routers: list[Child] = []
        self._launches: dict[str, Launch] = {}
        self.credentials: Credentials | None = None
        """Of a secure stack, once it starts."""
        self.services: list[Announcement] = []
        """Where everything listens, the router first."""
        self.clean = True
        """Whether every child ended with exit code 0 when it was asked to."""

    async def __aenter__(self) -> Stack:
        self._forks = self._exits.enter_context(self._opened)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        grace_s = self._config.drain_s + STOP_MARGIN_S
        with self._exits, self._folder:
            for group in (self._routers, self._workers):
                codes = await asyncio.gather(*(child.stop(grace_s) for child in group))
                for child, code in zip(group, codes, strict=True):
                    self._note_end(child, code, expected=kind is not None)

    @property
    def address(self) -> str:
        """Where clients reach the router."""
        return self.services[0].address

    @property
    def base_url(self) -> str:
        """Where OpenAI's clients reach it; empty where it serves no HTTP."""
        http = self.services[0].http_address
        return f"{'https' if self.credentials else 'http'}://{http}/v1" if http else ""

    @property
    def page_url(self) -> str:
        """Where people reach it; empty where it serves no page."""
        return self.base_url.removesuffix("v1") + "ui" if self._config.ui else ""

    @property
    def log_dir(self) -> Path:
        """Where the logs of all children are, while the stack is up."""
        return Path(self._folder.name)

    def client(self, **options: Any) -> vlcache.AsyncClient:
        """A client of the router."""
        return vlcache.AsyncClient(self.address, **self.client_options, **options)

    @property
    def client_options(self) -> dict[str, Any]:
        """What clients of either kind need besides the address."""
        return {"tls": self.credentials.tls, "token": self.credentials.token} if self.credentials else {}

    async def start(self) -> None:
        """Starts the workers together, then the router, and waits until a model can be asked.

        Raises:
            ChildFailedError: A process ended or was not ready in time.
        """
        config, modules = self._config, self._modules
        if config.secure:
            hosts = sorted({config.host, "127.0.0.1", "localhost", socket.gethostname()})
            self.credentials = Credentials.make(self.log_dir / "certs", hosts)
        prefill, decode = self._prefill_flags(), self._decode_flags()
        for number in range(config.prefill_workers):
            await self._start_worker(modules.prefill, f"prefill-{number}", prefill)
        for number in range(config.decode_workers):
            await self._start_worker(modules.decode, f"decode-{number}", decode)
        for number in range(config.combined_workers):
            await self._start_worker(modules.combined, f"combined-{number}", [*prefill, *decode], roles=2)
        limit_s = config.start_timeout_s
        heard = await asyncio.gather(*(child.announcements(limit_s) for child in self._workers))
        workers = list(itertools.chain.from_iterable(heard))
        await self._start_router([worker.address for worker in workers])
        self.services = [*await self._routers[0].announcements(limit_s), *workers]
        await self.while_alive(self._wait_ready())

    def child(self, name: str) -> Child:
        """The running process of that name."""
        return next(child for child in (*self._routers, *self._workers) if child.name == name)

    async def restart(self, name: str) -> int:
        """Starts a child of one role again, where it listened before, and waits until it does.

        One that still runs drains first. Returns the exit code of the one that ended.

        Raises:
            ChildFailedError: It did not listen in time.
        """
        launch, said = self._launches[name], next(service for service in self.services if service.name == name)
        code = await self.child(name).stop(self._config.drain_s + STOP_MARGIN_S)
        ports = said.address.rpartition(":")[2], said.metrics_address.rpartition(":")[2]
        child = await self._spawn(name, launch, ports)
        for group in (self._routers, self._workers):
            group[:] = [child if old.name == name else old for old in group]
        await child.announcements(self._config.start_timeout_s)
        return code

    async def while_alive(self, work: Coroutine[Any, Any, int]) -> int:
        """The result of `work`, which is cancelled when a child ends first.

        Raises:
            ChildFailedError: A child ended.
        """
        working = asyncio.create_task(work)
        deaths = [asyncio.create_task(child.end()) for child in (*self._routers, *self._workers)]
        try:
            await asyncio.wait({working, *deaths}, return_when=asyncio.FIRST_COMPLETED)
            for death in deaths:
                if death.done():
                    death.result()
            return working.result()
        finally:
            for task in (working, *deaths):
                task.cancel()
            await asyncio.gather(working, *deaths, return_exceptions=True)

    async def _wait_ready(self) -> int:
        async with self.client() as client:
            try:
                await client.wait_ready(self._config.start_timeout_s)
            except vlcache.VlcacheError as error:
                tails = "\n".join(child.log_tail() for child in (*self._routers, *self._workers))
                raise ChildFailedError(f"the router did not become ready: {error}\n{tails}") from error
        return 0

    def _prefill_flags(self) -> list[str]:
        arena = ["--arena-mib", str(self._config.arena_mib), "--socket-dir", str(self.log_dir / "arenas")]
        return [*arena, *self._config.prefill_flags]

    def _decode_flags(self) -> list[str]:
        memory, seqs = str(self._config.kv_memory_mib), str(self._config.max_num_seqs)
        return ["--kv-memory-mib", memory, "--max-num-seqs", seqs, *self._config.decode_flags]

    async def _start_worker(self, module: str, name: str, flags: list[str], *, roles: int = 1) -> None:
        child = await self._child(module, name, [*self._worker_flags(name), *flags], roles=roles)
        self._workers.append(child)

    async def _start_router(self, workers: list[str]) -> None:
        flags = ["--name", "router", "--registry", self._config.registry or "static://" + ",".join(workers)]
        if self._config.router_http_port is not None:
            flags += ["--http-port", str(self._config.router_http_port), "--ui" if self._config.ui else "--no-ui"]
        flags += ["--host", self._config.host, *self._security("router"), *self._config.router_flags]
        child = await self._child(self._modules.router, "router", flags, roles=1, port=self._config.port)
        self._routers.append(child)

    def _worker_flags(self, name: str) -> list[str]:
        config = self._config
        model = ["--model", config.model, "--revision", config.revision]
        model += ["--served-model-name", config.served_model_name, "--dtype", config.dtype, "--device", config.device]
        if config.max_model_len is not None:
            model += ["--max-model-len", str(config.max_model_len)]
        threads = config.threads or max(1, (os.cpu_count() or 1) // (config.prefill_roles + config.decode_roles))
        flags = [*model, "--name", name, "--threads", str(threads), *self._security(name), *config.worker_flags]
        return [*flags, "--registry", config.registry]

    def _security(self, name: str) -> list[str]:
        return self.credentials.flags(name.partition("-")[0]) if self.credentials else []

    async def _child(self, module: str, name: str, flags: list[str], *, roles: int, port: int = 0) -> Child:
        flags = [*flags, "--drain-s", str(self._config.drain_s)]
        launch = self._launches[name] = Launch(module=module, flags=tuple(flags), roles=roles)
        return await self._spawn(name, launch, (str(port), "0"))

    async def _spawn(self, name: str, launch: Launch, ports: tuple[str, str]) -> Child:
        """Starts a child; `ports` are those of gRPC and of the metrics."""
        flags = [*launch.flags, "--port", ports[0], "--metrics-port", ports[1]]
        return await Child.start(self._forks, launch.module, name, flags, log_dir=self.log_dir, roles=launch.roles)

    def _note_end(self, child: Child, code: int, *, expected: bool) -> None:
        if code != 0 and not expected:
            self.clean = False
            print(f"{child.name} ended with exit code {code}\n{child.log_tail()}", file=sys.stderr)


async def run_stack(
    config: StackConfig,
    job: Callable[[Stack], Coroutine[Any, Any, int]],
    *,
    interrupted: int,
    modules: Modules | None = None,
) -> int:
    """Starts a stack, runs `job` on it and stops it; returns the exit code.

    It is that of the job, `interrupted` when a signal came first, and 1 when a child ended by itself or did not stop
    cleanly.
    """
    stopped = asyncio.create_task(stop_signal())
    try:
        async with Stack(config, modules or Modules()) as stack:
            code = await _first(stopped, _start_and_run(stack, job), interrupted)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    finally:
        stopped.cancel()
        await asyncio.gather(stopped, return_exceptions=True)
    return code if stack.clean else EXIT_FAILED


async def _start_and_run(stack: Stack, job: Callable[[Stack], Coroutine[Any, Any, int]]) -> int:
    await stack.start()
    return await stack.while_alive(job(stack))


async def _first(stopped: asyncio.Task[None], work: Coroutine[Any, Any, int], interrupted: int) -> int:
    """The result of `work`, or `interrupted` when `stopped` comes first."""
    working = asyncio.create_task(work)
    await asyncio.wait({stopped, working}, return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        return working.result()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    return interrupted
