"""AdaKV (Feng et al., NeurIPS 2025, arXiv 2407.11550): heads of a layer share its budget by need.

Idea: heads whose attention is spread need more tokens than heads that look at few; the best tokens of all heads
together say how many each of them gets.

    count_h = tokens of head h among the k * H best of the layer          scores and window as SnapKV's
    k_h     = (1 - floor_share) * count_h + floor_share * k               per KV head, so that none starves

The authors round each head; here the layer's total is kept to the token (largest remainder, ties to the lower head).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prefill_worker.compression.budget import round_to_total
from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.selection import best_tokens


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """See the module; the parameters of `SnapKV`, and one of its own."""

    name: ClassVar[str] = "ada_kv"

    floor_share: float = 0.2
    """Share of the budget that all heads get alike; in [0, 1], 1 is SnapKV."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.floor_share <= 1, f"floor_share must lie in [0, 1], not {self.floor_share}")

    def share_heads(self, scores: torch.Tensor, kept: int) -> list[int]:
        """By the layer's best tokens; at least one each, since each head's last token is among them."""
        heads, tokens = scores.shape
        best = best_tokens(scores.reshape(1, -1), [kept * heads]).view(heads, tokens)
        wanted = [(1 - self.floor_share) * count + self.floor_share * kept for count in best.sum(dim=1).tolist()]
        return round_to_total(wanted, kept * heads, tokens)
