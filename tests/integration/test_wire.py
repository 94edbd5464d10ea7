"""Fewer bytes for what is kept, through three real processes: near answers, smaller parcels, the same memory."""

from __future__ import annotations

import grpc
import pytest
import vlcache
from vlcache.v1 import inference_pb2 as pb

from models.shapes_vlm.questions import Sample, draw_samples
from tests.integration.reference import Reference
from tests.integration.running_stack import RunningStack
from tests.integration.test_bad_input import send

SAMPLING = vlcache.Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(draw_samples(seed=990_011, count=4))


def ask(stack: RunningStack, sample: Sample, wire: vlcache.Wire | None, retention: float = 1.0) -> vlcache.Completion:
    compression = vlcache.Compression(retention=retention, wire=wire)
    with stack.client() as client:
        return client.generate(sample.question, images=sample.images, sampling=SAMPLING, compression=compression)


def test_a_whole_cache_in_eight_bits_answers_like_the_model(
    stack: RunningStack, reference: Reference, samples: list[Sample]
) -> None:
    """It is sure enough of its tokens that a 255th of a group's range turns none of them."""
    for sample in samples:
        answer = ask(stack, sample, vlcache.Wire(bits=8))
        assert list(answer.token_ids) == reference.generate(sample.question, sample.images, max_new_tokens=24)


@pytest.mark.parametrize("transport", ["memory", "grpc"])
def test_fewer_bytes_are_sent_and_as_many_are_kept(
    transport: str, request: pytest.FixtureRequest, samples: list[Sample]
) -> None:
    stack: RunningStack = request.getfixturevalue(f"{transport}_stack")
    plain = ask(stack, samples[0], None)
    sent = []
    for wire in (vlcache.Wire(bits=8), vlcache.Wire(bits=4), vlcache.Wire(bits=4, key_channels=0.6)):
        answer = ask(stack, samples[0], wire)
        assert answer.compression == plain.compression
        assert answer.transfer is not None
        sent.append(answer.transfer.sent_bytes)
    assert plain.compression is not None
    assert plain.transfer is not None
    assert plain.transfer.sent_bytes > plain.compression.kept_bytes > 2 * sent[0]
    assert sent == sorted(sent, reverse=True)
    stack.wait_idle()


def test_an_answer_depends_on_no_transport(
    memory_stack: RunningStack, grpc_stack: RunningStack, combined_stack: RunningStack, samples: list[Sample]
) -> None:
    wire = vlcache.Wire(bits=2, key_channels=0.6, residual=4)
    stacks = (memory_stack, grpc_stack, combined_stack)
    answers = [ask(stack, samples[1], wire, retention=0.3) for stack in stacks]
    assert len({answer.token_ids for answer in answers}) == 1
    assert [answer.transfer.sent_bytes > 0 for answer in answers if answer.transfer] == [True, True, False]


@pytest.mark.parametrize(
    ("wire", "hint"),
    [
        (pb.WireParams(bits=5), "wire.bits"),
        (pb.WireParams(key_channels=1.5), "wire.key_channels"),
        (pb.WireParams(bits=4, group=2), "wire.group"),
    ],
)
def test_a_bad_wire_is_an_invalid_request(memory_stack: RunningStack, wire: pb.WireParams, hint: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        send(memory_stack, compression=pb.CompressionParams(wire=wire))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert hint in caught.value.details()
    memory_stack.wait_idle()
