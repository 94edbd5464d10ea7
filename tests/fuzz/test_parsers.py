"""Manifests, requests and images of any content are taken as they are, or refused with a sentence."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError, Message
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import kv_pb2, prefill_pb2

from prefill_worker.job import PrefillJob
from prefill_worker.preprocess.images import MAX_REQUEST_PIXELS, open_image
from router import validation
from shared.errors import InternalError, ServiceError
from shared.kv.manifest import Manifest
from tests.fuzz import seeds
from tests.fuzz.mutation import mutated, strange
from tests.fuzz.running import fuzz
from tests.unit.router.fakes import served_model

VOCABULARY = 1000


def read_manifest(data: bytes) -> None:
    """What is taken reads back as itself, and its sizes fit."""
    manifest = Manifest.from_proto(kv_pb2.KVManifest.FromString(data))
    assert Manifest.from_proto(manifest.to_proto()) == manifest
    assert manifest.body_bytes == manifest.kv_bytes + manifest.score_bytes
    assert 0 < len(manifest.num_kept) == manifest.layout.num_layers * manifest.layout.num_kv_heads


def read_request(data: bytes) -> None:
    """What is accepted has bounds that memory can be promised for."""
    request, model = pb.GenerateRequest.FromString(data), served_model()
    validation.request_id_of(request)
    accepted = validation.accept(request, model)
    assert 0 <= accepted.prompt_tokens_bound <= model.context_tokens
    assert 1 <= accepted.max_new_tokens <= model.max_new_tokens
    for offer in accepted.offers:
        assert 0 < offer.kept_tokens_bound <= model.context_tokens + 16


def read_prompt(data: bytes) -> None:
    """What a prefill worker takes of it has numbers that it can compute with."""
    job = PrefillJob.from_proto(
        prefill_pb2.PrefillRequest.FromString(data),
        epoch="e",
        vocabulary=VOCABULARY,
        default_max_new_tokens=8,
        default_retention=0.1,
    )
    assert 1 <= job.rows_bound(20, 40) <= 60 + job.policy.look_ahead
    assert all(token < VOCABULARY for answer in job.delivered for token in answer)


def read_image(data: bytes) -> None:
    """What is opened is within the limits."""
    image = open_image(data, 0)
    assert image.mode == "RGB"
    assert image.width * image.height <= MAX_REQUEST_PIXELS


READERS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "manifest": (read_manifest, lambda: [manifest.to_proto().SerializeToString() for manifest in seeds.manifests()]),
    "request": (read_request, lambda: [request.SerializeToString() for request in seeds.requests()]),
    "prompt": (read_prompt, lambda: [prompt.SerializeToString() for prompt in seeds.prompts()]),
    "image": (read_image, seeds.images),
}
MESSAGES: dict[str, type[Message]] = {
    "manifest": kv_pb2.KVManifest,
    "request": pb.GenerateRequest,
    "prompt": prefill_pb2.PrefillRequest,
}


def check(kind: str, data: bytes) -> None:
    """Lets everything out but a refusal."""
    try:
        READERS[kind][0](data)
    except DecodeError:
        assert kind in MESSAGES
    except ServiceError as error:
        if isinstance(error, InternalError) or not error.message:
            raise


@pytest.mark.parametrize("kind", READERS)
def test_what_is_right_is_taken(kind: str) -> None:
    """Or the cases that are made of it would say little."""
    read, right = READERS[kind]
    for data in right():
        read(data)


@pytest.mark.parametrize("kind", READERS)
def test_what_once_found_something_finds_nothing_now(kind: str) -> None:
    for data in seeds.found(kind):
        check(kind, data)


@pytest.mark.parametrize("kind", READERS)
def test_a_few_of_the_cases_are_refused(kind: str) -> None:
    """Always the same ones, so that the ordinary suite has run this code."""
    read, right = READERS[kind]
    refused = 0
    for number in range(300):
        data = mutated(random.Random(number), right()[number % len(right())], right())
        check(kind, data)
        try:
            read(data)
        except (ServiceError, DecodeError):
            refused += 1
    assert refused > 30


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", READERS)
def test_bytes(kind: str) -> None:
    right = READERS[kind][1]() + seeds.found(kind)

    def case(chance: random.Random) -> None:
        check(kind, mutated(chance, chance.choice(right), right))

    fuzz(case)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", MESSAGES)
def test_fields(kind: str) -> None:
    right = READERS[kind][1]()

    def case(chance: random.Random) -> None:
        check(kind, strange(chance, MESSAGES[kind].FromString(chance.choice(right))).SerializeToString())

    fuzz(case)
