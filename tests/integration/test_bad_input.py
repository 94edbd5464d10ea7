"""Bad input, sent for real: the right error, a sentence that helps, and nothing left behind on any worker."""

from __future__ import annotations

import dataclasses
import io
import os
import threading
import uuid

import grpc
import pytest
import vlcache
from PIL import Image
from vlcache.v1 import inference_pb2 as pb
from vlcache.v1 import inference_pb2_grpc

from deploy.local.forks import Forks
from tests.integration.conftest import stack_config
from tests.integration.running_stack import RunningStack


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, format="PNG")
    return out.getvalue()


def gif() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32)).save(out, format="GIF")
    return out.getvalue()


GOOD = png(336, 336)

BAD_IMAGES = {
    "truncated": GOOD[: len(GOOD) // 2],
    "random bytes": bytes(range(256)) * 4,
    "gif": gif(),
    "1x1": png(1, 1),
    "20000x1": png(20_000, 1),
    "bomb": png(9000, 9000, "1"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_an_invalid_request(memory_stack: RunningStack, name: str) -> None:
    with memory_stack.client() as client, pytest.raises(vlcache.InvalidRequest, match="image 2"):
        client.generate("What is this?", images=[GOOD, BAD_IMAGES[name]])
    memory_stack.wait_idle()


def send(stack: RunningStack, *, images: int = 0, text: str = "Hello", timeout: float = 60, **fields: object) -> None:
    """A raw request: the client SDK would refuse some of these before they leave."""
    parts = [pb.Part(image=pb.Image(data=GOOD)) for _ in range(images)] + [pb.Part(text=text)]
    request = pb.GenerateRequest(messages=[pb.Message(role="user", parts=parts)], **fields)
    with grpc.insecure_channel(stack.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        list(stub.Generate(request, timeout=timeout))


def sampling(**values: object) -> dict[str, object]:
    return {"sampling": pb.SamplingParams(**values)}


def compression(**values: object) -> dict[str, object]:
    return {"compression": pb.CompressionParams(**values)}


def parameters(**values: object) -> dict[str, object]:
    params = pb.CompressionParams()
    params.parameters.update(values)
    return {"compression": params}


BAD_REQUESTS = {
    "retention 0": (compression(retention=0.0), "INVALID_ARGUMENT", "retention"),
    "retention negative": (compression(retention=-0.5), "INVALID_ARGUMENT", "retention"),
    "retention nan": (compression(retention=float("nan")), "INVALID_ARGUMENT", "retention"),
    "retention above one": (compression(retention=1.01), "INVALID_ARGUMENT", "retention"),
    "no kept tokens": (compression(max_kept_tokens=0), "INVALID_ARGUMENT", "max_kept_tokens"),
    "unknown policy": (compression(policy="magic"), "INVALID_ARGUMENT", "vl_cache"),
    "unknown parameter": (parameters(colour="red"), "INVALID_ARGUMENT", "colour"),
    "bad parameter": (parameters(budget="loose"), "INVALID_ARGUMENT", "budget"),
    "unknown model": ({"model": "gpt-17"}, "NOT_FOUND", "gpt-17"),
    "negative max_new_tokens": (sampling(max_new_tokens=-1), "INVALID_ARGUMENT", "max_new_tokens"),
    "zero max_new_tokens": (sampling(max_new_tokens=0), "INVALID_ARGUMENT", "max_new_tokens"),
    "huge max_new_tokens": (sampling(max_new_tokens=2**31 - 1), "INVALID_ARGUMENT", "max_new_tokens"),
    "negative temperature": (sampling(temperature=-1.0), "INVALID_ARGUMENT", "temperature"),
    "top_p 0": (sampling(top_p=0.0), "INVALID_ARGUMENT", "top_p"),
    "negative top_k": (sampling(top_k=-3), "INVALID_ARGUMENT", "top_k"),
    "empty stop": (sampling(stop=[""]), "INVALID_ARGUMENT", "stop"),
    "empty prompt": ({"text": " \n"}, "INVALID_ARGUMENT", "text"),
    "too many images": ({"images": 17}, "INVALID_ARGUMENT", "images"),
    "reserved token": ({"text": "see <image> there"}, "INVALID_ARGUMENT", "<image>"),
    "prompt over the context": ({"text": "word " * 9000}, "OUT_OF_RANGE", "context"),
    "bad request id": ({"request_id": "a b"}, "INVALID_ARGUMENT", "request_id"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_gets_its_code_and_a_sentence(memory_stack: RunningStack, name: str) -> None:
    fields, code, word = BAD_REQUESTS[name]
    with pytest.raises(grpc.RpcError) as caught:
        send(memory_stack, **fields)
    assert caught.value.code().name == code
    assert word in caught.value.details()
    memory_stack.wait_idle()


def test_an_answer_that_does_not_fit_the_context(memory_stack: RunningStack) -> None:
    with memory_stack.client() as client, pytest.raises(vlcache.ContextTooLong, match="context"):
        client.generate("word " * 5000, sampling=vlcache.Sampling(max_new_tokens=4000))
    memory_stack.wait_idle()


def test_more_kv_than_a_worker_has_is_refused_before_any_compute(forks: Forks) -> None:
    """At retention 1 this prompt needs more than the whole pool: RESOURCE_EXHAUSTED, not a crash."""
    small = dataclasses.replace(stack_config("auto"), kv_memory_mib=2)
    with RunningStack(small, forks) as stack:
        with pytest.raises(grpc.RpcError) as caught:
            send(stack, images=1, timeout=3, **compression(retention=1.0))
        assert caught.value.code().name == "RESOURCE_EXHAUSTED"
        # a tenth of it fits
        send(stack, images=1, **compression(retention=0.1), **sampling(max_new_tokens=2))
        stack.wait_idle()


def test_a_request_id_in_flight_is_refused(memory_stack: RunningStack) -> None:
    request_id = uuid.uuid4().hex
    with memory_stack.client() as client:
        stream = client.stream(
            "Go on", sampling=vlcache.Sampling(max_new_tokens=400, ignore_eos=True), request_id=request_id
        )
        with stream:
            next(iter(stream))
            with pytest.raises(grpc.RpcError) as caught:
                send(memory_stack, request_id=request_id)
    assert caught.value.code().name == "ALREADY_EXISTS"
    memory_stack.wait_idle()


def test_the_workers_survive_all_at_once(memory_stack: RunningStack) -> None:
    """A burst of bad and good requests from many threads; the good ones are answered."""
    answers: list[str] = []

    def good() -> None:
        with memory_stack.client() as client:
            answers.append(client.generate("Hello", sampling=vlcache.Sampling(max_new_tokens=4)).request_id)

    def bad(index: int) -> None:
        data = os.urandom(2000) if index % 2 else GOOD[: 40 + index]
        with memory_stack.client() as client, pytest.raises(vlcache.InvalidRequest):
            client.generate("What?", images=[data])

    threads = [threading.Thread(target=bad, args=(index,)) for index in range(8)]
    threads += [threading.Thread(target=good) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    memory_stack.wait_idle()
