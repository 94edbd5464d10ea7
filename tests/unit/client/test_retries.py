import socket
import threading
import time

import grpc
import pytest
from vlcache import (
    AlreadyExists,
    Client,
    InvalidRequest,
    ResourceExhausted,
    RetryPolicy,
    Timeout,
    Unavailable,
)
from vlcache._attempts import Attempts

from tests.unit.client.service import ScriptedService, delta, fail, finished, serve, started, whole_answer

BUSY = fail(grpc.StatusCode.UNAVAILABLE, "no decode worker")
FULL = fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=0.3)
LONG_FULL = fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=10)
TAKEN = fail(grpc.StatusCode.ALREADY_EXISTS, "in flight")
ONCE = RetryPolicy(max_attempts=1)


def test_a_retry_carries_the_same_request(service, client):
    service.attempts = [[BUSY], [BUSY], whole_answer()]
    assert client.generate("?").text == "a red dot"
    first, *others = service.requests
    assert len(others) == 2
    assert all(other == first for other in others)
    assert first.request_id


def test_attempts_end_with_the_last_error(service, client):
    service.attempts = [[BUSY]] * 5
    with pytest.raises(Unavailable, match="no decode worker"):
        client.generate("?")
    assert len(service.requests) == 3


def test_other_errors_are_not_retried(service, client):
    service.attempts = [[fail(grpc.StatusCode.INVALID_ARGUMENT)], whole_answer()]
    with pytest.raises(InvalidRequest):
        client.generate("?")
    assert len(service.requests) == 1


def test_nothing_is_retried_after_the_first_event(service, client):
    service.attempts = [[started(), BUSY], whole_answer()]
    with pytest.raises(Unavailable):
        client.generate("?")
    assert len(service.requests) == 1


def test_the_wait_that_the_service_asks_for_is_respected(service, client):
    service.attempts = [[FULL], whole_answer()]
    client.generate("?")
    assert service.arrived_at[1] - service.arrived_at[0] >= 0.3


def test_a_full_service_without_advice_is_not_asked_again(service, client):
    service.attempts = [[fail(grpc.StatusCode.RESOURCE_EXHAUSTED)], whole_answer()]
    with pytest.raises(ResourceExhausted):
        client.generate("?")


def test_an_id_in_flight_is_ours_only_on_a_retry(service, client):
    service.attempts = [[BUSY], [TAKEN], whole_answer()]
    assert client.generate("?").text == "a red dot"
    service.attempts = [[TAKEN], whole_answer()]
    with pytest.raises(AlreadyExists):
        client.generate("?")


def test_one_deadline_covers_all_attempts(service):
    service.attempts = [[FULL], whole_answer()]
    # Short, because gRPC rounds long timeouts up on the wire.
    with Client(service.address, timeout=Timeout(total_s=3)) as client:
        client.generate("?")
    assert 2 < service.remaining_s[1] <= 2.8


@pytest.mark.parametrize("timeout", [Timeout(total_s=2), Timeout(first_token_s=2)])
def test_a_wait_beyond_the_limit_is_not_begun(service, timeout):
    service.attempts = [[LONG_FULL], whole_answer()]
    began = time.monotonic()
    with Client(service.address, timeout=timeout) as client, pytest.raises(ResourceExhausted):
        client.generate("?")
    assert time.monotonic() - began < 2


def test_times_count_from_the_first_attempt(service, client):
    service.attempts = [[FULL], [started(), delta("a", 1), finished(1)]]
    assert client.generate("?").timings.ttft_s >= 0.3


def test_closing_during_a_backoff_ends_the_stream(service, client):
    service.attempts = [[LONG_FULL], whole_answer()]
    began = time.monotonic()
    with client.stream("?") as stream:
        closer = threading.Timer(0.3, stream.close)
        closer.start()
        assert list(stream) == []
        closer.join()
    assert time.monotonic() - began < 5
    assert len(service.requests) == 1


def test_a_refused_connection_fails_fast():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with Client(f"127.0.0.1:{reserved.getsockname()[1]}", retry=ONCE) as client, pytest.raises(Unavailable):
            client.generate("?")
    assert time.monotonic() - began < 2


def test_a_service_that_comes_back_is_found_within_our_own_backoff():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    service = ScriptedService()
    service.attempts = [whole_answer()]
    with Client(address, retry=ONCE) as client:
        with pytest.raises(Unavailable):
            client.generate("?")
        server = serve(service, address)
        # gRPC by itself would remember the refused connection for a second.
        time.sleep(0.6)
        assert client.generate("?").text == "a red dot"
    server.stop(grace=None).wait()


def test_a_mute_peer_is_given_up_after_the_connect_timeout():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with (
            Client(address, timeout=Timeout(connect_s=0.5, total_s=15), retry=ONCE) as client,
            pytest.raises(Unavailable),
        ):
            client.generate("?")
    assert 0.4 < time.monotonic() - began < 5


def test_backoff_grows_to_its_maximum():
    policy = RetryPolicy(max_attempts=9, initial_backoff_s=1, max_backoff_s=5, multiplier=2, jitter=0)
    attempts = Attempts(policy=policy, total_s=1000)
    error = Unavailable("no", code=grpc.StatusCode.UNAVAILABLE, retryable=True)
    delays = []
    for _ in range(9):
        attempts.begin()
        delays.append(attempts.backoff_s(error, within_s=1000))
    assert delays == [1, 2, 4, 5, 5, 5, 5, 5, None]


def test_jitter_only_shortens_and_never_below_what_the_service_asks():
    policy = RetryPolicy(max_attempts=1000, initial_backoff_s=1, max_backoff_s=1, jitter=0.5)
    attempts = Attempts(policy=policy, total_s=1000)
    error = Unavailable("no", code=grpc.StatusCode.UNAVAILABLE, retryable=True)
    attempts.begin()
    delays = [attempts.backoff_s(error, within_s=1000) for _ in range(200)]
    assert 0.5 <= min(delays) < 0.7 < 0.8 < max(delays) <= 1
    error.retry_after_s = 0.9
    assert min(attempts.backoff_s(error, within_s=1000) for _ in range(100)) >= 0.9
