"""The client for threads. `_async_client` holds its asyncio twin."""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, overload

import grpc

from vlcache._attempts import Attempts
from vlcache._caller import caller_metadata
from vlcache._channel import DEFAULT_ADDRESS, channel_credentials, channel_options, check_secret
from vlcache._completion import Completion
from vlcache._errors import error_from_rpc
from vlcache._exchange import Exchange
from vlcache._many import CONCURRENCY, OnError, answer_many
from vlcache._messages import ImageSource, VideoSource, build_request
from vlcache._openai import ChatMessage, as_messages
from vlcache._readiness import POLL_INTERVAL_S, Readiness
from vlcache._request import Request
from vlcache._server_info import Model, ServerInfo, models_from_proto, server_info_from_proto
from vlcache._settings import Compression, RetryPolicy, Sampling, Timeout, Tls
from vlcache._stream import Stream
from vlcache._trace import trace_metadata
from vlcache.v1 import inference_pb2, inference_pb2_grpc


class Client:
    """Talks to one vlcache service. Threads may share it; `close` it, or use it as a context manager.

    address: "host:port" of the router.
    timeout: limits of every call.
    retry: when a failed call is sent again.
    tenant: whose requests these are, 1 to 64 of [A-Za-z0-9._-]; the service's "default" when None. Its limits and its
        caches are its own. A service that wants a token knows the tenant from it.
    token: what the service wants to see of its clients, if anything.
    tls: how the service is known; plaintext when None, in which no token leaves this machine.

    Making one raises ValueError when `tenant` is no tenant's name or the token would travel in plaintext, and OSError
    when a file of `tls` cannot be read. Every method raises the errors of `VlcacheError`;
    `generate` and `stream` also ValueError and OSError, see `stream`.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: Timeout | None = None,
        retry: RetryPolicy | None = None,
        tenant: str | None = None,
        token: str | None = None,
        tls: Tls | None = None,
    ) -> None:
        check_secret(address, token=token, tls=tls)
        self._metadata = caller_metadata(tenant, token)
        self._timeout = timeout or Timeout()
        self._retry = retry or RetryPolicy()
        credentials, options = channel_credentials(tls), channel_options(self._timeout)
        self._channel = (
            grpc.secure_channel(address, credentials, options=options)
            if credentials
            else grpc.insecure_channel(address, options=options)
        )
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls that are still running are cancelled."""
        self._channel.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        messages: Sequence[ChatMessage] | None = None,
        model: str = "",
        sampling: Sampling | None = None,
        compression: Compression | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> Completion:
        """Waits for the whole answer. Options and errors are those of `stream`."""
        with self.stream(
            prompt,
            images=images,
            videos=videos,
            messages=messages,
            model=model,
            sampling=sampling,
            compression=compression,
            priority=priority,
            request_id=request_id,
        ) as stream:
            return stream.result()

    def stream(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        messages: Sequence[ChatMessage] | None = None,
        model: str = "",
        sampling: Sampling | None = None,
        compression: Compression | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> Stream:
        """An iterator over the events of the answer; leaving its `with` block early cancels the request.

        prompt, images, videos: one message of the user, images first, then videos.
        messages: a whole chat instead of them, as Message or as dicts in the form of OpenAI's chat API.
        model: name of a served model; empty means the only one.
        sampling, compression: the service's defaults when None.
        priority: -100 to 100, less goes first where requests wait; a step is worth 10 s of waiting.
        request_id: 1 to 128 of [A-Za-z0-9._:-]; made when None. Every attempt carries it.

        Raises ValueError when options contradict one another or are out of their range, it or TypeError when a message
        has another form, OSError when an image or a video cannot be read, and InvalidRequest when the request exceeds
        64 MiB, all before anything is sent.
        """
        request = build_request(
            prompt=prompt,
            images=images,
            videos=videos,
            messages=as_messages(messages),
            model=model,
            sampling=sampling,
            compression=compression,
            priority=priority,
            request_id=request_id,
        )
        exchange = Exchange(request, timeout=self._timeout, policy=self._retry)
        # the span that the caller is in now, wherever the stream is read
        ask = functools.partial(self._stub.Generate, metadata=(*self._metadata, *trace_metadata()))
        return Stream(ask, exchange)

    @overload
    def generate_many(
        self,
        requests: Iterable[Request],
        *,
        concurrency: int = CONCURRENCY,
        progress: bool = False,
        on_error: Literal["raise"] = "raise",
    ) -> list[Completion]: ...

    @overload
    def generate_many(
        self,
        requests: Iterable[Request],
        *,
        concurrency: int = CONCURRENCY,
        progress: bool = False,
        on_error: Literal["return"],
    ) -> list[Completion | Exception]: ...

    def generate_many(
        self,
        requests: Iterable[Request],
        *,
        concurrency: int = CONCURRENCY,
        progress: bool = False,
        on_error: OnError = "raise",
    ) -> list[Completion] | list[Completion | Exception]:
        """The answers to all requests, in their order.

        concurrency: requests in flight at most.
        progress: shows a bar on a terminal's stderr or in a notebook; it needs rich (`pip install 'vlcache[cli]'`), and
            in a notebook ipywidgets.
        on_error: "raise" the first error, which cancels the others, as ctrl-C does; or "return" errors in the places of
            their answers. Either way a request that may pass later is tried again first, see `RetryPolicy`.

        Errors are those of `stream`, and ValueError for an option out of its range.
        """
        return answer_many(
            lambda request: self.stream(**request.options()),
            requests,
            concurrency=concurrency,
            progress=progress,
            on_error=on_error,
        )

    def models(self) -> tuple[Model, ...]:
        """The models that can be asked."""
        return models_from_proto(self._call(self._stub.ListModels, inference_pb2.ListModelsRequest()))

    def info(self) -> ServerInfo:
        """Version, workers, the KV bytes they hold, and what compression has saved."""
        return server_info_from_proto(self._call(self._stub.GetServerInfo, inference_pb2.GetServerInfoRequest()))

    def wait_ready(self, timeout_s: float) -> None:
        """Blocks until a model can be asked. Raises DeadlineExceeded after `timeout_s` seconds without one."""
        readiness = Readiness(timeout_s)
        while True:
            try:
                request = inference_pb2.ListModelsRequest()
                if self._stub.ListModels(request, timeout=readiness.left_s(), metadata=self._metadata).models:
                    return
            except grpc.RpcError as rpc_error:
                readiness.note(rpc_error)
            time.sleep(POLL_INTERVAL_S)

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        attempts = Attempts(policy=self._retry, total_s=self._timeout.total_s)
        while True:
            try:
                return method(request, timeout=attempts.begin(), metadata=self._metadata)
            except grpc.RpcError as rpc_error:
                failure = error_from_rpc(rpc_error)
                delay_s = attempts.backoff_s(failure, within_s=self._timeout.total_s)
                if delay_s is None:
                    raise failure from rpc_error
            time.sleep(delay_s)
