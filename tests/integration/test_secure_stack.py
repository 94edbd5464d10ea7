"""The whole service with TLS, roles and tokens: the same answers, and nobody else gets any."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import vlcache
from vlcache.certs.authority import make_certificates
from vlcache.worker.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, kv_pb2_grpc, prefill_pb2, prefill_pb2_grpc

from deploy.local.forks import Forks
from deploy.local.processes import Announcement
from models.shapes_vlm.questions import draw_samples
from tests.certificates import Certificates
from tests.integration.conftest import COMBINED, stack_config
from tests.integration.running_stack import RunningStack

QUESTIONS = [(sample.question, sample.images) for sample in draw_samples(seed=990_031, count=3)]
ONCE = vlcache.RetryPolicy(max_attempts=1)
SHORT = {"timeout": vlcache.Timeout(connect_s=2, total_s=10), "retry": ONCE}


@pytest.fixture(scope="module")
def secure(forks: Forks) -> Iterator[RunningStack]:
    """Parcels travel through PutKV."""
    with RunningStack(stack_config("grpc", secure=True), forks) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


def ask_all(stack: RunningStack) -> list[vlcache.Completion]:
    with stack.client() as client:
        return [client.generate(question, images=images) for question, images in QUESTIONS]


def assert_same(secure: list[vlcache.Completion], plain: list[vlcache.Completion]) -> None:
    assert [answer.token_ids for answer in secure] == [answer.token_ids for answer in plain]
    assert [answer.compression for answer in secure] == [answer.compression for answer in plain]


def service(stack: RunningStack, role: str) -> Announcement:
    return next(service for service in stack.services if service.role == role)


def test_answers_are_the_same_over_put_kv(secure: RunningStack, grpc_stack: RunningStack) -> None:
    answers = ask_all(secure)
    assert {answer.transfer.transport for answer in answers if answer.transfer} == {"grpc"}
    assert_same(answers, ask_all(grpc_stack))
    secure.wait_idle()


@pytest.mark.parametrize(("transport", "workers"), [("memory", {}), ("local", COMBINED)])
def test_answers_are_the_same_over_install_kv_and_in_one_process(
    forks: Forks, grpc_stack: RunningStack, transport: str, workers: dict[str, int]
) -> None:
    with RunningStack(stack_config("auto", secure=True, **workers), forks) as stack:
        answers = ask_all(stack)
        stack.wait_idle()
    assert stack.clean
    assert {answer.transfer.transport for answer in answers if answer.transfer} == {transport}
    assert_same(answers, ask_all(grpc_stack))


def test_clients_without_what_it_takes_get_nothing(secure: RunningStack, tmp_path: Path) -> None:
    refused = [
        ({"token": None}, vlcache.Unauthenticated),
        ({"token": "wrong"}, vlcache.Unauthenticated),
        ({"tenant": "another"}, vlcache.PermissionDenied),
        ({"tls": None}, vlcache.Unavailable),
        ({"tls": vlcache.Tls(ca=Certificates(tmp_path).ca)}, vlcache.Unavailable),
    ]
    for options, error in refused:
        with secure.client(**SHORT, **options) as client:
            for call in (client.models, client.info, lambda client=client: client.generate("What?")):
                with pytest.raises(error):
                    call()


def code_of(call: object, *args: object) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, timeout=10)
    return caught.value.code()


def test_workers_take_calls_only_of_whom_the_table_says(secure: RunningStack) -> None:
    decode, prefill = service(secure, "decode"), service(secure, "prefill")
    denied = grpc.StatusCode.PERMISSION_DENIED
    for role in ("client", "prefill", "decode"):
        with secure.channel_to(decode, role) as channel:
            assert code_of(decode_pb2_grpc.DecodeServiceStub(channel).Reserve, decode_pb2.ReserveRequest()) is denied
        with secure.channel_to(prefill, role) as channel:
            stub = prefill_pb2_grpc.PrefillServiceStub(channel)
            assert code_of(stub.ReleaseParcels, prefill_pb2.ReleaseParcelsRequest()) is denied
    with secure.channel_to(decode, "router") as channel:
        stub = kv_pb2_grpc.KVTransferServiceStub(channel)
        assert code_of(stub.PutKV, iter([kv_pb2.PutKVRequest()])) is denied
    with grpc.insecure_channel(decode.address) as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        assert code_of(stub.Reserve, decode_pb2.ReserveRequest()) is grpc.StatusCode.UNAVAILABLE


def test_a_forged_reservation_is_none(secure: RunningStack) -> None:
    """A right role is not enough: whoever delivers must have been told the secret."""
    with secure.channel_to(service(secure, "decode"), "prefill") as channel:
        decode, transfer = decode_pb2_grpc.DecodeServiceStub(channel), kv_pb2_grpc.KVTransferServiceStub(channel)
        for token in (b"", b"\0" * 16, b"guess" * 10):
            opening = kv_pb2.PutKVOpening(token=token, format_version=1)
            calls = [
                (decode.Renew, decode_pb2.RenewRequest(token=token)),
                (decode.GrowReservation, decode_pb2.GrowReservationRequest(token=token, kept_tokens_bound=1)),
                (transfer.PutKV, iter([kv_pb2.PutKVRequest(opening=opening)])),
            ]
            assert [code_of(*call) for call in calls] == [grpc.StatusCode.NOT_FOUND] * 3


def test_certificates_are_renewed_under_a_running_answer(secure: RunningStack) -> None:
    sampling = vlcache.Sampling(max_new_tokens=400, ignore_eos=True)
    folder = secure.credentials.folder
    before = (folder / "decode.pem").read_bytes()
    with secure.client() as client, client.stream("Say something.", sampling=sampling) as stream:
        events = iter(stream)
        while not isinstance(next(events), vlcache.Delta):
            pass
        make_certificates(folder, hosts=["127.0.0.1", "localhost"])
        assert (folder / "decode.pem").read_bytes() != before
        # over new connections of this client, and of the router to the workers
        ask_all(secure)
        assert stream.result().usage.generated_tokens == 400
    secure.wait_idle()


def test_an_id_of_one_tenant_says_nothing_to_another(secure: RunningStack) -> None:
    token = "of-another"
    with secure.credentials.tokens_file.open("a") as tokens:
        tokens.write(f"another {hashlib.sha256(token.encode()).hexdigest()}\n")
    question, images = QUESTIONS[0]
    with secure.client() as mine, secure.client(token=token, retry=ONCE) as another:
        answer = mine.generate(question, images=images, request_id="same")
        with pytest.raises(vlcache.AlreadyExists, match="another one a moment ago"):
            mine.generate("Something else?", request_id="same")
        assert another.generate("Something else?", request_id="same").usage.generated_tokens
        assert mine.generate(question, images=images, request_id="same").token_ids == answer.token_ids
