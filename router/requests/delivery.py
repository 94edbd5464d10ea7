"""What the client of a request has got of its answer."""

from __future__ import annotations

from collections.abc import Sequence

from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from router.accounting import RequestAccount
from shared.errors import InternalError
from shared.request.params import Budget

Responses = Sequence[pb.GenerateResponse]


class Delivery:
    """Turns what workers say into the client's events: no gap, no duplicate, whichever worker goes on.

    A prompt that is computed once more says the answer from its beginning. Tokens that the client has are swallowed
    whole: text is a function of the tokens, so theirs is text that the client has, too. Prompt, compression and
    transfer are events of the request: the first of each is sent and counted, and a repeated transfer's bytes are
    counted as well, because they were sent.
    """

    def __init__(self, account: RequestAccount, asked: Budget) -> None:
        self._account = account
        self._asked = asked
        self._said = 0
        """Tokens that the prompt's present run has said."""
        self._transferred = False
        self._usage: pb.Usage | None = None
        self.token_ids: list[int] = []
        """The answer as the client has it."""
        self.compression: pb.Compression | None = None
        self.reason = pb.FINISH_REASON_UNSPECIFIED
        """Why the answer is complete, once it is."""

    def rewind(self) -> None:
        """The prompt is computed once more."""
        self._said = 0

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
        self._said += 1
        if self._said > len(self.token_ids):
            logprobs = [token.logprobs] if token.HasField("logprobs") else ()
            return self._pass_on([token.token_id], token.text, token.finish_reason, logprobs)
        if token.token_id != self.token_ids[self._said - 1]:
            raise InternalError("the answer was not drawn again as it had begun", reason="DIVERGED")
        return ()

    def on_update(self, update: decode_pb2.SequenceUpdate) -> Responses:
        """Tokens of the decode worker, which begins behind what was delivered."""
        return self._pass_on(update.token_ids, update.text, update.finish_reason, update.logprobs)

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
        usage.generated_tokens = len(self.token_ids)
        finished = pb.Finished(usage=usage, seed=seed, placement=placement)
        return pb.GenerateResponse(finished=finished)

    def _pass_on(
        self, token_ids: Sequence[int], text: str, reason: pb.FinishReason, logprobs: Sequence[pb.TokenLogprobs]
    ) -> Responses:
        self._account.tokens(len(token_ids))
        self.token_ids.extend(token_ids)
        self.reason = reason
        if not (token_ids or text or reason):
            return ()
        delta = pb.Delta(token_ids=token_ids, text=text, logprobs=logprobs, finish_reason=reason)
        return (pb.GenerateResponse(delta=delta),)
