"""Tokens: who is let in, as whom, and that nothing of a tenant is reachable for another."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from vlcache.v1 import inference_pb2 as pb

from router.admission import api_tokens
from router.admission.api_tokens import ApiTokens, read_tokens
from router.admission.callers import Callers
from router.config import RouterConfig
from shared.errors import InvalidRequestError, PermissionDeniedError, ServiceError, UnauthenticatedError
from shared.rpc.status import from_rpc_error
from tests.unit.router.fakes import Bench, ask, bench, forever, kinds, run

TOKENS = {"red": "secret-of-red", "blue": "secret-of-blue"}


def line(tenant: str, token: str) -> str:
    return f"{tenant} {hashlib.sha256(token.encode()).hexdigest()}\n"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.txt"
    file.write_text("# who may call\n\n" + "".join(line(*entry) for entry in TOKENS.items()))
    return file


def bearer(token: str, **more: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"), *((key.replace("_", "-"), value) for key, value in more.items()))


RED = bearer(TOKENS["red"])


def test_a_file_is_read(tokens: Path) -> None:
    assert sorted(read_tokens(tokens).values()) == ["blue", "red"]
    tokens.write_text(tokens.read_text() + line("red", "second")[:-1].replace(" ", "\t") + "   # to come\n")
    assert sorted(read_tokens(tokens).values()) == ["blue", "red", "red"]
    assert ApiTokens(tokens).tenant_of("second") == "red"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("red", "line 1 .* is not a tenant and a SHA-256"),
        ("\nred 0123", "line 2 .* is not"),
        ("red " + "g" * 64, "is not a tenant"),
        ("a/b " + "0" * 64, "is not a tenant"),
        (f"red {'0' * 64} more", "is not a tenant"),
        (f"red {'0' * 64}\nblue {'0' * 64}", "line 2 .* a second tenant"),
    ],
)
def test_a_wrong_line_is_named_and_not_shown(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_tokens(file)
    assert "0" * 8 not in str(caught.value)


def test_a_router_does_not_start_with_tokens_that_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        RouterConfig(registry="static://a:1", api_tokens=tmp_path / "none")


def test_every_hash_is_compared_and_in_constant_time(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare_digest = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return compare_digest(left, right)

    monkeypatch.setattr(api_tokens.hmac, "compare_digest", compare)
    known = ApiTokens(tokens)
    for token in (*TOKENS.values(), "nobody's", "", "é"):
        compared.clear()
        known.tenant_of(token)
        assert set(compared) == set(read_tokens(tokens))


def test_no_token_lies_in_the_file_or_in_memory(tokens: Path) -> None:
    assert "secret" not in tokens.read_text()
    known = ApiTokens(tokens)
    assert "secret" not in repr(vars(known)) + repr(known._tenants.current())


def test_the_file_is_read_again_when_it_changes_and_a_broken_one_is_not(
    tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = ApiTokens(tokens)
    tokens.write_text(line("red", "another"))
    assert known.tenant_of(TOKENS["red"]) is None
    assert known.tenant_of("another") == "red"
    tokens.write_text("red oops")
    assert known.tenant_of("another") == "red"
    assert "line 1" in caplog.text
    tokens.unlink()
    assert known.tenant_of("another") == "red"
    tokens.write_text("")
    assert known.tenant_of("another") is None


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ((), UnauthenticatedError),
        ((("authorization", "Bearer "),), UnauthenticatedError),
        ((("authorization", "Basic secret-of-red"),), UnauthenticatedError),
        ((("authorization", "secret-of-red"),), UnauthenticatedError),
        (RED + RED, UnauthenticatedError),
        ((("authorization", b"Bearer secret-of-red"),), UnauthenticatedError),
        (bearer("secret-of-re"), UnauthenticatedError),
        (bearer("secret-of-red "), UnauthenticatedError),
        (bearer(TOKENS["red"], vlcache_tenant="blue"), PermissionDeniedError),
        (bearer(TOKENS["red"], vlcache_tenant="not a name"), InvalidRequestError),
        (bearer("wrong", vlcache_tenant="red"), UnauthenticatedError),
    ],
)
def test_wrong_callers_are_refused(tokens: Path, metadata: Any, error: type[ServiceError]) -> None:
    with pytest.raises(error) as caught:
        Callers(ApiTokens(tokens)).tenant_of(metadata)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "metadata", [RED, bearer(TOKENS["red"], vlcache_tenant="red"), (("authorization", "bearer secret-of-red"),)]
)
def test_right_callers_are_known_by_their_token(tokens: Path, metadata: Any) -> None:
    assert Callers(ApiTokens(tokens)).tenant_of(metadata) == "red"


EVERY_RPC = pb.DESCRIPTOR.services_by_name["InferenceService"].methods


def request_of(method: str) -> Any:
    return ask() if method == "Generate" else getattr(pb, f"{method}Request")()


async def answers(b: Bench, method: str, metadata: Any) -> list[Any]:
    call = getattr(b.stub, method)(request_of(method), metadata=metadata, timeout=20)
    return [event async for event in call] if method == "Generate" else [await call]


async def refusal(b: Bench, method: str, metadata: Any) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answers(b, method, metadata)
    return from_rpc_error(caught.value)


def test_every_rpc_of_the_public_service_needs_a_token_and_health_does_not(tokens: Path) -> None:
    async def main() -> None:
        async with bench(api_tokens=tokens) as b:
            assert len(EVERY_RPC) == 3
            for method in EVERY_RPC:
                assert (await refusal(b, method.name, ())).reason == "NO_TOKEN"
                assert (await refusal(b, method.name, bearer("wrong"))).reason == "BAD_TOKEN"
                denied = await refusal(b, method.name, bearer(TOKENS["red"], vlcache_tenant="blue"))
                assert (denied.code, denied.reason) == ("PERMISSION_DENIED", "TENANT")
                assert await answers(b, method.name, RED)
            assert [request.tenant for request in b.prefill[0].requests] == ["red"]
            assert await health_pb2_grpc.HealthStub(b.channel).Check(health_pb2.HealthCheckRequest())
            assert b.metric("requests_total", outcome="refused", code="UNAUTHENTICATED") == 6
            assert b.metric("requests_total", outcome="refused", code="PERMISSION_DENIED") == 3

    run(main)


def test_strangers_are_refused_before_their_message_is_read(tokens: Path) -> None:
    async def main() -> None:
        async with bench(api_tokens=tokens) as b:
            # no message is sent: who waits for one would never answer
            call = b.channel.stream_stream("/vlcache.v1.InferenceService/Generate")(timeout=20)
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED

    run(main)


async def refusal_of(b: Bench, metadata: Any) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in b.stub.Generate(ask(request_id="mine"), metadata=metadata):
            pass
    return from_rpc_error(caught.value)


def test_an_id_of_another_tenant_in_flight_is_free(tokens: Path) -> None:
    async def main() -> None:
        async with bench(api_tokens=tokens) as b:
            usual = b.prefill[0].script
            b.prefill[0].script = lambda request: [forever()] if request.tenant == "red" else usual(request)
            running = b.stub.Generate(ask(request_id="mine"), metadata=RED)
            await b.prefill[0].requests.reaches(1)
            again = await refusal_of(b, RED)
            assert (again.code, again.reason) == ("ALREADY_EXISTS", "DUPLICATE_REQUEST")
            events = [event async for event in b.stub.Generate(ask(request_id="mine"), metadata=bearer(TOKENS["blue"]))]
            assert kinds(events)[-1] == "finished"
            assert len(b.router.generations.running()) == 1
            running.cancel()

    run(main)


def test_a_finished_answer_is_not_repeated_to_another_tenant(tokens: Path) -> None:
    async def main() -> None:
        async with bench(api_tokens=tokens) as b:
            request = ask(request_id="mine", sampling=pb.SamplingParams(seed=1))
            for tenant in ("red", "red", "blue"):
                assert [event async for event in b.stub.Generate(request, metadata=bearer(TOKENS[tenant]))]
            assert [request.tenant for request in b.prefill[0].requests] == ["red", "blue"]

    run(main)


def test_a_token_that_is_taken_away_ends_no_running_answer(tokens: Path) -> None:
    async def main() -> None:
        async with bench(api_tokens=tokens) as b:
            goes_on = asyncio.Event()
            usual = b.prefill[0].script
            b.prefill[0].script = lambda request: [goes_on.wait(), *usual(request)]
            running = b.stub.Generate(ask(), metadata=RED)
            await b.prefill[0].requests.reaches(1)
            await asyncio.to_thread(tokens.write_text, line("blue", TOKENS["blue"]))
            assert (await refusal(b, "Generate", RED)).code == "UNAUTHENTICATED"
            goes_on.set()
            assert kinds([event async for event in running])[-1] == "finished"

    run(main)
