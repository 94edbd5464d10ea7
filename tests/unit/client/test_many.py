"""Many requests in one call: their order, how many at once, and what ends the rest."""

import asyncio
import signal
import subprocess
import sys
import textwrap
import time

import grpc
import pytest
from vlcache import AsyncClient, Client, NotFound, Request, Sampling

from tests.unit.client.conftest import FAST_RETRIES
from tests.unit.client.echo import HANG, EchoService
from tests.unit.client.service import fail, serve, whole_answer

KINDS = ("threads", "asyncio")


@pytest.fixture
def echo():
    service = EchoService()
    server = serve(service)
    yield service
    service.cancelled.set()
    server.stop(grace=None).wait()


def ask_many(kind, address, requests, **options):
    """The same call of either client."""
    if kind == "threads":
        with Client(address, retry=FAST_RETRIES) as client:
            return client.generate_many(requests, **options)

    async def run():
        async with AsyncClient(address, retry=FAST_RETRIES) as client:
            return await client.generate_many(requests, **options)

    return asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_answers_come_in_the_order_of_the_requests(echo, kind):
    questions = [str(number) for number in range(9)]
    echo.delays_s = {"0": 0.3, "1": 0.1}
    answers = ask_many(kind, echo.address, map(Request, questions), concurrency=3)
    assert [str(answer) for answer in answers] == questions
    assert 1 < echo.most_at_once <= 3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_asked_is_nothing_answered(echo, kind):
    assert ask_many(kind, echo.address, []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_a_request_is_sent(echo, kind, tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    request = Request(
        "?", images=[tmp_path / "a.png"], sampling=Sampling(seed=3), model="m", priority=-2, request_id="mine"
    )
    (answer,) = ask_many(kind, echo.address, [request])
    (sent,) = echo.requests
    assert (sent.messages[0].parts[0].image.data, sent.sampling.seed, sent.model, sent.priority) == (b"png", 3, "m", -2)
    assert answer.request_id == sent.request_id == "mine"


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_error_ends_the_rest(echo, kind):
    requests = [Request(HANG), Request("no such thing"), *[Request("late")] * 20]
    echo.gates = {"no such thing": echo.has_begun}
    begun = time.monotonic()
    with pytest.raises(NotFound, match="no such thing"):
        ask_many(kind, echo.address, requests, concurrency=2)
    assert echo.cancelled.wait(5)
    assert time.monotonic() - begun < 5
    assert len(echo.requests) < len(requests)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_stand_in_the_places_of_their_answers(echo, kind):
    requests = [Request("a"), Request("no"), Request("b", images=["missing.png"]), Request("c", priority=101)]
    first, *failures = ask_many(kind, echo.address, requests, on_error="return", concurrency=1)
    assert first.text == "a"
    assert [type(failure) for failure in failures] == [NotFound, FileNotFoundError, ValueError]


@pytest.mark.parametrize("kind", KINDS)
def test_a_retry_keeps_its_id(service, kind):
    service.attempts = [[fail(grpc.StatusCode.UNAVAILABLE)], whole_answer()]
    (answer,) = ask_many(kind, service.address, [Request("?")])
    assert answer.text == "a red dot"
    assert len({request.request_id for request in service.requests}) == 1
    assert len(service.requests) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("option", "value"), [("concurrency", 0), ("on_error", "ignore")])
def test_an_option_out_of_its_range_is_refused(echo, kind, option, value):
    with pytest.raises(ValueError, match=option):
        ask_many(kind, echo.address, [Request("a")], **{option: value})
    assert echo.requests == []


def test_a_cancelled_caller_cancels_its_requests(echo):
    async def run():
        async with AsyncClient(echo.address) as client:
            asking = asyncio.create_task(client.generate_many([Request(HANG)] * 2))
            await asyncio.to_thread(echo.has_begun.wait, 5)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(run())
    assert echo.cancelled.wait(5)


def test_ctrl_c_cancels_the_requests(echo):
    program = f"""
        from vlcache import Client, Request
        with Client({echo.address!r}) as client:
            try:
                client.generate_many([Request({HANG!r})] * 50, concurrency=2)
            except KeyboardInterrupt:
                print("interrupted")
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while len(echo.requests) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "interrupted\n", "")
    assert echo.cancelled.wait(5)
    assert len(echo.requests) == 2
