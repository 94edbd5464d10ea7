"""What the client of a request has got of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from router.accounting import RequestAccount
from shared.errors import InternalError
from shared.request.params import Budget

Responses = Sequence[pb.GenerateResponse]


@dataclass(eq=False)
class AnswerSoFar:
    """One answer as the client has it.

    Attributes:
        said: Tokens that the prompt's present run has said.
        reason: Why it is complete, once it is.
    """

    token_ids: list[int] = field(default_factory=list)
    said: int = 0
    reason: pb.FinishReason = pb.FINISH_REASON_UNSPECIFIED


class Delivery:
    """Turns what workers say into the client's events: no gap, no duplicate, whichever worker goes on.

    A prompt that is computed once more says all answers from their beginning. Tokens that the client has are swallowed
    whole: text is a function of the tokens, so theirs is text that the client has, too. Prompt, compression and
    transfer are events of the request: the first of each is sent and counted, and a repeated transfer's bytes are
    counted as well, because they were sent.
    """

    def __init__(self, account: RequestAccount, asked: Budget, n: int = 1) -> None:
        self._account = account
        self._asked = asked
        self._transferred = False
        self._usage: pb.Usage | None = None
        self.answers = tuple(AnswerSoFar() for _ in range(n))
        """By choice."""
        self.compression: pb.Compression | None = None

    @property
    def begun(self) -> bool:
        """Whether the client has anything of any answer."""
        return any(answer.token_ids for answer in self.answers)

    @property
    def complete(self) -> bool:
        """Whether the client has all answers."""
        return all(answer.reason for answer in self.answers)

    @property
    def open_answers(self) -> Mapping[int, Sequence[int]]:
        """What the client has of those that are not complete, by choice."""
        return {choice: answer.token_ids for choice, answer in enumerate(self.answers) if not answer.reason}

    def rewind(self) -> None:
        """The prompt is computed once more."""
        for answer in self.answers:
            answer.said = 0

    def on_first_token(self, token: prefill_pb2.FirstToken) -> Responses:
        """The prompt is computed."""
        if self._usage is None:
            self._usage = pb.Usage(prompt_tokens=token.prompt_tokens, visual_tokens=token.visual_tokens)
            self._account.prompt(token.prompt_tokens, token.visual_tokens)
        return self.on_token(token)

    def on_token(self, token: prefill_pb2.FirstToken | prefill_pb2.NextToken) -> Responses:
        """One token of the prefill worker.

        Raises:
            InternalError: It is not the one that the client has in this place.
        """
        answer = self.answers[token.choice]
        answer.said += 1
        if answer.said > len(answer.token_ids):
            logprobs = [token.logprobs] if token.HasField("logprobs") else ()
            return self._pass_on(token.choice, [token.token_id], token.text, token.finish_reason, logprobs)
        if token.token_id != answer.token_ids[answer.said - 1]:
            raise InternalError("the answer was not drawn again as it had begun", reason="DIVERGED")
        return ()

    def on_update(self, update: decode_pb2.SequenceUpdate, choice: int = 0) -> Responses:
        """Tokens of the decode worker, which begins behind what was delivered."""
        return self._pass_on(choice, update.token_ids, update.text, update.finish_reason, update.logprobs)

    def on_compression(self, message: pb.Compression) -> Responses:
        """The prompt's KV was compressed."""
        if self.compression is not None:
            return ()
        text, visual = message.prompt_tokens - message.visual_tokens, message.visual_tokens
        message.asked_retention = float(self._asked.retention_of(text, visual))
        self.compression = message
        self._account.compression(message)
        return (pb.GenerateResponse(compression=message),)

    def on_transfer(self, message: pb.Transfer) -> Responses:
        """The parcel was sent."""
        self._account.transfer(message)
        if self._transferred:
            return ()
        self._transferred = True
        return (pb.GenerateResponse(transfer=message),)

    def finished(self, placement: pb.Placement, seed: int) -> pb.GenerateResponse:
        """The last event."""
        self._account.finished()
        usage = self._usage or pb.Usage()
        usage.generated_tokens = sum(len(answer.token_ids) for answer in self.answers)
        finished = pb.Finished(usage=usage, seed=seed, placement=placement)
        return pb.GenerateResponse(finished=finished)

    def _pass_on(
        self,
        choice: int,
        token_ids: Sequence[int],
        text: str,
        reason: pb.FinishReason,
        logprobs: Sequence[pb.TokenLogprobs],
    ) -> Responses:
        self._account.tokens(len(token_ids), choice)
        self.answers[choice].token_ids.extend(token_ids)
        self.answers[choice].reason = reason
        if not (token_ids or text or reason):
            return ()
        delta = pb.Delta(token_ids=token_ids, text=text, logprobs=logprobs, choice=choice, finish_reason=reason)
        return (pb.GenerateResponse(delta=delta),)
