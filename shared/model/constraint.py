"""Keeps an answer to its grammar: what would break it is never drawn."""

from __future__ import annotations

from collections.abc import Collection

import torch

from shared.model.grammar import Grammar
from shared.request.sampling import Sampling


class Constrained:
    """Masks the logits of one answer.

    The grammar has the last word: it ends an answer that has fewer than `min_new_tokens` tokens, or ignores its end,
    where nothing else is left. Until then `ignore_eos` never lets an answer end that could go on.
    """

    def __init__(self, grammar: Grammar, sampling: Sampling, eos_token_ids: Collection[int]) -> None:
        self._matcher = grammar.matcher()
        self._never = sorted(eos_token_ids) if sampling.ignore_eos else []

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing can follow."""
        return self._matcher.ended

    def push(self, token: int) -> None:
        """The answer goes on with `token`."""
        self._matcher.push(token)

    def check(self) -> None:
        """See `Matcher.check`."""
        self._matcher.check()

    def apply(self, changed: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The logits [vocab] that the next token is drawn from; a new tensor.

        Args:
            changed: After all other changes.
            logits: The model's own.

        Raises:
            InvalidRequestError: See `Matcher.allowed`.
        """
        allowed = torch.from_numpy(self._matcher.allowed(len(logits))).to(logits.device)
        going_on = allowed.clone()
        going_on[self._never] = False
        allowed = going_on if going_on.any() else allowed
        masked = changed.masked_fill(~allowed, -torch.inf)
        # a least length has banned all that is left
        return masked if masked.max() > -torch.inf else logits.masked_fill(~allowed, -torch.inf)
