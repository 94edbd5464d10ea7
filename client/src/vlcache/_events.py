"""What a stream delivers: `Started`, then `Delta`s with `Compressed` and `Transferred` among them, `Finished`."""

import enum
from dataclasses import dataclass

from vlcache._kept import Kept, kept_from_proto
from vlcache.v1 import inference_pb2


class FinishReason(str, enum.Enum):
    """Why the answer ended."""

    STOP = "stop"  # end-of-sequence token or stop string
    LENGTH = "length"  # max_new_tokens reached
    UNSPECIFIED = "unspecified"  # a reason that this client does not know


_REASONS = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


class Guard(str, enum.Enum):
    """What the quality guard did (`Compression.max_dropped_attention`)."""

    OFF = "off"
    KEPT = "kept"  # as asked: that was enough
    GROWN = "grown"  # more was kept than asked
    FULL = "full"  # everything was kept
    REFUSED = "refused"  # as asked: there was no room for more


_GUARDS = {
    inference_pb2.GUARD_OUTCOME_KEPT: Guard.KEPT,
    inference_pb2.GUARD_OUTCOME_GROWN: Guard.GROWN,
    inference_pb2.GUARD_OUTCOME_FULL: Guard.FULL,
    inference_pb2.GUARD_OUTCOME_REFUSED: Guard.REFUSED,
}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one request; `prompt_tokens` includes `visual_tokens`."""

    prompt_tokens: int
    visual_tokens: int
    generated_tokens: int

    @property
    def text_tokens(self) -> int:
        """Tokens of the prompt that are not visual."""
        return self.prompt_tokens - self.visual_tokens


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Names of the workers that served the request."""

    prefill_worker: str
    decode_worker: str


@dataclass(frozen=True, kw_only=True)
class Started:
    """The service has taken the request on."""

    request_id: str
    model: str


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token by itself, and the natural logarithm of the model's own probability for it.

    `text` has U+FFFD where the token is a part of a character.
    """

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """One place of the answer: the token that was drawn, and the most likely ones, the likeliest first."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of the answer. `text` holds complete characters only and may be empty while one is still open.

    `choice` says which of several answers it belongs to, from 0. `logprobs` has one entry for each token where
    `Sampling.logprobs` asked for them. `finish_reason` is set in the last piece.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason | None = None
    choice: int = 0


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What the prefill worker kept of the prompt's KV.

    policy: name of the compression policy that ran, which can be another one than the request asked for.
    asked_retention: kept share that the request asked for, in (0, 1].
    requested_retention: what the policy was told to keep: less than asked when memory was short and `min_retention`
        allowed it, more when the quality guard raised it.
    realised_retention: kept share of the KV, in (0, 1].
    full_bytes, kept_bytes: bytes of KV before and after.
    layer_tokens: tokens kept in each layer (the largest KV head of the layer).
    layer_attention_mass: per layer, share of the post-vision attention that falls on kept tokens, in [0, 1].
    prompt_tokens, visual_tokens: tokens of the prompt, and how many of them are visual.
    guard: what the quality guard did.
    kept: which tokens were kept; None unless the request said `explain`.
    """

    policy: str
    asked_retention: float
    requested_retention: float
    realised_retention: float
    full_bytes: int
    kept_bytes: int
    layer_tokens: tuple[int, ...]
    layer_attention_mass: tuple[float, ...]
    prompt_tokens: int
    visual_tokens: int
    guard: Guard = Guard.OFF
    kept: Kept | None = None


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """How the KV parcel travelled.

    transport: name of the transport.
    sent_bytes: bytes handed to it: parcel, manifest and framing; 0 when prefill and decode are one process ("local").
    seconds: time from the first byte to the commit.
    """

    transport: str
    sent_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event. `seed` draws the same answer again."""

    usage: Usage
    seed: int
    placement: Placement


Event = Started | Delta | Compressed | Transferred | Finished


def event_from_proto(response: inference_pb2.GenerateResponse) -> Event | None:
    """The event in a response; None for a kind that this client does not know yet."""
    match response.WhichOneof("event"):
        case "started":
            return Started(request_id=response.started.request_id, model=response.started.model)
        case "delta":
            return _delta(response.delta)
        case "compression":
            return _compressed(response.compression)
        case "transfer":
            return _transferred(response.transfer)
        case "finished":
            return _finished(response.finished)
        case _:
            return None


def _delta(message: inference_pb2.Delta) -> Delta:
    logprobs = (
        Logprobs(token=_logprob(each.token), top=tuple(_logprob(likely) for likely in each.top))
        for each in message.logprobs
    )
    return Delta(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(logprobs),
        finish_reason=_REASONS.get(message.finish_reason, FinishReason.UNSPECIFIED) if message.finish_reason else None,
        choice=message.choice,
    )


def _logprob(message: inference_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=message.token_id, text=message.text, logprob=message.logprob)


def _compressed(message: inference_pb2.Compression) -> Compressed:
    return Compressed(
        policy=message.policy,
        # a service that never lowers a retention does not say it
        asked_retention=message.asked_retention or message.requested_retention,
        requested_retention=message.requested_retention,
        realised_retention=message.realised_retention,
        full_bytes=message.full_bytes,
        kept_bytes=message.kept_bytes,
        layer_tokens=tuple(message.layer_tokens),
        layer_attention_mass=tuple(message.layer_attention_mass),
        prompt_tokens=message.prompt_tokens,
        visual_tokens=message.visual_tokens,
        guard=_GUARDS.get(message.guard, Guard.OFF),
        kept=kept_from_proto(message.kept) if message.HasField("kept") else None,
    )


def _transferred(message: inference_pb2.Transfer) -> Transferred:
    return Transferred(transport=message.transport, sent_bytes=message.sent_bytes, seconds=message.seconds)


def _finished(message: inference_pb2.Finished) -> Finished:
    return Finished(
        usage=Usage(
            prompt_tokens=message.usage.prompt_tokens,
            visual_tokens=message.usage.visual_tokens,
            generated_tokens=message.usage.generated_tokens,
        ),
        seed=message.seed,
        placement=Placement(
            prefill_worker=message.placement.prefill_worker,
            decode_worker=message.placement.decode_worker,
        ),
    )
