"""What can be known about a request without a tokenizer: is it well-formed, and how large can it become?"""

from __future__ import annotations

import math
import re
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import xxhash
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import worker_pb2

from router.admission.retention import Offer, offers_of
from router.admission.tenants import DEFAULT_TENANT
from router.image_size import pixels_of
from shared.errors import InvalidRequestError
from shared.request.params import Budget, Guard, Wire
from shared.request.sampling import Sampling
from shared.rpc.options import MAX_REQUEST_BYTES

MAX_PRIORITY = 100
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class AcceptedRequest:
    """A request with every default filled in, and upper bounds of its size in tokens."""

    message: pb.GenerateRequest
    model: worker_pb2.ServedModel
    tenant: str
    prompt_tokens_bound: int
    num_bytes: int
    """Of the message, images included."""
    offers: tuple[Offer, ...]
    """Budgets that it puts up with, what it asked for first."""

    @property
    def asked(self) -> Budget:
        """The budget it asked for."""
        return self.offers[0].budget

    @property
    def request_id(self) -> str:
        """The client's id, or the one made for it."""
        return self.message.request_id

    @cached_property
    def image_key(self) -> int | None:
        """Hash of tenant and first image or video, with which everything that could be used again begins, if any."""
        visual = next((part for part in _parts(self.message) if part.WhichOneof("part") != "text"), None)
        if visual is None:
            return None
        # what is kept of an image is its tenant's alone
        content = xxhash.xxh3_64(self.tenant.encode())
        content.update(visual.image.data or visual.video.SerializeToString(deterministic=True))
        return content.intdigest()

    @property
    def priority(self) -> int:
        """Less is earlier."""
        return self.message.priority

    @property
    def n(self) -> int:
        """Answers that it asks for."""
        return self.message.sampling.n

    @property
    def copies(self) -> bool:
        """Whether each answer needs the kept tokens for itself."""
        return self.message.compression.policy in self.model.rewriting_policies

    @property
    def max_new_tokens(self) -> int:
        """Tokens to generate at most, of each answer."""
        return self.message.sampling.max_new_tokens


def request_id_of(message: pb.GenerateRequest) -> str:
    """The request's id; a new one when the client left it to us.

    Raises:
        InvalidRequestError: It is too long or has other characters than ids have.
    """
    if not message.request_id:
        return uuid.uuid4().hex
    _require(REQUEST_ID.fullmatch(message.request_id) is not None, "request_id is 1 to 128 of A-Z a-z 0-9 . _ : -")
    return message.request_id


def accept(
    message: pb.GenerateRequest,
    model: worker_pb2.ServedModel,
    *,
    min_retention: float = 1.0,
    tenant: str = DEFAULT_TENANT,
) -> AcceptedRequest:
    """Checks `message` against `model` and fills in what the workers need to agree on. Changes `message`.

    Args:
        min_retention: How far the budget of a request that does not say it may be lowered.
        tenant: Whose request it is.

    Raises:
        InvalidRequestError: A value is out of its range, or the request asks for nothing.
    """
    _require(message.ByteSize() <= MAX_REQUEST_BYTES, f"a request has at most {MAX_REQUEST_BYTES >> 20} MiB")
    _check_messages(message)
    _check_priority(message.priority)
    visuals = _count(message, "image") + _count(message, "video")
    _require(visuals <= model.max_images, f"the model takes at most {model.max_images} images and videos")
    _fill_sampling(message, model)
    budget = _fill_compression(message, model)
    message.model = model.name
    # whether the prompt fits the context is known to the prefill worker alone: loose bounds are cut, not refused
    markers = _count(message, "image") * model.max_marker_tokens_per_image
    markers += _count(message, "video") * model.max_marker_tokens_per_video
    text = min(_text_tokens_bound(message, model) + markers, model.context_tokens)
    visual = min(_visual_tokens_bound(message, model), model.context_tokens - text)
    # a request for everything is a request for exact answers
    default = min_retention if budget.retention_of(text, visual) < 1 else 1.0
    return AcceptedRequest(
        message=message,
        model=model,
        tenant=tenant,
        prompt_tokens_bound=text + visual,
        num_bytes=message.ByteSize(),
        offers=offers_of(budget, _floor(message.compression, default), text, visual),
    )


