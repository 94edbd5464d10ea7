"""The public port's limits: what is too large is refused, and the next call is served."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from vlcache.v1 import inference_pb2 as pb

from shared.rpc.options import MAX_REQUEST_BYTES, PUBLIC_OPTIONS
from tests.unit.router.fakes import Bench, ask, bench, forever, kinds, run

GENERATE = "/vlcache.v1.InferenceService/Generate"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1 << 20)]


async def code_of(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(call))
    return caught.value.code().name


async def serves_on(b: Bench) -> None:
    assert kinds(await b.answer())[-1] == "finished"


def test_a_message_above_the_limit_is_refused_also_where_it_is_small_while_it_travels() -> None:
    async def main() -> None:
        async with bench() as b, grpc.aio.insecure_channel(b.router.address, options=UNLIMITED) as channel:
            generate = channel.unary_stream(GENERATE)
            for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
                body = bytes(MAX_REQUEST_BYTES + (1 << 20))
                assert await code_of(generate(body, compression=compression)) == "RESOURCE_EXHAUSTED"
            assert b.prefill[0].requests == []
            await serves_on(b)

    run(main)


def test_metadata_above_the_limit_is_refused() -> None:
    async def main() -> None:
        async with bench() as b, grpc.aio.insecure_channel(b.router.address, options=UNLIMITED) as channel:
            generate = channel.unary_stream(GENERATE)
            metadata = (("x-large", "x" * 20_000),)
            assert await code_of(generate(ask().SerializeToString(), metadata=metadata)) == "RESOURCE_EXHAUSTED"
            await serves_on(b)

    run(main)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [pb.Message(role="user", parts=[pb.Part(image=pb.Image(data=b"x"))] * 3 + [pb.Part(text="?")])]},
        {"request_id": "x" * 129},
        {"sampling": pb.SamplingParams(max_new_tokens=1 << 30)},
        {"priority": 101},
    ],
)
def test_a_request_beyond_a_limit_is_refused_before_any_worker_hears_of_it(change: dict[str, Any]) -> None:
    async def main() -> None:
        async with bench() as b:
            assert await code_of(b.stub.Generate(ask(**change))) == "INVALID_ARGUMENT"
            assert b.decode[0].reserves == []

    run(main)


def test_calls_of_one_connection_beyond_the_limit_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [(name, 3 if name == "grpc.max_concurrent_streams" else value) for name, value in PUBLIC_OPTIONS]
    assert few != PUBLIC_OPTIONS
    monkeypatch.setattr("router.router.PUBLIC_OPTIONS", few)

    async def main() -> None:
        async with bench() as b:
            # a new connection has not heard of the limit yet
            await b.stub.ListModels(pb.ListModelsRequest())
            b.prefill[0].script = lambda _: [forever()]
            calls = [b.ask() for _ in range(5)]
            await b.prefill[0].requests.reaches(3)
            async with grpc.aio.insecure_channel(b.router.address, options=[("x", 1)]) as another:
                # another connection is not theirs
                rpc = another.unary_unary(
                    "/vlcache.v1.InferenceService/ListModels", response_deserializer=pb.ListModelsResponse.FromString
                )
                assert (await rpc(b"", timeout=10)).models
            assert len(b.prefill[0].requests) == 3
            # whichever came first, one of these is served
            for call in calls[:3]:
                call.cancel()
            await b.prefill[0].requests.reaches(4)
            for call in calls:
                call.cancel()

    run(main)
