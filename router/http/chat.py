"""`POST /v1/chat/completions`."""

from __future__ import annotations

import contextlib

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from router.http.body import read_body
from router.http.completion import Chunks, Completion
from router.http.errors import known
from router.http.exchange import REQUEST_ID, Exchange
from router.http.fields import Ignored, check_fields
from router.http.messages import to_messages
from router.http.presence import Attended
from router.http.remote_images import RemoteImages
from router.http.requests import to_request, valid_id
from router.http.schema import ChatRequest, parse
from router.requests.reception import Answer, Reception
from shared.errors import ServiceError
from shared.telemetry.scope import Scope as Work
from shared.telemetry.scope import within
from shared.telemetry.span import Metadata


class ChatCompletions:
    """An ASGI application: reads a request, has it answered as one of the gRPC API, and writes the answer."""

    def __init__(self, reception: Reception, remote: RemoteImages, *, timeout_s: float) -> None:
        """Prepares.

        Args:
            timeout_s: How long any client waits for all of its answer.
        """
        self._reception = reception
        self._remote = remote
        self._timeout_s = timeout_s
        self._ignored = Ignored()
        self._attended = Attended()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        exchange = Exchange(send)
        try:
            await self._serve(Headers(scope=scope), receive, exchange)
        except Exception as error:
            with within(Work(request_id=exchange.request_id)):
                failure = known(error, "POST /v1/chat/completions")
            await exchange.fail(failure)

    async def stop(self, grace_s: float) -> None:
        """Ends what is not written after `grace_s`."""
        await self._attended.stop(grace_s)

    async def _serve(self, headers: Headers, receive: Receive, exchange: Exchange) -> None:
        metadata = headers.items()
        # before the body: strangers do not fill the memory
        tenant = self._reception.tenant_of(metadata)
        exchange.request_id = valid_id(headers.get(REQUEST_ID, ""))
        try:
            asked = parse(await read_body(headers, receive))
            check_fields(asked, self._ignored)
        except ServiceError as error:
            self._reception.refused(error, tenant=tenant, request_id=exchange.request_id)
            raise
        await self._attended.run(self._answer(asked, tenant, metadata, exchange), receive)

    async def _answer(self, asked: ChatRequest, tenant: str, metadata: Metadata, exchange: Exchange) -> None:
        answer = await self._open(asked, tenant, metadata, exchange)
        try:
            async with contextlib.aclosing(answer.events):
                await _write(answer, asked, exchange)
        finally:
            # events that nobody has asked for yet end nothing
            answer.close()

    async def _open(self, asked: ChatRequest, tenant: str, metadata: Metadata, exchange: Exchange) -> Answer:
        try:
            message = to_request(asked, header_id=exchange.request_id)
            exchange.request_id = valid_id(message.request_id)
            message.messages.extend(await to_messages(asked.messages, self._remote))
        except ServiceError as error:
            self._reception.refused(error, tenant=tenant, request_id=exchange.request_id)
            raise
        try:
            return self._reception.open(message, self._timeout_s, tenant=tenant, metadata=metadata)
        finally:
            # the one that was made for it, which the log has also where it is refused
            exchange.request_id = valid_id(message.request_id)


async def _write(answer: Answer, asked: ChatRequest, exchange: Exchange) -> None:
    if asked.stream:
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        await _stream(answer, Chunks(include_usage=include_usage), exchange)
    else:
        await exchange.reply(await _whole(answer))


async def _whole(answer: Answer) -> object:
    completion = Completion()
    async for event in answer.events:
        completion.add(event)
    return completion.json()


async def _stream(answer: Answer, chunks: Chunks, exchange: Exchange) -> None:
    async for event in answer.events:
        for chunk in chunks.of(event):
            await exchange.write(chunk)
    await exchange.end()
