"""KVMerger (Wang et al., 2024, arXiv 2407.08454): runs of similar neighbours become one token each.

Idea: neighbouring keys resemble each other; a run of them can be replaced by one, weighted around its pivot.

    run    = neighbours whose keys' cosine exceeds `threshold`, per KV head
    pivot  = its token with the highest accumulated attention (ties: the lower position)
    merged = sum of g_i * (k_i, v_i) / sum of g_i,    g_i = exp(-|k_pivot - k_i|^2 / (2 sigma^2))

The paper's retention follows from the threshold; here the budget is given. Own choice: the last `recent_share` of it
stay; the rest goes to the pivots, those of the runs with most attention first, and when there are more places than
runs, to other tokens by their attention. A dropped token merges into the nearest kept token of its run (ties: the lower
position) as its pivot; a run none of whose tokens is kept leaves no trace. Own choice where the published text was not
at hand: sigma is the mean distance of a pivot's members from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from prefill_worker.compression.accumulated import OBSERVED, column_sums, received
from prefill_worker.compression.merging import Groups, groups_of, nearest
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.selection import below_zero, best_tokens, share_of, with_recent
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class KVMerger(Policy):
    """See the module."""

    name: ClassVar[str] = "kv_merger"

    rows: str = "all"
    """`all` as published, or `probe`: an approximation by few rows."""
    threshold: float = 0.75
    """Cosine of neighbouring keys above which they are of one run; in [-1, 1], where 1 merges nothing."""
    recent_share: float = 0.3
    """Share of the kept tokens that goes to the most recent ones; in [0, 1]."""

    def __post_init__(self) -> None:
        self.require(self.rows in OBSERVED, f"rows must be one of {', '.join(OBSERVED)}, not {self.rows!r}")
        self.require(-1 <= self.threshold <= 1, f"threshold must lie in [-1, 1], not {self.threshold}")
        self.require(0 <= self.recent_share <= 1, f"recent_share must lie in [0, 1], not {self.recent_share}")

    def needs(self, prompt: PromptShape) -> tuple[ColumnSums]:
        """All rows, or probes."""
        return (column_sums(prompt, self.rows),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """A pivot is worth its run's attention; any other token less than every pivot, in order of its own."""
        sums = received(layer, self.rows)
        runs = runs_of(layer.key, self.threshold)
        return torch.where(pivots_of(sums, runs), _per_run(sums, runs, "sum"), below_zero(sums))

    def select(self, scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """The recent tokens and the best others."""
        return best_tokens(with_recent(scores, share_of(kept[0], self.recent_share)), kept)

    def merge(self, layer: ObservedLayer, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gaussian means around what is kept."""
        target, joins = nearest(chosen, runs_of(layer.key, self.threshold))
        groups = groups_of(chosen, target, joins)
        pivots = layer.key.float().gather(1, target[..., None].expand_as(layer.key))
        weights = gaussian_weights(groups, groups.members((layer.key - pivots).norm(dim=-1)))[:, None]
        key, value = (groups.sums(groups.members(whole) * weights) for whole in (layer.key, layer.value))
        total = groups.sums(weights)
        return (key / total).to(layer.key.dtype), (value / total).to(layer.value.dtype)


def runs_of(key: torch.Tensor, threshold: float) -> torch.Tensor:
    """The run of each token, [num_kv_heads, num_tokens] int64; they count through all heads."""
    starts = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
    keys = key.float()
    starts[:, 1:] = functional.cosine_similarity(keys[:, 1:], keys[:, :-1], dim=-1) <= threshold
    return (starts.flatten().cumsum(0) - 1).view_as(starts)


def pivots_of(attention: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
    """Which tokens receive the most attention of their run, one in each; [num_kv_heads, num_tokens] bool."""
    places = torch.arange(attention.numel(), device=attention.device).view_as(attention)
    strongest = attention == _per_run(attention, runs, "max")
    return places == _per_run(torch.where(strongest, places, attention.numel()).double(), runs, "min")


def gaussian_weights(groups: Groups, distances: torch.Tensor) -> torch.Tensor:
    """Weight of each member by its distance from the kept token of its group, [num_members]; 1 for the latter."""
    sigma = groups.sums(distances) / (groups.sizes - 1).clamp(min=1)
    return torch.exp(-distances.square() / (2 * groups.spread(sigma).square()).clamp(min=TINY))


def _per_run(values: torch.Tensor, runs: torch.Tensor, reduce: str) -> torch.Tensor:
    """Each run's sum, max or min for all its tokens; [num_kv_heads, num_tokens] like `values`."""
    lengths = runs.flatten().bincount()
    reduced = torch.segment_reduce(values.flatten(), reduce, lengths=lengths, axis=0)
    return reduced.repeat_interleave(lengths).view_as(values)
