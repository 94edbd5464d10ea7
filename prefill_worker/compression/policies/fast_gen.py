"""FastGen (Ge et al., ICLR 2024, arXiv 2310.01801): every head drops what it does not look at.

Idea: some heads look at special tokens or punctuation, some at what is near, some at few tokens everywhere, some at
all. The prompt's own attention says which head is which, and each keeps the least that its kind needs.

    special < + punctuation < + local < + frequent < full             each contains the one before
    a KV head takes the first whose tokens receive `mass` of its attention, over all rows and the group's query heads
    local: the nearest `local_share` of the prompt; frequent: the `frequent_share` that receives most in all

For its kind a row's local tokens are those before that very row; kept are those before the prompt's end. Own choices:
retention is an upper limit. A head that needs less than its share leaves the rest to the heads of its layer that need
more; one that needs more than it gets keeps those of its tokens that receive most from the rows that see them (the
mean: a sum would favour early tokens). The paper goes on dropping while it generates; here generated tokens all stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefill_worker.compression.accumulated import OBSERVED, rows_that_see
from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import Rows, last_rows
from prefill_worker.compression.selection import best_tokens, share_of
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer, Statistic

# Below every score of a token that its head keeps.
DROPPED = -1.0


@dataclass(frozen=True)
class NearSums(Statistic[torch.Tensor]):
    """Attention that each key receives from those of the rows that lie less than `reach` tokens after it.

    [num_kv_heads, num_tokens] fp32, summed over the group.
    """

    rows: Rows
    reach: int

    def measure(self, layer: LayerAttention) -> torch.Tensor:
        """See the class."""
        sums = layer.key.new_zeros(layer.key.shape[:2], dtype=torch.float32)
        for positions, weights in layer.blocks(self.rows):
            seen = weights.shape[2]
            far = positions[:, None] - torch.arange(seen, device=positions.device) >= self.reach
            near = weights.masked_fill_(far, 0.0).sum(dim=1)
            sums[:, :seen] += near.view(-1, layer.group, seen).sum(dim=1)
        return sums


@dataclass(frozen=True, kw_only=True)
class FastGen(Policy):
    """See the module."""

    name: ClassVar[str] = "fast_gen"
    monotone: ClassVar[bool] = True

    rows: str = "all"
    """`all` as published, or `probe`: an approximation by few rows."""
    mass: float = 0.95
    """T: share of a head's attention that its kept tokens must receive; in (0, 1]."""
    local_share: float = 0.3
    """Share of the prompt that is near a token; in (0, 1]."""
    frequent_share: float = 0.3
    """Share of the prompt that is frequent; in (0, 1]."""

    def __post_init__(self) -> None:
        self.require(self.rows in OBSERVED, f"rows must be one of {', '.join(OBSERVED)}, not {self.rows!r}")
        for name in ("mass", "local_share", "frequent_share"):
            share = getattr(self, name)
            self.require(0 < share <= 1, f"{name} must lie in (0, 1], not {share}")

    def needs(self, prompt: PromptShape) -> tuple[ColumnSums, NearSums]:
        """All rows, or probes; from everywhere, and from nearby."""
        rows = OBSERVED[self.rows](prompt)
        return ColumnSums(rows), NearSums(rows, _count(prompt, self.local_share))

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Mean attention of what a head of its kind keeps; everything else lies below zero."""
        sums, _ = self.needs(layer.prompt)
        means = layer[sums] / rows_that_see(sums.rows, layer[sums])
        return means.masked_fill(~self.wanted(layer), DROPPED)

    def share_heads(self, scores: torch.Tensor, kept: int) -> list[int]:
        """What each head wants, at most; the layer's budget is filled from the smallest wish on."""
        wanted = (scores >= 0).sum(dim=1).tolist()
        shares, left = [0] * len(wanted), kept * len(wanted)
        for done, head in enumerate(sorted(range(len(wanted)), key=lambda head: wanted[head])):
            shares[head] = min(wanted[head], left // (len(wanted) - done))
            left -= shares[head]
        return shares

    def wanted(self, layer: ObservedLayer) -> torch.Tensor:
        """The tokens that a head of its kind keeps, [num_kv_heads, num_tokens] bool."""
        prompt, (sums, near) = layer.prompt, (layer[statistic] for statistic in self.needs(layer.prompt))
        special, none, full = _places(sums, prompt.special), torch.zeros_like(sums), torch.ones_like(sums).bool()
        marks = special | _places(sums, prompt.punctuation)
        recent = _places(sums, last_rows(prompt, _count(prompt, self.local_share)))
        frequent = best_tokens(sums, [_count(prompt, self.frequent_share)] * len(sums))
        # what every row sees of a kind's tokens, and what it sees of all others: those that are near it
        everywhere = torch.stack([special, marks, marks, marks | frequent])
        masses = torch.where(everywhere, sums, torch.stack([none, none, near, near])).sum(dim=2)
        enough = torch.cat([masses >= self.mass * sums.sum(dim=1), full[None, :, 0]])
        kept = torch.stack([special, marks, marks | recent, marks | recent | frequent, full])
        return kept[enough.int().argmax(dim=0), torch.arange(len(sums), device=sums.device)]


def _places(like: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
    """The same positions for every head, as a mask of the shape of `like`."""
    mask = torch.zeros_like(like, dtype=torch.bool)
    mask[:, list(positions)] = True
    return mask


def _count(prompt: PromptShape, share: float) -> int:
    return max(1, share_of(prompt.num_tokens, share))
