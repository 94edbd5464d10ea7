"""What is right, before it is changed: manifests, requests and images; and inputs that once found something."""

from __future__ import annotations

import dataclasses
import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import prefill_pb2

from shared.kv.encoding import Encoding
from shared.kv.eviction import SCORE_BYTES, HeavyHitters
from shared.kv.layout import KVLayout
from shared.kv.manifest import BegunAnswer, Manifest
from shared.request.constraint import Constraint
from shared.request.sampling import Sampling
from tests.unit.decode_worker.parcels import manifest_of

CORPUS = Path(__file__).parent / "corpus"
LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")
NUM_KEPT = (3, 4, 5, 6)
CONSTRAINTS = (
    Constraint("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}'),
    Constraint("regex", "(red|blue) [0-9]{1,3}"),
    Constraint("grammar", 'start: "a" start | "b"'),
)


def found(kind: str) -> list[bytes]:
    """Inputs of a kind that once found something."""
    return [file.read_bytes() for file in sorted((CORPUS / kind).glob("*"))]


@functools.cache
def manifests() -> list[Manifest]:
    """A plain one, and one of every form that a parcel has."""
    body = bytearray(LAYOUT.body_bytes(NUM_KEPT))
    plain = manifest_of(LAYOUT, NUM_KEPT, body)
    encoding = Encoding(bits=4, group=8, residual=0, key_channels=8)
    hitters = HeavyHitters(budget=8, recent=2)
    scored = len(body) + SCORE_BYTES * sum(NUM_KEPT)
    minding = Sampling(max_new_tokens=8, repetition_penalty=1.2, logit_bias=((3, 1.0),), logprobs=2)
    return [
        plain,
        dataclasses.replace(plain, encoding=encoding, body_bytes=encoding.body_bytes(LAYOUT, NUM_KEPT)),
        dataclasses.replace(plain, eviction=hitters, body_bytes=scored),
        dataclasses.replace(plain, sampling=minding, prompt_token_ids=(1, 5, 9)),
        *(dataclasses.replace(plain, sampling=Sampling(max_new_tokens=8, constraint=each)) for each in CONSTRAINTS),
        dataclasses.replace(
            plain,
            generated=(5, 6),
            sampling=Sampling(max_new_tokens=8, n=4),
            others=(BegunAnswer(1, 7), BegunAnswer(3, 9)),
        ),
    ]


def requests() -> list[pb.GenerateRequest]:
    """Text and images, with every kind of parameter."""
    parts = [pb.Part(image=pb.Image(data=images()[0])), pb.Part(text="What is it?")]
    whole = pb.GenerateRequest(
        request_id="r-1",
        messages=[pb.Message(role="system", parts=[pb.Part(text="Be brief.")]), pb.Message(role="user", parts=parts)],
        sampling=pb.SamplingParams(max_new_tokens=4, temperature=0.5, stop=["x"], logit_bias={3: 1.0}, logprobs=2, n=3),
        compression=pb.CompressionParams(policy="vl_cache", retention=0.2, min_retention=0.1),
    )
    whole.compression.parameters["shared_heads"] = False
    whole.sampling.constraint.CopyFrom(CONSTRAINTS[0].to_proto())
    plain = pb.GenerateRequest(messages=[pb.Message(role="user", parts=[pb.Part(text="Hello")])])
    return [whole, plain]


def prompts() -> list[prefill_pb2.PrefillRequest]:
    """What a router makes of them."""
    ticket = prefill_pb2.Ticket(
        decode_worker="d", decode_address="127.0.0.1:1", token=b"t", transport="grpc", lease_s=9
    )
    return [
        prefill_pb2.PrefillRequest(request=request, attempt=1, ticket=ticket, epoch="e", parcel=bytes(16))
        for request in requests()
    ]


@functools.cache
def images() -> list[bytes]:
    """One of each format that is taken."""
    pixels = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return [_encoded(Image.fromarray(pixels), name) for name in ("PNG", "JPEG", "WEBP")]


def _encoded(image: Image.Image, name: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name)
    return buffer.getvalue()
