"""Log-probabilities of a drawn token and of the likeliest ones in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vlcache.v1 import inference_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Natural logarithms of the model's own probabilities; `top` are pairs of a token and its own, the best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: torch.Tensor, token: int, count: int) -> Logprobs:
        """Of `token` and the `count` likeliest ones, in unchanged logits [vocab] of any floating dtype."""
        logprobs = logits.float().log_softmax(dim=-1)
        best, tokens = logprobs.topk(min(count, len(logprobs)))
        top = tuple(zip(tokens.tolist(), best.tolist(), strict=True))
        return cls(token=token, logprob=float(logprobs[token]), top=top)

    def to_proto(self, tokenizer: Any) -> pb.TokenLogprobs:
        """The message, with each token's text by itself."""

        def message(token: int, logprob: float) -> pb.TokenLogprob:
            text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
            return pb.TokenLogprob(token_id=token, text=text, logprob=logprob)

        return pb.TokenLogprobs(
            token=message(self.token, self.logprob), top=[message(token, logprob) for token, logprob in self.top]
        )
