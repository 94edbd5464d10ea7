"""One prefill request as the worker sees it, and what it reports while it runs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import prefill_pb2 as pb

from prefill_worker.compression.layer_sharing import LayerSharing
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.registry import build_policy
from prefill_worker.kv_sender import Ticket
from prefill_worker.opening import DrawnToken
from shared.errors import InvalidRequestError
from shared.kv.manifest import TransferId
from shared.kv.secret import SECRET_BYTES
from shared.model.grammar import Grammar
from shared.request.params import Budget, Guard, Wire
from shared.request.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class PrefillJob:
    """A checked request.

    `delivered` is how answers begin, by choice, where a lost attempt has delivered some of them. `parcel` is the secret
    under which its parcel is retained, empty where it is not. `explain` says which tokens were kept, `cancelled` stops
    it at the next layer. `grammar` is that of the sampling's constraint, once it is compiled.
    """

    transfer: TransferId
    messages: tuple[public.Message, ...]
    sampling: Sampling
    budget: Budget
    policy: Policy
    ticket: Ticket
    delivered: tuple[tuple[int, ...], ...] = ()
    tenant: str = ""
    parcel: bytes = b""
    wire: Wire = field(default_factory=Wire)
    guard: Guard = field(default_factory=Guard)
    explain: bool = False
    grammar: Grammar | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def from_proto(
        cls,
        message: pb.PrefillRequest,
        *,
        epoch: str,
        vocabulary: int,
        default_max_new_tokens: int,
        default_retention: float,
        default_max_dropped_attention: float = 1.0,
        sharing: LayerSharing | None = None,
    ) -> PrefillJob:
        """Reads and checks a message.

        Args:
            sharing: Which layers of the served checkpoint may share KV.

        Raises:
            InvalidRequestError: A parameter is out of its range, the policy is unknown or needs what is not known of
                this checkpoint, what was delivered is not the
                beginning of an answer, or the parcel's secret has another length.
        """
        request = message.request
        compression = request.compression
        sampling = Sampling.from_proto(request.sampling, default_max_new_tokens=default_max_new_tokens)
        sampling.check_vocabulary(vocabulary)
        return cls(
            transfer=TransferId(request_id=request.request_id, attempt=message.attempt, prefill_epoch=epoch),
            messages=tuple(request.messages),
            sampling=sampling,
            budget=Budget.from_proto(compression, default_retention=default_retention),
            policy=build_policy(compression.policy, _parameters(compression)).for_checkpoint(sharing),
            ticket=Ticket.from_proto(message.ticket),
            tenant=message.tenant,
            parcel=_parcel(message),
            delivered=_delivered(message, vocabulary, sampling),
            wire=Wire.from_proto(compression.wire),
            guard=Guard.from_proto(compression, default=default_max_dropped_attention),
            explain=compression.explain,
        )

    def rows_bound(self, text_tokens: int, visual_tokens: int) -> int:
        """Upper bound of the mean number of rows that the parcel has per layer and KV head."""
        return self.budget.kept_tokens_bound(text_tokens, visual_tokens) + self.policy.look_ahead

    def hands_over(self, tokens: int) -> bool:
        """Whether an answer's first `tokens` tokens, decoded ahead, are handed over; else they are drafts.

        A parcel must not bring more than the decode worker has promised room for. An answer that they end brings none.
        What a lost attempt has delivered does not count in the promise: so this one does the same.
        """
        if not self.policy.look_ahead or not self.policy.keeps_look_ahead:
            return False
        promised, longest = self.ticket.promised_tokens, self.sampling.max_new_tokens - 1
        return promised is None or tokens <= promised or promised >= longest or tokens > longest

    def delivered_of(self, choice: int) -> tuple[int, ...]:
        """How one of the answers begins."""
        return self.delivered[choice] if choice < len(self.delivered) else ()


def _delivered(message: pb.PrefillRequest, vocabulary: int, sampling: Sampling) -> tuple[tuple[int, ...], ...]:
    delivered = tuple(tuple(answer.tokens) for answer in message.delivered)
    lengths, longest = [len(tokens) for tokens in delivered], sampling.max_new_tokens
    if len(delivered) > sampling.n or max(lengths, default=0) > longest or lengths.count(longest) == sampling.n:
        raise InvalidRequestError("the answer was delivered already", reason="DELIVERED")
    if any(token >= vocabulary for tokens in delivered for token in tokens):
        raise InvalidRequestError("a delivered token is not in the vocabulary", reason="DELIVERED")
    return delivered


def _parcel(message: pb.PrefillRequest) -> bytes:
    if len(message.parcel) not in (0, SECRET_BYTES):
        raise InvalidRequestError(f"the parcel's secret must have {SECRET_BYTES} bytes", reason="PARCEL")
    return message.parcel


def _parameters(compression: public.CompressionParams) -> dict[str, object]:
    """Not through JSON, which knows no NaN: whatever a stranger sends must reach the policy's own checks."""
    try:
        return dict(compression.parameters.items())
    except ValueError as error:
        raise InvalidRequestError("a policy parameter has no value", reason="POLICY_PARAMETER") from error


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """The first token of an answer, streamed before any KV moves. `finish_reason` is set when it already ends it."""

    token: int
    text: str
    finish_reason: public.FinishReason
    prompt_tokens: int
    visual_tokens: int
    logprobs: public.TokenLogprobs | None = None
    choice: int = 0

    @classmethod
    def of(cls, drawn: DrawnToken, prompt: PromptShape, choice: int) -> FirstToken:
        """The event of a token that was drawn right after the prompt."""
        return cls(
            token=drawn.token,
            text=drawn.text,
            finish_reason=drawn.finish_reason,
            prompt_tokens=prompt.num_tokens,
            visual_tokens=prompt.num_visual,
            logprobs=drawn.logprobs,
            choice=choice,
        )

    def to_proto(self) -> pb.PrefillEvent:
        """The event on the wire."""
        return pb.PrefillEvent(
            first_token=pb.FirstToken(
                token_id=self.token,
                text=self.text,
                finish_reason=self.finish_reason,
                prompt_tokens=self.prompt_tokens,
                visual_tokens=self.visual_tokens,
                logprobs=self.logprobs,
                choice=self.choice,
            )
        )


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """A token that was decoded ahead, after the first ones and before the compression."""

    token: int
    text: str
    finish_reason: public.FinishReason
    logprobs: public.TokenLogprobs | None = None
    choice: int = 0

    @classmethod
    def of(cls, drawn: DrawnToken, choice: int) -> NextToken:
        """The event of a drawn token."""
        return cls(
            token=drawn.token,
            text=drawn.text,
            finish_reason=drawn.finish_reason,
            logprobs=drawn.logprobs,
            choice=choice,
        )

    def to_proto(self) -> pb.PrefillEvent:
        """The event on the wire."""
        token = pb.NextToken(
            token_id=self.token,
            text=self.text,
            finish_reason=self.finish_reason,
            logprobs=self.logprobs,
            choice=self.choice,
        )
        return pb.PrefillEvent(next_token=token)


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What was kept of the prompt."""

    message: public.Compression

    def to_proto(self) -> pb.PrefillEvent:
        """The event on the wire."""
        return pb.PrefillEvent(compression=self.message)


@dataclass(frozen=True, kw_only=True)
class Retained:
    """The parcel is complete, and stays after its transfer. `lease_s` is its life unrenewed."""

    lease_s: float

    def to_proto(self) -> pb.PrefillEvent:
        """The event on the wire."""
        return pb.PrefillEvent(retained=pb.Retained(lease_s=self.lease_s))


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """The decode worker has the parcel."""

    transport: str
    sent_bytes: int
    seconds: float

    @property
    def message(self) -> public.Transfer:
        """What clients see of it."""
        return public.Transfer(transport=self.transport, sent_bytes=self.sent_bytes, seconds=self.seconds)

    def to_proto(self) -> pb.PrefillEvent:
        """The event on the wire."""
        return pb.PrefillEvent(transfer=self.message)


Event = FirstToken | NextToken | Compressed | Retained | Transferred
