"""Requests over HTTP, from their first byte to the last event: the same path as gRPC's."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from vlcache.worker.v1 import decode_pb2

from router.http import chat as chat_module
from router.http.server import HttpServer
from shared import errors
from shared.telemetry.span import NO_SPAN
from tests.unit.router.fakes import (
    KEPT_BYTES,
    FakeDecode,
    FakePrefill,
    compression,
    first_token,
    forever,
    go_on,
    hang,
    run,
    served_model,
    transfer,
)
from tests.unit.router.http.served import CHAT, chat, error_of, events_of, served, until

CHOICE = {"index": 0, "message": {"role": "assistant", "content": "ABC", "refusal": None}}


def test_an_answer() -> None:
    async def main() -> None:
        async with served() as s:
            response = await s.ask(images=1, temperature=0.5, seed=7, max_tokens=9, retention=0.25, stop="END")
            assert response.status_code == 200
            answer = response.json()
            assert answer["choices"] == [{**CHOICE, "logprobs": None, "finish_reason": "length"}]
            assert answer["usage"]["total_tokens"] == 53
            assert answer["usage"]["kv"]["kept_bytes"] == KEPT_BYTES
            assert answer["id"] == f"chatcmpl-{response.headers['x-request-id']}"
            sent = s.prefill.requests[0].request
            assert sent.messages[0].parts[0].image.data == b"png"
            assert (sent.sampling.temperature, sent.sampling.seed) == (0.5, 7)
            assert (sent.sampling.max_new_tokens, list(sent.sampling.stop)) == (9, ["END"])
            assert sent.compression.retention == 0.25
            assert s.bench.metric("requests_total", outcome="finished", code="OK") == 1
            assert s.bench.metric("generation_tokens_total") == 3

    run(main)


def test_greedy_and_the_servers_own_defaults_where_nothing_is_said() -> None:
    async def main() -> None:
        async with served() as s:
            await s.ask()
            sampling = s.prefill.requests[0].request.sampling
            assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.0, 1.0, 16)

    run(main)


def test_a_stream() -> None:
    async def main() -> None:
        async with served() as s:
            response = await s.ask(stream=True, stream_options={"include_usage": True})
            assert response.headers["content-type"].startswith("text/event-stream")
            *said, usage, done = events_of(response.text)
            deltas = [each["choices"][0]["delta"] for each in said]
            assert deltas == [{"role": "assistant", "content": "A"}, {"content": "B"}, {"content": "C"}]
            assert usage["usage"]["kv"]["sent_bytes"] == 120
            assert done == "[DONE]"

    run(main)


def test_tokens_leave_as_they_come() -> None:
    async def main() -> None:
        async with served() as s:
            more = asyncio.Event()

            async def script(stream: Any, handle: int, token: bytes) -> None:
                await more.wait()
                await go_on(until=8)(stream, handle, token)

            s.decode.script = script
            async with s.asking() as response:
                lines = response.aiter_lines()
                assert '"content":"A"' in await anext(lines)
                more.set()
                rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert len(rest) == 8

    run(main)


def test_a_request_that_can_never_work_is_a_400_also_where_the_worker_finds_out() -> None:
    async def main() -> None:
        async with served() as s:
            for stream in (False, True):
                assert error_of(await s.ask(temperature=-1, stream=stream))["message"].startswith("temperature must")
                s.prefill.script = lambda _: [errors.InvalidRequestError("image 1 is no image", reason="IMAGE")]
                response = await s.ask(stream=stream)
                assert (response.status_code, error_of(response)["code"]) == (400, "image")
                s.prefill.script = lambda _: [errors.ContextTooLongError("4097 tokens; at most 4096 are allowed")]
                response = await s.ask(stream=stream)
                assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")

    run(main)


def test_refusals_are_counted_whichever_way_they_come_about() -> None:
    async def main() -> None:
        async with served() as s:
            assert (await s.client.post(CHAT, content=b"{")).status_code == 400
            assert (await s.ask(tools=[{}])).status_code == 400
            assert (await s.ask(retention=0.1, max_kept_tokens=4)).status_code == 400
            assert (await s.ask(messages=[{"role": "user", "content": " "}])).status_code == 400
            assert s.bench.metric("requests_total", outcome="refused", code="INVALID_ARGUMENT") == 4
            assert s.bench.metric("num_requests_running") == 0

    run(main)


def test_an_unknown_model_and_none_at_all() -> None:
    async def main() -> None:
        async with served() as s:
            response = await s.ask(model="gpt-5")
            assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
            assert (await s.ask(model="toy")).status_code == 200
        async with served(decode=[FakeDecode(model=served_model("other"))]) as s:
            response = await s.ask(model="toy")
            assert (response.status_code, error_of(response)["type"]) == (503, "server_error")
            assert int(response.headers["retry-after"]) >= 1

    run(main)


def test_no_room_says_when_to_come_back() -> None:
    async def main() -> None:
        async with served(queue_timeout_s=0.2) as s:
            s.decode.admit = full
            response = await s.ask(stream=True)
            assert (response.status_code, error_of(response)["type"]) == (429, "rate_limit_error")
            assert int(response.headers["retry-after-ms"]) > 0

    run(main)


@pytest.mark.parametrize("include_usage", [False, True])
def test_an_error_in_the_middle_of_a_stream_is_an_event(include_usage: bool) -> None:
    async def main() -> None:
        async with served(max_failovers=0) as s:

            async def script(stream: Any, handle: int, token: bytes) -> None:
                stream.send(decode_pb2.SequenceUpdate(handle=handle, token_ids=[2], text="B"))
                stream.fail(handle, errors.InternalError("it broke", reason="BROKEN"))

            s.decode.script = script
            response = await s.ask(stream=True, stream_options={"include_usage": include_usage})
            *said, error, done = events_of(response.text)
            assert "".join(each["choices"][0]["delta"]["content"] for each in said) == "AB"
            assert error["error"]["code"] == "broken"
            assert done == "[DONE]"

    run(main)


def test_a_whole_answer_fails_with_the_errors_status() -> None:
    async def main() -> None:
        async with served(http_timeout_s=0.3) as s:
            s.decode.script = hang
            response = await s.ask()
            assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
            assert response.headers["x-should-retry"] == "false"
            assert s.bench.metric("requests_total", outcome="failed", code="DEADLINE_EXCEEDED") == 1

    run(main)


def test_a_bug_is_a_500_that_says_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("secret")

    async def main() -> None:
        async with served() as s:
            with monkeypatch.context() as patch:
                patch.setattr(chat_module, "to_request", broken)
                response = await s.ask()
            assert response.status_code == 500
            assert "secret" not in response.text
            assert (await s.ask()).status_code == 200

    run(main)
    assert "bug in POST /v1/chat/completions" in caplog.text


def full(_: object) -> None:
    raise errors.ResourceExhaustedError("the pool is full")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["queue", "prefill", "decode"])
def test_a_client_that_leaves_takes_its_request_with_it(stage: str, stream: bool) -> None:
    async def main() -> None:
        async with served() as s:
            b = s.bench
            if stage == "queue":
                s.decode.admit = full
            elif stage == "prefill":
                s.prefill.script = lambda _: [forever()]
            else:
                s.prefill.script = lambda _: [first_token(), compression(), transfer()]
                s.decode.script = hang
            asking = asyncio.create_task(s.ask(stream=stream, request_id="gone"))
            logs = {"queue": s.decode.reserves, "prefill": s.prefill.requests, "decode": s.decode.attached}
            await logs[stage].reaches(1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await asyncio.wait_for(b.router.generations.idle(), 5)
            assert b.metric("requests_total", outcome="cancelled", code="CANCELLED") == 1
            assert b.metric("cancellations_total", stage=stage) == 1

    run(main)


def test_a_client_that_leaves_before_its_request_is_complete() -> None:
    async def main() -> None:
        async with served() as s:
            _, writer = await s.connect()
            writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{".encode())
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            await until(lambda: s.bench.metric("requests_total", outcome="refused", code="CANCELLED") == 1)

    run(main)


def test_ids_answers_and_their_repetition_are_those_of_both_ports() -> None:
    async def main() -> None:
        async with served() as s:
            first = await s.ask({"x-request-id": "r-1"}, seed=1)
            assert first.headers["x-request-id"] == "r-1"
            again = await s.ask({"x-request-id": "r-1"}, seed=1)
            assert again.json()["choices"] == first.json()["choices"]
            assert len(s.prefill.requests) == 1
            assert s.bench.metric("requests_total", outcome="repeated", code="OK") == 1
            other = await s.ask({"x-request-id": "r-1"}, seed=2)
            assert (other.status_code, error_of(other)["code"]) == (409, "id_reused")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await s.bench.answer(request_id="r-1")
            assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
            assert (await s.ask({"x-request-id": "no id"}, seed=2)).status_code == 200

    run(main)


def test_whose_a_request_is_and_what_a_tenant_may() -> None:
    async def main() -> None:
        async with served(tenant_concurrency=1) as s:
            s.prefill.script = lambda _: [forever()]
            asking = asyncio.create_task(s.ask({"vlcache-tenant": "red"}))
            await s.prefill.requests.reaches(1)
            refused = await s.ask({"vlcache-tenant": "red"})
            assert len(refused.headers["x-request-id"]) == 32
            assert (refused.status_code, error_of(refused)["code"]) == (429, "tenant_concurrency")
            assert s.bench.metric("tenant_requests_running", tenant="red") == 1
            assert (await s.ask({"vlcache-tenant": "a/b"})).status_code == 400
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    run(main)


def test_without_a_token_nothing_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text(f"red {hashlib.sha256(b'secret').hexdigest()}\n")
    good, bad = {"authorization": "Bearer secret"}, {"authorization": "Bearer wrong"}

    async def main() -> None:
        async with served(api_tokens=file) as s:
            for headers in ({}, bad, {"authorization": "Basic secret"}):
                response = await s.ask(headers)
                assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
                for path in ("/v1/models", "/v1/models/toy", "/version"):
                    assert (await s.client.get(path, headers=headers)).status_code == 401
            assert (await s.ask(good)).status_code == 200
            assert (await s.ask({**good, "vlcache-tenant": "blue"})).status_code == 403
            assert s.bench.metric("tenant_generation_tokens_total", tenant="red") == 3
            for path in ("/v1/models", "/v1/models/toy", "/version"):
                assert (await s.client.get(path, headers=good)).status_code == 200
            assert (await s.client.get("/health")).status_code == 200
            # of the body only its size is known
            assert b" 401 " in await s.say(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n".encode())

    run(main)


def test_models_health_and_version() -> None:
    async def main() -> None:
        async with served() as s:
            (model,) = (await s.client.get("/v1/models")).json()["data"]
            assert (model["id"], model["object"], model["max_model_len"]) == ("toy", "model", 4096)
            assert (model["default_retention"], model["max_images"]) == (0.1, 2)
            assert (await s.client.get("/v1/models/toy")).json() == model
            assert error_of(await s.client.get("/v1/models/none"))["code"] == "model_not_found"
            assert (await s.client.get("/version")).json() == {"version": "0.1.0"}
            assert (await s.client.get("/health")).json() == {"status": "SERVING"}
            assert error_of(await s.client.get("/v1/nothing"))["code"] == "not_found"
            assert error_of(await s.client.get(CHAT))["code"] == "method_not_allowed"
        async with served(decode=[FakeDecode(model=served_model("other"))]) as s:
            response = await s.client.get("/health")
            assert (response.status_code, response.json()) == (503, {"status": "NOT_SERVING"})
            assert (await s.client.get("/v1/models")).json()["data"] == []

    run(main)


def test_a_model_with_a_slash_in_its_name() -> None:
    async def main() -> None:
        model = served_model("owner/name")
        async with served([FakePrefill(model=model)], [FakeDecode(model=model)]) as s:
            assert (await s.client.get("/v1/models/owner/name")).json()["id"] == "owner/name"

    run(main)


def test_a_drain_finishes_what_runs_and_refuses_what_is_new() -> None:
    async def main() -> None:
        async with served() as s:
            goes_on = asyncio.Event()

            async def script(stream: Any, handle: int, token: bytes) -> None:
                await goes_on.wait()
                await go_on()(stream, handle, token)

            s.decode.script = script
            asking = asyncio.create_task(s.ask(stream=True))
            await s.decode.attached.reaches(1)
            stopping = asyncio.create_task(s.bench.router.stop())
            await until(lambda: s.bench.router.generations.draining)
            refused = await s.ask()
            assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
            assert (await s.client.get("/health")).status_code == 503
            goes_on.set()
            assert events_of((await asking).text)[-1] == "[DONE]"
            assert await stopping
            with pytest.raises(httpx.ConnectError):
                await s.client.get("/health")

    run(main)


def test_a_drain_that_takes_too_long_tells_its_clients() -> None:
    async def main() -> None:
        async with served(drain_s=0.1) as s:
            s.decode.script = hang
            streaming, whole = asyncio.create_task(s.ask(stream=True)), asyncio.create_task(s.ask())
            await s.decode.attached.reaches(2)
            assert not await s.bench.router.stop()
            response = await whole
            assert (response.status_code, error_of(response)["code"]) == (503, "draining")
            *_, error, done = events_of((await streaming).text)
            assert (error["error"]["code"], done) == ("draining", "[DONE]")

    run(main)


def test_many_at_once() -> None:
    async def main() -> None:
        async with served() as s:
            responses = await asyncio.gather(*(s.ask(stream=bool(number % 2)) for number in range(64)))
            assert {response.status_code for response in responses} == {200}
            whole = [response.json()["choices"][0]["message"]["content"] for response in responses[::2]]
            assert set(whole) == {"ABC"}
            assert {len(events_of(response.text)) for response in responses[1::2]} == {4}

    run(main)


def test_the_retries_of_openais_client_wait_as_long_as_they_are_told() -> None:
    async def main() -> None:
        async with served(tenant_rate=10.0, tenant_burst=1) as s:
            url, http = f"http://{s.bench.router.http_address}/v1", httpx.AsyncClient(trust_env=False)
            hello: Any = chat()
            async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http, max_retries=1) as client:
                for _ in range(4):
                    await client.chat.completions.create(model="toy", **hello)
                with pytest.raises(openai.RateLimitError):
                    await client.with_options(max_retries=0).chat.completions.create(model="toy", **hello)
            refused = s.bench.metric("tenant_requests_refused_total", tenant="default", reason="TENANT_RATE")
            assert refused == 4

    run(main)


def test_the_trace_of_a_client_goes_on() -> None:
    class Tracer:
        def begin(self, name: str, metadata: Any, attributes: Any) -> Any:
            begun.append((name, dict(metadata)["traceparent"], attributes["request_id"]))
            return NO_SPAN

    begun: list[tuple[str, str, str]] = []
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def main() -> None:
        async with served() as s:
            s.bench.router.generations._tracer = Tracer()  # type: ignore[assignment]
            await s.ask({"traceparent": parent, "x-request-id": "r-1"})
            assert begun == [("Generate", parent, "r-1")]

    run(main)


def test_a_port_that_is_taken_is_an_error() -> None:
    async def main() -> None:
        async with served() as s:
            port = int(s.bench.router.http_address.rpartition(":")[2])
            with pytest.raises(OSError, match="cannot listen on"):
                await HttpServer.start(
                    s.bench.router._reception,
                    s.bench.router.table,
                    host="127.0.0.1",
                    port=port,
                    timeout_s=1,
                    image_url_hosts=(),
                    ui=False,
                    is_ready=lambda: True,
                    identity=None,
                    demand_client_cert=False,
                )

    run(main)
