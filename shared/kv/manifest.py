"""The manifest of a KV parcel: everything a decode worker needs besides the body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import xxhash
from vlcache.worker.v1 import kv_pb2 as pb

from shared.errors import DataLossError, FailedPreconditionError, InvalidRequestError
from shared.kv.encoding import Encoding
from shared.kv.eviction import SCORE_BYTES, Eviction, eviction_from_proto
from shared.kv.layout import KVLayout
from shared.request.sampling import Sampling

FORMAT_VERSION = 1
MAX_LOGICAL_LENGTH = 1 << 24
MAX_TABLE_ROWS = 1 << 27
# sums of many small numbers
MAX_MASS = 1.01


@dataclass(frozen=True, kw_only=True)
class TransferId:
    """One attempt to move one prompt's KV; a retry is a new transfer."""

    request_id: str
    attempt: int
    prefill_epoch: str


@dataclass(frozen=True)
class BegunAnswer:
    """An answer of which the first token was drawn, and none of whose KV is there."""

    choice: int
    first_token: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Describes a parcel; immutable, checked against the reservation before anything is installed.

    `num_kept` is layer-major, one count per layer and KV head. `generated` are the answer's tokens so far: the last has
    no KV yet, that of the others closes every head's rows. `next_position` is the last one's RoPE position: the
    original prompt length (plus the M-RoPE delta) and what was generated before it, never the kept length. `eviction`
    says what the decode worker does with the KV while it generates; where that goes by scores, the body ends with them.

    Where several answers go on, `generated` is of the first of them, number `choice` of the request, and `others` are
    the rest: to those the rows of fed tokens mean nothing (`alone`).
    """

    transfer: TransferId
    model: str
    compatibility: str
    layout: KVLayout
    num_kept: tuple[int, ...]
    logical_length: int
    next_position: int
    policy: str
    requested_retention: float
    realised_retention: float
    layer_attention_mass: tuple[float, ...]
    body_bytes: int
    digest: bytes
    generated: tuple[int, ...]
    sampling: Sampling
    encoding: Encoding | None = None
    """None: the body is plain."""
    eviction: Eviction | None = None
    kept_tokens: tuple[bytes, ...] = ()
    """Which tokens the rows are: entries as in `num_kept`, each a bitmap over the `logical_length` tokens, the first in
    the lowest bit; empty unless the request wants it explained."""
    prompt_token_ids: tuple[int, ...] = ()
    """Ids of the prompt's tokens, ascending, each once; empty unless the sampling reads them."""
    seen_tokens: tuple[bytes, ...] = ()
    """Which tokens the rows of layers with a window are: head after head of each such layer a bitmap over the last
    tokens, those that the next one sees, the oldest in the lowest bit. Where there are `others`, of the prompt's."""
    choice: int = 0
    others: tuple[BegunAnswer, ...] = ()

    @property
    def choices(self) -> tuple[int, ...]:
        """Which of the request's answers go on."""
        return (self.choice, *(other.choice for other in self.others))

    @property
    def fed(self) -> int:
        """Rows that close every head: tokens of the first answer whose KV is there."""
        return len(self.generated) - 1

    @property
    def seen_length(self) -> int:
        """Tokens with which `seen_tokens` ends."""
        return self.logical_length - (self.fed if self.others else 0)

    def alone(self, choice: int) -> Manifest:
        """What one of the answers has of a parcel whose body is plain: all but the rows of another one's tokens."""
        sampling = self.sampling.of_choice(choice)
        if choice == self.choice:
            return replace(self, sampling=sampling, encoding=None, others=())
        first_token = next(other.first_token for other in self.others if other.choice == choice)
        return replace(
            self,
            num_kept=tuple(kept - self.fed for kept in self.num_kept),
            logical_length=self.logical_length - self.fed,
            next_position=self.next_position - self.fed,
            generated=(first_token,),
            sampling=sampling,
            encoding=None,
            choice=choice,
            others=(),
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V as the body holds them."""
        if self.encoding is None:
            return self.layout.body_bytes(self.num_kept)
        return self.encoding.body_bytes(self.layout, self.num_kept)

    @property
    def score_bytes(self) -> int:
        """Bytes of scores at the body's end, one fp32 per kept row."""
        return score_bytes(self.eviction, self.num_kept)

    @property
    def tokens_to_come(self) -> int:
        """Tokens that may still be generated."""
        return self.sampling.max_new_tokens - len(self.generated)

    def check(self) -> None:
        """Checks that the parts agree with each other.

        Raises:
            InvalidRequestError: A count, shape or size is impossible.
        """
        heads = self.layout.num_layers * self.layout.num_kv_heads
        _require(0 < self.logical_length <= MAX_LOGICAL_LENGTH, "logical length out of range")
        _require(len(self.num_kept) == heads, "one kept count per layer and KV head is needed")
        self._check_shares()
        self._check_eviction()
        self._check_kept()
        if self.encoding is not None:
            self.encoding.check(self.layout, self.num_kept)
        _require(self.body_bytes == self.kv_bytes + self.score_bytes, "body size and kept counts disagree")
        _require(0 < self.next_position <= 2 * MAX_LOGICAL_LENGTH, "next position out of range")
        self._check_generated()
        self._check_kept_tokens()
        self._check_seen_tokens()

    def check_compatible(self, *, compatibility: str, layout: KVLayout) -> None:
        """Refuses a parcel of another model.

        Raises:
            FailedPreconditionError: The parcel was made by other weights or in another layout.
        """
        if self.compatibility != compatibility or self.layout != layout:
            raise FailedPreconditionError("the parcel belongs to another model", reason="INCOMPATIBLE_PARCEL")

    def digest_of(self, body: memoryview) -> bytes:
        """The digest of this parcel with such a body."""
        lenders = self.eviction.digested if self.eviction is not None else b""
        return body_digest(body, (*self.seen_tokens, lenders))

    def check_digest(self, body: memoryview) -> None:
        """Compares the body with the digest.

        Raises:
            DataLossError: Bytes were lost or changed.
        """
        if self.digest_of(body) != self.digest:
            raise DataLossError("the parcel's digest does not match its bytes", reason="PARCEL_DIGEST")

    @classmethod
    def from_proto(cls, message: pb.KVManifest) -> Manifest:
        """Reads and checks a message.

        Raises:
            FailedPreconditionError: Another format version or an unknown layout.
            InvalidRequestError: The parts disagree.
        """
        check_format(message.format_version)
        manifest = cls(
            transfer=TransferId(
                request_id=message.transfer.request_id,
                attempt=message.transfer.attempt,
                prefill_epoch=message.transfer.prefill_epoch,
            ),
            model=message.model,
            compatibility=message.compatibility,
            layout=KVLayout.from_proto(message.layout),
            num_kept=tuple(message.num_kept),
            logical_length=message.logical_length,
            next_position=message.next_position,
            policy=message.policy,
            requested_retention=message.requested_retention,
            realised_retention=message.realised_retention,
            layer_attention_mass=tuple(message.layer_attention_mass),
            body_bytes=message.body_bytes,
            digest=message.digest,
            generated=tuple(message.generated),
            sampling=Sampling.from_proto(message.sampling, default_max_new_tokens=0),
            prompt_token_ids=tuple(message.prompt_token_ids),
            encoding=Encoding.from_proto(message.encoding) if message.HasField("encoding") else None,
            eviction=_eviction(message),
            kept_tokens=tuple(message.kept_tokens),
            seen_tokens=tuple(message.seen_tokens),
            choice=message.choice,
            others=tuple(BegunAnswer(other.choice, other.first_token) for other in message.others),
        )
        _require(message.score_bytes == manifest.score_bytes, "kept counts and scores disagree")
        manifest.check()
        return manifest

    def to_proto(self) -> pb.KVManifest:
        """The message that reads back as this manifest."""
        return pb.KVManifest(
            format_version=FORMAT_VERSION,
            transfer=pb.TransferId(
                request_id=self.transfer.request_id,
                attempt=self.transfer.attempt,
                prefill_epoch=self.transfer.prefill_epoch,
            ),
            model=self.model,
            compatibility=self.compatibility,
            layout=self.layout.to_proto(),
            num_kept=self.num_kept,
            logical_length=self.logical_length,
            next_position=self.next_position,
            policy=self.policy,
            requested_retention=self.requested_retention,
            realised_retention=self.realised_retention,
            layer_attention_mass=self.layer_attention_mass,
            body_bytes=self.body_bytes,
            digest=self.digest,
            generated=self.generated,
            sampling=self.sampling.to_proto(),
            prompt_token_ids=self.prompt_token_ids,
            encoding=self.encoding.to_proto() if self.encoding else None,
            eviction=self.eviction.to_proto() if self.eviction else None,
            score_bytes=self.score_bytes,
            kept_tokens=self.kept_tokens,
            seen_tokens=self.seen_tokens,
            choice=self.choice,
            others=[pb.BegunAnswer(choice=other.choice, first_token=other.first_token) for other in self.others],
        )

    @property
    def _empty_layers(self) -> frozenset[int]:
        return self.eviction.empty_layers if self.eviction is not None else frozenset()

    def _check_shares(self) -> None:
        """They are only reported, but by whoever computes with them."""
        for share in (self.requested_retention, self.realised_retention):
            _require(0 <= share <= 1, "a retention lies in [0, 1]")
        _require(
            len(self.layer_attention_mass) in (0, self.layout.num_layers), "one attention mass per layer is needed"
        )
        _require(all(0 <= mass <= MAX_MASS for mass in self.layer_attention_mass), "an attention mass lies in [0, 1]")

    def _check_kept(self) -> None:
        heads, empty = self.layout.num_kv_heads, self._empty_layers
        own = (kept for place, kept in enumerate(self.num_kept) if place // heads not in empty)
        _require(all(1 <= kept <= self.logical_length for kept in own), "a kept count is out of range")

    def _check_generated(self) -> None:
        _require(len(self.generated) > 0, "the answer's first token is missing")
        _require(all(one < other for one, other in pairwise(self.choices)), "answers are not in order")
        _require(self.choices[-1] < self.sampling.n, "the request has fewer answers")
        fed, heads, empty = self.fed, self.layout.num_kv_heads, self._empty_layers
        for layer, window in enumerate(self.layout.windows or (0,) * self.layout.num_layers):
            # answers that share the prompt's rows all need some
            least = 0 if layer in empty else fed + 1 if self.others else min(fed, window - 1) if window else fed
            kept = self.num_kept[layer * heads : (layer + 1) * heads]
            _require(min(kept) >= least, "as many rows as tokens that were fed are needed")

    def _check_eviction(self) -> None:
        if self.eviction is not None:
            _require(not self.layout.windows, "rows of a layer with a window must stay in order: nothing is evicted")
            # tables of the decode worker give every head as many places as the largest one needs
            _require(max(self.num_kept) * len(self.num_kept) <= MAX_TABLE_ROWS, "too many rows to evict from")
            try:
                self.eviction.check(self.layout, self.num_kept)
            except ValueError as error:
                raise _refusal(str(error)) from error

    def _check_kept_tokens(self) -> None:
        if not self.kept_tokens:
            return
        _require(len(self.kept_tokens) == len(self.num_kept), "one bitmap per layer and KV head is needed")
        for bitmap, kept in zip(self.kept_tokens, self.num_kept, strict=True):
            _require(len(bitmap) == -(-self.logical_length // 8), "a bitmap is as long as the tokens need")
            bits = int.from_bytes(bitmap, "little")
            _require(bits.bit_length() <= self.logical_length, "a kept token is none of the prompt's")
            _require(bits.bit_count() == kept, "kept tokens and kept counts disagree")

    def _check_seen_tokens(self) -> None:
        layers, heads = self.layout.windowed_layers, self.layout.num_kv_heads
        unseen = self.logical_length - self.seen_length
        _require(len(self.seen_tokens) == len(layers) * heads, "one bitmap per windowed layer and KV head is needed")
        for number, bitmap in enumerate(self.seen_tokens):
            layer, head = layers[number // heads], number % heads
            seen = min(self.layout.windows[layer] - 1, self.seen_length)
            _require(len(bitmap) == -(-seen // 8), "a bitmap is as long as the window needs")
            bits = int.from_bytes(bitmap, "little")
            _require(bits.bit_length() <= seen, "a row is no token of the prompt's")
            kept = self.num_kept[layer * heads + head] - unseen
            _require(bits.bit_count() == kept, "seen tokens and kept counts disagree")


def check_format(version: int) -> None:
    """Refuses a parcel that is written otherwise.

    Raises:
        FailedPreconditionError: Another format version.
    """
    if version != FORMAT_VERSION:
        raise FailedPreconditionError(f"parcel format {version} is not {FORMAT_VERSION}", reason="PARCEL_FORMAT")


def body_digest(body: memoryview, read_how: Sequence[bytes] = ()) -> bytes:
    """xxh3-128 of a parcel body and of what says which rows are read: integrity against faults, not attackers."""
    digest = xxhash.xxh3_128(body)
    for part in read_how:
        digest.update(part)
    return digest.digest()


def layer_tokens(num_kept: Sequence[int], layout: KVLayout) -> list[int]:
    """Kept tokens of each layer: those of its largest KV head."""
    heads = layout.num_kv_heads
    return [max(num_kept[layer * heads : (layer + 1) * heads]) for layer in range(layout.num_layers)]


def score_bytes(eviction: Eviction | None, num_kept: Sequence[int]) -> int:
    """Bytes of the scores that a parcel carries."""
    return SCORE_BYTES * sum(num_kept) if eviction is not None and eviction.carries_scores else 0


def _eviction(message: pb.KVManifest) -> Eviction | None:
    if not message.HasField("eviction"):
        return None
    try:
        return eviction_from_proto(message.eviction)
    except ValueError as error:
        raise _refusal(str(error)) from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _refusal(message)


def _refusal(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"bad parcel manifest: {message}", reason="PARCEL_MANIFEST")
