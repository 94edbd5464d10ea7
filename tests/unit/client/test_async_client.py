"""The asyncio twin, where it may differ from `Client`: everything that waits, cancels or fails."""

import asyncio
import contextlib
import time

import grpc
import pytest
from vlcache import (
    AlreadyExists,
    AsyncClient,
    Cancelled,
    DeadlineExceeded,
    Delta,
    InternalError,
    ResourceExhausted,
    Timeout,
    Unavailable,
)
from vlcache.v1 import inference_pb2 as pb

from tests.unit.client.conftest import FAST_RETRIES
from tests.unit.client.service import delta, fail, finished, pause, started, whole_answer

BUSY = fail(grpc.StatusCode.UNAVAILABLE, "no decode worker")
TAKEN = fail(grpc.StatusCode.ALREADY_EXISTS, "in flight")
LONG_FULL = fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=10)


@pytest.fixture
def run(service):
    """Runs `test(client)` in an event loop of its own."""

    def run_in_loop(test, **timeout):
        async def with_client():
            limits = Timeout(**({"total_s": 20} | timeout))
            async with AsyncClient(service.address, timeout=limits, retry=FAST_RETRIES) as client:
                return await test(client)

        return asyncio.run(with_client())

    return run_in_loop


def test_tenant_and_priority_travel(service):
    service.attempts = [whole_answer()]

    async def main():
        async with AsyncClient(service.address, tenant="team-a") as client:
            await client.generate("?", priority=-7)

    asyncio.run(main())
    assert (service.tenants, service.requests[0].priority) == (["team-a"], -7)


def test_events_arrive_in_order(service, run):
    service.attempts = [whole_answer()]

    async def test(client):
        async with client.stream("?", request_id="r1") as stream:
            return stream.request_id, [type(event).__name__ async for event in stream]

    names = ["Started", "Delta", "Compressed", "Transferred", "Delta", "Delta", "Finished"]
    assert run(test) == ("r1", names)


def test_generate_collects_and_times_the_answer(service, run):
    service.attempts = [[started(), pause(0.05), delta("a", 1), pause(0.1), delta("b", 2), finished(2)]]
    completion = run(lambda client: client.generate("?", images=[b"img"]))
    assert (completion.text, completion.token_ids) == ("ab", (1, 2))
    assert completion.timings.ttft_s >= 0.05
    assert completion.timings.itl_s[0] >= 0.09
    assert service.requests[0].messages[0].parts[0].image.data == b"img"


def test_many_requests_share_a_client(service, run):
    service.attempts = [whole_answer() for _ in range(8)]

    async def test(client):
        return await asyncio.gather(*(client.generate(f"{i}?") for i in range(8)))

    assert [completion.text for completion in run(test)] == ["a red dot"] * 8
    assert len({request.request_id for request in service.requests}) == 8


def test_leaving_early_cancels_the_request(service, run):
    service.attempts = [[started(), delta("a", 1), service.hang]]

    async def test(client):
        async with client.stream("?") as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    break
        with pytest.raises(Cancelled):
            await stream.result()
        return await asyncio.to_thread(service.cancelled.wait, 5)

    assert run(test)


def test_cancelling_the_task_cancels_the_request(service, run):
    service.attempts = [[started(), service.hang]]

    async def test(client):
        task = asyncio.create_task(client.generate("?"))
        await asyncio.to_thread(service.asked.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await asyncio.to_thread(service.cancelled.wait, 5)

    assert run(test)


def test_closing_from_another_task_ends_a_waiting_read(service, run):
    service.attempts = [[started(), service.hang]]

    async def test(client):
        async with client.stream("?") as stream:
            await anext(stream)
            asyncio.get_running_loop().call_later(0.05, stream.close)
            with pytest.raises(Cancelled, match="closed"):
                await anext(stream)

    run(test)
    assert service.cancelled.wait(5)


def test_the_deadline_reaches_the_service_and_ends_the_call(service, run):
    service.attempts = [[started(), service.hang]]
    with pytest.raises(DeadlineExceeded):
        run(lambda client: client.generate("?"), total_s=0.6)
    assert 0 < service.remaining_s[0] < 0.7


def test_a_late_first_token_ends_the_call(service, run):
    service.attempts = [[started(), service.hang]]
    with pytest.raises(DeadlineExceeded, match=r"no token within 0\.5 s") as caught:
        run(lambda client: client.generate("?"), first_token_s=0.5)
    assert caught.value.details["stage"] == "first_token"
    assert service.cancelled.wait(5)


def test_the_first_token_limit_ends_with_the_first_token(service, run):
    service.attempts = [[started(), delta("a", 1), pause(0.7), delta("b", 2), finished(2)]]
    assert run(lambda client: client.generate("?"), first_token_s=0.5).text == "ab"


def test_retries_carry_the_same_request(service, run):
    service.attempts = [[BUSY], [TAKEN], whole_answer()]
    assert run(lambda client: client.generate("?")).text == "a red dot"
    first, *others = service.requests
    assert len(others) == 2
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("attempts", "error", "num_sent"),
    [
        ([[BUSY]] * 5, Unavailable, 3),
        ([[started(), BUSY], whole_answer()], Unavailable, 1),
        ([[TAKEN], whole_answer()], AlreadyExists, 1),
        ([[LONG_FULL], whole_answer()], ResourceExhausted, 1),
        ([[started(), delta("a", 1)]], InternalError, 1),
    ],
)
def test_what_cannot_be_retried_is_raised(service, run, attempts, error, num_sent):
    service.attempts = attempts
    with pytest.raises(error) as caught:
        run(lambda client: client.generate("?", request_id="r9"), total_s=5)
    assert caught.value.request_id == "r9"
    assert len(service.requests) == num_sent


def test_models_and_info_are_typed(service, run):
    service.models = [[pb.Model(name="shapes-vlm", policies=["vl_cache"])]]
    service.info.version = "1.2.3"

    async def test(client):
        return await client.models(), await client.info()

    (model,), info = run(test)
    assert (model.name, model.policies) == ("shapes-vlm", ("vl_cache",))
    assert info.version == "1.2.3"


def test_unary_calls_are_retried(service, run):
    service.models = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, [pb.Model(name="m")]]
    (model,) = run(lambda client: client.models())
    assert model.name == "m"


def test_wait_ready_waits_for_a_model(service, run):
    service.models = [grpc.StatusCode.UNAVAILABLE, [], [pb.Model(name="m")]]
    run(lambda client: client.wait_ready(5))
    assert len(service.models) == 1


def test_wait_ready_gives_up(service, run):
    service.models = [[]]
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="no model"):
        run(lambda client: client.wait_ready(0.3))
    assert time.monotonic() - began < 3


def test_a_stream_that_is_never_read_leaves_nothing_behind(service, run):
    async def test(client):
        with contextlib.suppress(StopAsyncIteration):
            async with client.stream("?") as stream:
                stream.close()
                await anext(stream)

    run(test)
    assert service.requests == []