def _check_messages(message: pb.GenerateRequest) -> None:
    for entry in message.messages:
        _require(entry.role in ROLES, f"a role is one of {', '.join(ROLES)}, not {entry.role!r}")
        for part in entry.parts:
            kind = part.WhichOneof("part")
            _require(kind is not None, "a part is a text, an image or a video")
            _require(kind != "image" or bool(part.image.data), "an image has no data")
            source = part.video.WhichOneof("source")
            _require(kind != "video" or source is not None, "a video has neither a file nor frames")
    texts = (part.text for part in _parts(message))
    _require(any(text.strip() for text in texts), "some message must have a text")


def _check_priority(priority: int) -> None:
    limit = MAX_PRIORITY
    _require(-limit <= priority <= limit, f"priority must lie in [-{limit}, {limit}], not {priority}")


def _fill_sampling(message: pb.GenerateRequest, model: worker_pb2.ServedModel) -> None:
    given = message.sampling
    if not given.HasField("seed"):
        given.seed = secrets.randbits(64)
    sampling = Sampling.from_proto(given, default_max_new_tokens=model.default_max_new_tokens)
    limit = model.max_new_tokens
    _require(sampling.max_new_tokens <= limit, f"max_new_tokens must be at most {limit}, not {sampling.max_new_tokens}")
    given.CopyFrom(sampling.to_proto())


def _fill_compression(message: pb.GenerateRequest, model: worker_pb2.ServedModel) -> Budget:
    given = message.compression
    budget = Budget.from_proto(given, default_retention=model.default_retention)
    # these raise before anyone works for it
    Wire.from_proto(given.wire)
    Guard.from_proto(given, default=1.0)
    # what is reserved and what is asked for must not drift apart
    budget.write_to(given)
    given.policy = given.policy or model.default_policy
    known = ", ".join(model.policies)
    _require(given.policy in model.policies, f"unknown compression policy {given.policy!r}; known: {known}")
    return budget


def _floor(given: pb.CompressionParams, default: float) -> float:
    if not given.HasField("min_retention"):
        return default
    floor = given.min_retention
    _require(math.isfinite(floor) and 0 < floor <= 1, f"min_retention is a share and must lie in (0, 1], not {floor}")
    return floor


def _text_tokens_bound(message: pb.GenerateRequest, model: worker_pb2.ServedModel) -> int:
    """A byte is at least as long as a token, and every message brings its own piece of the template."""
    text_bytes = sum(len(part.text.encode()) for part in _parts(message))
    return text_bytes + model.template_tokens * len(message.messages)


def _visual_tokens_bound(message: pb.GenerateRequest, model: worker_pb2.ServedModel) -> int:
    """By the size that an image's header tells; that the worker decodes it is not sure yet."""
    images = (part.image.data for part in _parts(message) if part.HasField("image"))
    videos = _count(message, "video") * (model.max_tokens_per_video - model.max_marker_tokens_per_video)
    return videos + sum(_image_tokens_bound(pixels_of(image), model) for image in images)


def _image_tokens_bound(pixels: int | None, model: worker_pb2.ServedModel) -> int:
    if pixels is not None:
        for bound in model.image_bounds:
            if pixels <= bound.pixels:
                return bound.visual_tokens
    return model.max_tokens_per_image - model.max_marker_tokens_per_image


def _count(message: pb.GenerateRequest, kind: str) -> int:
    return sum(part.WhichOneof("part") == kind for part in _parts(message))


def _parts(message: pb.GenerateRequest) -> Iterator[pb.Part]:
    return (part for entry in message.messages for part in entry.parts)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message)
