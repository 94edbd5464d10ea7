"""The HTTP port of a router: uvicorn in the router's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Collection, Iterator

import uvicorn
from starlette.applications import Starlette

from router.http.app import make_app
from router.http.chat import ChatCompletions
from router.http.connection import LimitedConnection
from router.http.remote_images import RemoteImages
from router.http.tls import server_context
from router.requests.reception import Reception
from router.workers.table import WorkerTable
from shared.rpc.identity import Identity

# A connection without a request; longer than clients keep theirs, so that it is they who close it.
IDLE_TIMEOUT_S = 75
# What answers get that are complete and not all written yet.
GRACE_S = 1


class HttpServer:
    """A started server; `address` is where it listens."""

    def __init__(
        self, server: _Server, chat: ChatCompletions, remote: RemoteImages, bound: socket.socket, host: str
    ) -> None:
        self.address = f"{host}:{bound.getsockname()[1]}"
        self._server = server
        self._chat = chat
        self._remote = remote
        self._serving = asyncio.create_task(server.serve([bound]))

    @classmethod
    async def start(
        cls,
        reception: Reception,
        table: WorkerTable,
        *,
        host: str,
        port: int,
        timeout_s: float,
        image_url_hosts: Collection[str],
        ui: bool,
        is_ready: Callable[[], bool],
        identity: Identity | None,
        demand_client_cert: bool,
    ) -> HttpServer:
        """Binds and starts.

        Args:
            timeout_s: How long a client waits for all of its answer.
            image_url_hosts: From where images are fetched.
            ui: Whether the page is served.
            is_ready: What health says.
            identity: Of the router; plaintext without it.
            demand_client_cert: Whether callers need a certificate of the CA.

        Raises:
            OSError: The address cannot be bound.
        """
        bound = _bind(host, port)
        remote = RemoteImages(image_url_hosts)
        chat = ChatCompletions(reception, remote, timeout_s=timeout_s)
        context = server_context(identity, demand_client_cert=demand_client_cert) if identity else None
        server = _Server(_config(make_app(chat, reception, table, is_ready=is_ready, ui=ui), context))
        started = cls(server, chat, remote, bound, host)
        await server.listening.wait()
        return started

    async def stop(self) -> None:
        """Lets go of what is written; requests that still run are told so. Drain first."""
        await self._chat.stop(GRACE_S)
        self._server.should_exit = True
        await self._serving
        await self._remote.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the router's."""
        yield


def _config(app: Starlette, context: ssl.SSLContext | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=LimitedConnection,
        ws="none",
        lifespan="off",
        # the router's own log has a line per request, and strangers must not fill it
        log_config=None,
        log_level="error",
        access_log=False,
        # who says that he passes something on for another is not believed
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_TIMEOUT_S,
        timeout_graceful_shutdown=GRACE_S,
        ssl_context_factory=(lambda *_: context) if context else None,
    )


def _bind(host: str, port: int) -> socket.socket:
    """The host in the form of the gRPC port's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}") from error
