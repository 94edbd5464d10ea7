"""The pass of FastV (arXiv 2403.06764): behind the first layers only the image tokens go on that were looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.selection import best_tokens
from prefill_worker.compression.sparse.prefill import Measured, SparsePrefill
from prefill_worker.compression.statistics import Statistic

# Lifts text above every image token: attention is at most 1.
ABOVE = 2.0


@dataclass(frozen=True)
class LastRow(Statistic[torch.Tensor]):
    """Attention of the prompt's last token, mean over query heads, [num_tokens] fp32."""

    def measure(self, layer: LayerAttention) -> torch.Tensor:
        """See the class."""
        return layer.weights((layer.prompt.num_tokens - 1,))[:, 0].mean(dim=0)


def ranked(last_row: torch.Tensor, prompt: PromptShape) -> torch.Tensor:
    """Worth of each token, [num_tokens]: the last one stays, then text, then image tokens, each by `LastRow`."""
    scores = last_row + ABOVE * ~prompt.visual.to(last_row.device)
    scores[-1] = torch.inf
    return scores


@dataclass(frozen=True, kw_only=True)
class FastVPrefill(SparsePrefill):
    """Drops image tokens once.

    Attributes:
        layer: The first layer that they do not reach.
        kept: Tokens that reach it, all text among them.
    """

    prompt: PromptShape
    layer: int
    kept: int

    def survivors(self, layer: int, before: Measured) -> torch.Tensor | None:
        """The best ones by the attention of the layer before."""
        if layer != self.layer:
            return None
        scores = ranked(before[LastRow()], self.prompt)
        return best_tokens(scores[None], [self.kept])[0].nonzero().flatten()
