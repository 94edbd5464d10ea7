"""The tokens of an answer that the prefill worker draws itself: at least the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vlcache.v1 import inference_pb2 as public

from shared.model.sampler import sample
from shared.model.text_stream import TextStream
from shared.request.params import Sampling


@dataclass(frozen=True, kw_only=True)
class DrawnToken:
    """A token with the text that became certain; `finish_reason` is set when it ends the answer."""

    token: int
    text: str
    finish_reason: public.FinishReason


class Opening:
    """Draws tokens as the decode worker would: a token depends on logits, seed and position alone.

    Args:
        delivered: How the answer begins, as a lost attempt has told it: these are taken as if they had been drawn.

    Attributes:
        tokens: What was drawn so far.
        ended: Whether the last of them ends the answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        eos_token_ids: frozenset[int],
        next_position: int,
        delivered: Sequence[int] = (),
    ) -> None:
        self._delivered = delivered
        self._sampling = sampling
        self._eos_token_ids = eos_token_ids
        self._next_position = next_position
        self._text = TextStream(tokenizer, sampling.stop)
        self.tokens: list[int] = []
        self.ended = False

    def draw(self, logits: torch.Tensor) -> DrawnToken:
        """The next token from its logits [vocab] fp32."""
        token = self._next(logits)
        self.tokens.append(token)
        text = self._text.push(token)
        reason = self._reason(token)
        self.ended = bool(reason)
        if reason:
            text += self._text.finish()
        return DrawnToken(token=token, text=text, finish_reason=reason)

    def _next(self, logits: torch.Tensor) -> int:
        drawn = len(self.tokens)
        if drawn < len(self._delivered):
            return self._delivered[drawn]
        return sample(logits, self._sampling, self._next_position + drawn)

    def _reason(self, token: int) -> public.FinishReason:
        if self._text.stopped or (token in self._eos_token_ids and not self._sampling.ignore_eos):
            return public.FINISH_REASON_STOP
        if len(self.tokens) == self._sampling.max_new_tokens:
            return public.FINISH_REASON_LENGTH
        return public.FINISH_REASON_UNSPECIFIED
