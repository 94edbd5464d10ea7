"""Draws the next token. Counter-based: the random number of a step depends on (seed, position) alone.

So a stream that is replayed on another worker is the same stream. Generator: Philox4x64-10 (Salmon et al., SC 2011).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from shared.errors import InvalidRequestError
from shared.model.constraint import Constrained
from shared.model.grammar import Grammar
from shared.model.logits import LogitChanges
from shared.model.logprobs import Logprobs
from shared.request.sampling import Sampling


@dataclass(frozen=True)
class Drawn:
    """A token, with what was asked about its probability; or why there is none, and the answer can only fail."""

    token: int
    logprobs: Logprobs | None = None
    refusal: InvalidRequestError | None = None


class Sampler:
    """Draws the tokens of one answer, of which it is told every one, drawn here or elsewhere."""

    def __init__(
        self,
        sampling: Sampling,
        eos_token_ids: Collection[int],
        prompt_tokens: Iterable[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        """Of an answer without tokens.

        Args:
            prompt_tokens: See `LogitChanges`.
            grammar: Of the sampling's constraint.
        """
        assert (grammar is None) == (sampling.constraint is None), "a constraint was not compiled"
        self.sampling = sampling
        self.eos_token_ids = frozenset(eos_token_ids)
        self.ended = False
        """Whether the answer has ended by itself, with the last token that was pushed."""
        self._changes = LogitChanges(sampling, eos_token_ids, prompt_tokens)
        self._constrained = Constrained(grammar, sampling, eos_token_ids) if grammar else None

    @property
    def takes_highest(self) -> bool:
        """Whether the highest logit's token is all that is wanted: the first of equals."""
        return self.sampling.takes_highest and self.sampling.logprobs is None

    def push(self, token: int) -> None:
        """The answer goes on with `token`."""
        self._changes.push(token)
        self.ended = token in self.eos_token_ids and not self.sampling.ignore_eos
        if self._constrained is not None:
            self._constrained.push(token)
            self.ended = self.ended or self._constrained.ended

    def check(self) -> None:
        """Looks whether what was pushed can have been drawn.

        Raises:
            InvalidRequestError: It breaks the sampling's constraint.
        """
        if self._constrained is not None:
            self._constrained.check()

    def draw(self, logits: torch.Tensor, position: int) -> Drawn:
        """The next token; it is not pushed.

        Args:
            logits: [vocab], any floating dtype.
            position: Position of the token to be drawn.
        """
        changed = self._changes.apply(logits) if self.sampling.changes_logits else logits
        if self._constrained is not None:
            try:
                changed = self._constrained.apply(changed, logits)
            except InvalidRequestError as error:
                return Drawn(token=0, refusal=error)
        token = sample(changed, self.sampling, position)
        if self.sampling.logprobs is None:
            return Drawn(token)
        return Drawn(token, Logprobs.of(logits, token, self.sampling.logprobs))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but the two arguments (both below 2**64)."""
    return float(np.random.Philox(key=seed, counter=position).random_raw() >> 11) * 2.0**-53


def sample(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """The token that follows.

    Args:
        logits: [vocab], any floating dtype.
        sampling: Temperature, top-k and top-p, applied in this order; temperature 0 takes the first maximum.
        position: Position of the token to be drawn.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    # the maximum becomes 0, so that no temperature, however low, overflows
    distance = logits.double() - logits.max()
    scaled, tokens = torch.sort(distance / sampling.temperature, descending=True, stable=True)
    if sampling.top_k:
        scaled, tokens = scaled[: sampling.top_k], tokens[: sampling.top_k]
    cumulative = torch.softmax(scaled, dim=0).cumsum(dim=0)
    # the smallest set of most likely tokens that reaches top_p, never empty
    kept = int((cumulative < sampling.top_p).sum()) + 1
    cumulative = cumulative[:kept]
    threshold = uniform(sampling.seed, position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, threshold, right=True))
    return int(tokens[min(index, len(cumulative) - 1)])
