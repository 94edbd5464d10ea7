"""Where things lie in a prompt: all that a compression policy knows of it beside attention and KV."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptShape:
    """One unpadded prompt.

    Attributes:
        visual: [num_tokens] bool, which tokens stand for images; on the CPU.
        special: Positions of special tokens that do not stand for images, ascending: begin of text, marks of turns.
        punctuation: Positions of tokens that are punctuation and nothing else, ascending.
        seed: Hash of the prompt's content: what a policy draws at random is the same for the same prompt.
    """

    visual: torch.Tensor
    special: tuple[int, ...] = ()
    punctuation: tuple[int, ...] = ()
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.visual)

    @cached_property
    def num_visual(self) -> int:
        """Visual tokens among them."""
        return int(self.visual.sum())

    @cached_property
    def last_visual(self) -> int | None:
        """Index of the last visual token; None without any."""
        places = self.visual.nonzero()
        return int(places[-1]) if len(places) else None
