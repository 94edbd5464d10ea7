"""TGV-KV (ICML 2026, arXiv 2606.03075): what the current token attends to least goes, but not the text.

A layer that holds more than its share of all tokens seen so far drops the row with the least attention from the current
token, mean over all heads, which drop the same token. The first rows stay, and as many of the last as there were kept
tokens of text after the image: the prompt's text at first, generated tokens later.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from decode_worker.eviction.facts import RowFacts
from decode_worker.eviction.rule import Rule, worth_of
from decode_worker.eviction.shares import share_of
from shared.kv.eviction import TextGuard


class TextGuardRule(Rule):
    """See the module."""

    goes_by_attention: ClassVar[bool] = True

    def __init__(self, numbers: TextGuard, kept: np.ndarray, prompt_tokens: int) -> None:
        super().__init__(kept)
        self._numbers = numbers
        self._prompt_tokens = prompt_tokens
        self._sinks = torch.from_numpy(numbers.sinks - kept)[..., None]
        self._text = torch.tensor(numbers.text)[:, None, None]

    def held(self, layer: int, kept: int, generated: int) -> int:
        """See `Rule`; nothing goes where sinks and text are all there is."""
        share = share_of(self._numbers.retention[layer], self._prompt_tokens + generated)
        return min(kept + generated, max(kept, share, self._numbers.sinks + self._numbers.text[layer]))

    def worth(self, rows: RowFacts) -> torch.Tensor:
        """See `Rule`."""
        arrival = rows.arrival
        between = arrival >= self._sinks.to(arrival.device)
        between &= arrival < rows.generated - self._text.to(arrival.device)
        # the sum over heads ranks like the mean
        return worth_of(between, rows.attention.sum(dim=1, keepdim=True).expand_as(rows.attention))
