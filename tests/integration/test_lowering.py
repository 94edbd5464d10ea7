"""A decode worker that is nearly full: a request that allows it is compressed harder instead of waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc
import vlcache
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, decode_pb2_grpc

from models.shapes_vlm.questions import draw_samples
from router.admission.retention import Offer
from router.validation import accept
from shared.kv.layout import KVLayout
from tests.integration.running_stack import RunningStack
from tests.integration.test_observability import samples_of

NEW_TOKENS = 4
SAMPLE = next(iter(draw_samples(seed=990_022, count=1)))
BUDGET = pb.CompressionParams(retention=0.8, min_retention=0.1)


def offers(stack: RunningStack) -> tuple[Offer, ...]:
    """What the router will ask memory for."""
    model = next(info.model for info in stack.worker_infos() if info.role == "prefill")
    parts = [*[pb.Part(image=pb.Image(data=b"png"))] * len(SAMPLE.images), pb.Part(text=SAMPLE.question)]
    message = pb.GenerateRequest(messages=[pb.Message(role="user", parts=parts)], compression=BUDGET)
    return accept(message, model).offers


@contextlib.contextmanager
def room_for(stack: RunningStack, tokens: int) -> Iterator[None]:
    """Leaves memory for `tokens` tokens of all layers in the decode worker while open."""
    prefill, decode = sorted(stack.worker_infos(), key=lambda info: info.role, reverse=True)
    token_bytes = KVLayout.from_proto(decode.model.layout).full_bytes(1)
    request = decode_pb2.ReserveRequest(
        request_id="ballast",
        model=decode.model.name,
        compatibility=decode.model.compatibility,
        kept_tokens_bound=decode.kv.capacity // token_bytes - tokens,
        max_new_tokens=1,
        prefill_epoch=prefill.epoch,
        epoch=decode.epoch,
    )
    address = next(service.address for service in stack.services if service.role == "decode")
    with grpc.insecure_channel(address) as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        token = stub.Reserve(request, timeout=10).token
        try:
            yield
        finally:
            stub.Release(decode_pb2.ReleaseRequest(token=token), timeout=10)


def test_less_is_kept_rather_than_waited_and_the_client_is_told(memory_stack: RunningStack) -> None:
    wanted = offers(memory_stack)
    middle = (wanted[1].kept_tokens_bound + wanted[2].kept_tokens_bound) // 2
    before = memory_stack.metrics("router")
    with memory_stack.client() as client, room_for(memory_stack, middle + NEW_TOKENS):
        answer = client.generate(
            SAMPLE.question,
            images=SAMPLE.images,
            sampling=vlcache.Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True),
            compression=vlcache.Compression(retention=0.8, min_retention=0.1),
        )
    assert len(answer.token_ids) == NEW_TOKENS
    kept = answer.compression
    assert kept is not None
    assert (kept.asked_retention, kept.requested_retention) == (0.8, wanted[2].budget.retention)
    assert kept.realised_retention <= kept.requested_retention
    after = memory_stack.metrics("router")
    for name, more in (("retention_lowered_total", 1), ("reservation_wait_seconds_count", 0)):
        grown = sum(samples_of(after, f"vlcache_{name}")) - sum(samples_of(before, f"vlcache_{name}"))
        assert grown == more, name
    memory_stack.wait_idle()
