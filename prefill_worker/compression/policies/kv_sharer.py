"""KVSharer (Yang et al., 2024, arXiv 2410.18517): layers whose KV differs most share it.

Idea: a layer may attend to the KV of another one, and where the two differ most the model minds least. Which ones is a
property of the weights: `python -m prefill_worker.calibrate` finds pairs (lender i < borrower j), by

    distance_ij = |mean K_i - mean K_j, mean V_i - mean V_j|      means over calibration prompts, the largest first
    a pair stays while cos(last hidden states, the undisturbed model's) > T      with all pairs before it

In the pass and while tokens are generated, layer j attends with its own queries to what layer i has kept; nothing of
its own K and V is kept or sent. At retention r of L layers the first ceil((1 - r) L) pairs share.

Where there are fewer pairs, or fewer are asked for, the layers that are left share the budget of all and choose tokens
by a policy of their own, each by its own attention; the paper drops no tokens. Deviations: means of KV are over tokens,
too, as prompts differ in length; hidden states of image tokens do not count; a layer that borrows never lends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch

from prefill_worker.compression.layer_sharing import LayerSharing
from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import NO_PARAMETER, Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.sparse.kv_sharer import KVSharerPrefill
from prefill_worker.compression.statistics import ObservedLayer, Statistic
from shared.kv.eviction import SharedLayers

BASES: dict[str, Policy] = {base.name: base for base in (SnapKV(), VLCache())}
UNKNOWN = (
    "no layers are known that may share KV with these weights; "
    "`python -m prefill_worker.calibrate --model CHECKPOINT --prompts FILE` finds them"
)


@dataclass(frozen=True, kw_only=True)
class KVSharer(Policy):
    """See the module."""

    name: ClassVar[str] = "kv_sharer"

    layers: int = 0
    """Layers that borrow; 0 is as many as the retention asks for, if so many pairs are known."""
    base: str = "vl_cache"
    """Which policy chooses tokens in the other layers, if it has to: `snap_kv` or `vl_cache`."""
    pairs: tuple[tuple[int, int], ...] = field(default=(), metadata=NO_PARAMETER)
    """Borrower and lender, the first to share first; the checkpoint's, and not a parameter."""

    def __post_init__(self) -> None:
        self.require(self.layers >= 0, f"layers must not be negative, not {self.layers}")
        self.require(self.base in BASES, f"base must be one of {', '.join(BASES)}, not {self.base!r}")

    def for_checkpoint(self, sharing: LayerSharing | None) -> KVSharer:
        """See `Policy`; with the pairs of these weights."""
        pairs = tuple((pair.borrower, pair.lender) for pair in sharing.pairs) if sharing else ()
        self.require(bool(pairs), UNKNOWN)
        most = f"layers must be at most {len(pairs)} with this checkpoint, not {self.layers}"
        self.require(self.layers <= len(pairs), most)
        return replace(self, pairs=pairs)

    def needs(self, prompt: PromptShape) -> tuple[Statistic[Any], ...]:
        """The base's."""
        return BASES[self.base].needs(prompt)

    def sparse_prefill(self, prompt: PromptShape, budget: TokenBudget) -> KVSharerPrefill:
        """Borrowing layers attend to what their lenders do."""
        self.require(bool(self.pairs), UNKNOWN)
        wanted = self.layers or math.ceil((1 - budget.retention) * budget.num_layers)
        return KVSharerPrefill(dict(self.pairs[:wanted]))

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """The base's."""
        return BASES[self.base].score(layer)

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """The base's for the layers that have KV of their own, which share the budget of all."""
        own = [layer for layer in layers if layer.lender is None]
        retention = min(budget.retention * budget.num_layers / len(own), Fraction(1))
        shared = replace(budget, retention=retention, num_layers=len(own))
        kept = iter(BASES[self.base].allocate(own, shared))
        return [0 if layer.lender is not None else next(kept) for layer in layers]

    def select(self, scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """The base's."""
        return BASES[self.base].select(scores, kept)

    def eviction(self, prompt: PromptShape, chosen: Sequence[torch.Tensor], retention: Fraction) -> SharedLayers | None:
        """The decode worker, too, reads the lenders' rows."""
        lenders = {borrower: lender for borrower, lender in sorted(self.pairs) if not chosen[borrower].any()}
        return SharedLayers(borrowers=tuple(lenders), lenders=tuple(lenders.values())) if lenders else None
