"""The tokens of one answer that the prefill worker draws itself: at least the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vlcache.v1 import inference_pb2 as public

from shared.model.grammar import Grammar
from shared.model.sampler import Drawn, Sampler
from shared.model.text_stream import TextStream
from shared.request.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class DrawnToken:
    """A token with the text that became certain; `finish_reason` is set when it ends the answer.

    `logprobs` is None unless the request wants them, and where the token was delivered by a lost attempt.
    """

    token: int
    text: str
    finish_reason: public.FinishReason
    logprobs: public.TokenLogprobs | None = None


class Opening:
    """Draws tokens as the decode worker would: a token depends on logits, seed and position alone.

    Args:
        sampling: Of the request.
        choice: Which of its answers.
        delivered: How the answer begins, as a lost attempt has told it: these are taken as if they had been drawn.
        prompt_tokens: See `Sampler`.
        grammar: See `Sampler`.

    Attributes:
        choice: Which of the request's answers it is.
        tokens: What was drawn so far.
        ended: Whether the last of them ends the answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        eos_token_ids: frozenset[int],
        next_position: int,
        choice: int = 0,
        *,
        delivered: Sequence[int] = (),
        prompt_tokens: Sequence[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self.choice = choice
        self._delivered = delivered
        self._next_position = next_position
        self._tokenizer = tokenizer
        self._sampler = Sampler(sampling.of_choice(choice), eos_token_ids, prompt_tokens, grammar)
        self._text = TextStream(tokenizer, sampling.stop, min_tokens=sampling.min_new_tokens)
        self.tokens: list[int] = []
        self.ended = False

    def draw(self, logits: torch.Tensor) -> DrawnToken:
        """The next token from its logits [vocab] fp32.

        Raises:
            InvalidRequestError: The constraint allows none.
        """
        drawn = self._next(logits)
        if drawn.refusal is not None:
            raise drawn.refusal
        token = drawn.token
        self.tokens.append(token)
        self._sampler.push(token)
        text = self._text.push(token)
        reason = self._reason()
        self.ended = bool(reason)
        if reason:
            text += self._text.finish()
        logprobs = drawn.logprobs.to_proto(self._tokenizer) if drawn.logprobs else None
        return DrawnToken(token=token, text=text, finish_reason=reason, logprobs=logprobs)

    def _next(self, logits: torch.Tensor) -> Drawn:
        number = len(self.tokens)
        if number < len(self._delivered):
            return Drawn(self._delivered[number])
        return self._sampler.draw(logits, self._next_position + number)

    def _reason(self) -> public.FinishReason:
        if self._text.stopped or self._sampler.ended:
            return public.FINISH_REASON_STOP
        if len(self.tokens) == self._sampler.sampling.max_new_tokens:
            return public.FINISH_REASON_LENGTH
        return public.FINISH_REASON_UNSPECIFIED
