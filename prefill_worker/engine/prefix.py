"""Beginnings of prompts whose KV is kept: all up to the last image, before any question is known.

A token's KV depends on nothing that follows it. So a prompt with the same beginning needs a pass over its text alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.statistics import Statistic

# Attention of a single query is taken for a decode step, which sees no mask.
MIN_TEXT = 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Prefix:
    """The whole KV of a prompt's beginning.

    Attributes:
        keys: Per layer [num_kv_heads, num_tokens, head_dim], rotated.
        values: As `keys`.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def num_tokens(self) -> int:
        """Tokens of the beginning."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def prefix_tokens(prompt: PromptShape) -> int:
    """Tokens up to the last visual one; 0 where there are none, or too little text follows."""
    tokens = 0 if prompt.last_visual is None else prompt.last_visual + 1
    return tokens if prompt.num_tokens - tokens >= MIN_TEXT else 0


def suffices(statistics: Collection[Statistic[Any]], prompt: PromptShape) -> bool:
    """Whether all of them can be measured where only the tokens behind the prefix pass: the others bring no queries."""
    return all(statistic.first_row(prompt) >= prefix_tokens(prompt) for statistic in statistics)
