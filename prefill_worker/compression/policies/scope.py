"""SCOPE (Wu et al., ACL 2025, arXiv 2412.13649): prompt and answer have budgets of their own.

Idea: tokens that matter to the prompt are other ones than those that matter to the answer. What was kept of the prompt
stays for good; generated tokens compete among themselves.

    prompt: SnapKV's scores and budget
    answer: of `decode_window` generated tokens the last `decode_recent`, and those that get most attention now

    slide           the window is full from the start
    adaptive        the window is decode_recent + steps / delta, decode_window at most
    discontinuous   the same, but selected anew at every delta-th step only

Own choices: between two selections the discontinuous variant keeps what comes; attention is summed over the query heads
of a KV head, as SnapKV's is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from prefill_worker.compression.policies.snap_kv import MAX_WINDOW, SnapKV
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer
from shared.kv.eviction import MAX_TOKENS, SCOPE_VARIANTS
from shared.kv.eviction import Scope as ScopeEviction


@dataclass(frozen=True, kw_only=True)
class Scope(Policy):
    """See the module."""

    name: ClassVar[str] = "scope"
    monotone: ClassVar[bool] = True

    window: int = 32
    """Last rows that SnapKV observes, and last tokens of the prompt that always stay; in [1, 256]."""
    variant: str = "slide"
    """`slide`, `adaptive` or `discontinuous`."""
    decode_window: int = 1024
    """Generated tokens that are held at most, per layer and KV head."""
    decode_recent: int = 256
    """Last generated tokens that always stay; in [1, decode_window]."""
    delta: int = 15
    """Steps by which the adaptive window grows by one, and between two selections of the discontinuous variant."""

    def __post_init__(self) -> None:
        self.require(1 <= self.window <= MAX_WINDOW, f"window must lie in [1, {MAX_WINDOW}], not {self.window}")
        known = self.variant in SCOPE_VARIANTS
        self.require(known, f"variant must be one of {', '.join(SCOPE_VARIANTS)}, not {self.variant!r}")
        within = 1 <= self.decode_recent <= self.decode_window <= MAX_TOKENS
        self.require(within, f"decode_recent must lie in [1, decode_window], not {self.decode_recent}")
        self.require(1 <= self.delta <= MAX_TOKENS, f"delta must be at least 1, not {self.delta}")

    def needs(self, prompt: PromptShape) -> tuple[ColumnSums]:
        """SnapKV's rows."""
        return self._prompt_part.needs(prompt)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """SnapKV's."""
        return self._prompt_part.score(layer)

    def eviction(self, prompt: PromptShape, chosen: Sequence[torch.Tensor], retention: Fraction) -> ScopeEviction:
        """The answer's part."""
        return ScopeEviction(
            variant=self.variant, window=self.decode_window, recent=self.decode_recent, delta=self.delta
        )

    @property
    def _prompt_part(self) -> SnapKV:
        return SnapKV(window=self.window)
