"""What a compression policy is. The pipeline (`pipeline.py`) runs its stages; a policy overrides what is its own.

    observe -> score -> allocate -> select -> [merge]

retention = 1 bypasses every policy. A policy may go on while tokens are generated (`eviction`): the decode worker does
that part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from fractions import Fraction
from typing import Any, ClassVar

import torch

from prefill_worker.compression.layer_sharing import LayerSharing
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.selection import best_tokens
from prefill_worker.compression.sparse.prefill import SparsePrefill
from prefill_worker.compression.statistics import ObservedLayer, Statistic
from shared.errors import InvalidRequestError
from shared.kv.eviction import Eviction
from shared.request.params import MIN_KEPT_TOKENS

NO_PARAMETER = {"parameter": False}
"""Metadata of a policy's field that no request may set."""


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """The budget of one prompt: `retention` of `num_tokens` in each of `num_layers`, exactly as asked."""

    retention: Fraction
    num_tokens: int
    num_layers: int

    @property
    def total(self) -> int:
        """Tokens of all layers together; rounded down, so bytes never exceed the target."""
        return int(self.retention * self.num_layers * self.num_tokens)

    def uniform(self, min_tokens: int = MIN_KEPT_TOKENS) -> list[int]:
        """The same number of tokens in every layer, rounded down."""
        kept = max(int(self.retention * self.num_tokens), min(self.num_tokens, min_tokens))
        return [kept] * self.num_layers


class Policy(ABC):
    """A compression policy; a frozen dataclass whose fields are its request parameters.

    Deterministic: the same prompt gives the same choice. Nothing is kept between requests.
    """

    name: ClassVar[str]
    carries_scores: ClassVar[bool] = False
    """Whether its eviction goes by scores that begin in the prompt."""
    monotone: ClassVar[bool] = False
    """Whether layers may lose tokens while the pass goes on (`cascade.py`): `upper_bounds` and `lower_bounds` hold,
    what `select` takes for fewer tokens lies within what it takes for more, and nothing is merged."""

    def for_checkpoint(self, sharing: LayerSharing | None) -> Policy:
        """This policy with what it must know of the weights that it will run with; by default nothing.

        Args:
            sharing: Which layers may share KV, where that is known.

        Raises:
            InvalidRequestError: Something is not known of this checkpoint.
        """
        return self

    def for_prompt(self, prompt: PromptShape) -> Policy:
        """The policy that runs in its place for prompts that this method does not cover; by default itself."""
        return self

    def needs(self, prompt: PromptShape) -> tuple[Statistic[Any], ...]:
        """What is measured in each layer; a cheap function of the prompt's shape."""
        return ()

    def sparse_prefill(self, prompt: PromptShape, budget: TokenBudget) -> SparsePrefill | None:
        """What the method changes in the pass itself; None leaves it whole."""
        return None

    @property
    def needs_own_pass(self) -> bool:
        """Whether a pass that was made for another policy or budget is of no use to this one."""
        return type(self).sparse_prefill is not Policy.sparse_prefill

    @property
    def look_ahead(self) -> int:
        """Answer tokens that are decoded over the full KV before it is scored; see `ObservedLayer.ahead`."""
        return 0

    @property
    def keeps_look_ahead(self) -> bool:
        """Whether the decode worker goes on after these tokens; else they were only drafts."""
        return True

    @abstractmethod
    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Worth of each token, [num_kv_heads, num_tokens] fp32; infinity for what must stay, never NaN."""

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """Tokens to keep in each layer, mean over its KV heads, each between 1 and num_tokens; by default the same.

        What it says of a layer that borrows means nothing.
        """
        return budget.uniform()

    def upper_bounds(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """Most tokens that `allocate` may give to each of the first layers, whatever the layers to come are like.

        Called for `monotone` policies. A further layer never raises a bound. By default what `allocate` gives at once,
        which is right where budgets depend on no layer.

        Args:
            layers: Those that are known, the first of `budget.num_layers`.
        """
        return self.allocate(layers, budget)[: len(layers)]

    def lower_bounds(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """Fewest tokens that `allocate` may give to each of the first layers, whatever the layers to come are like.

        As `upper_bounds` in all else; 0 where nothing is certain.
        """
        return self.allocate(layers, budget)[: len(layers)]

    def share_heads(self, scores: torch.Tensor, kept: int) -> list[int]:
        """Tokens to keep in each KV head of a layer that keeps `kept` on average; by default the same.

        The sum must be kept times the number of heads at most, and each between 1 and num_tokens.
        """
        return [kept] * len(scores)

    def select(self, scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """Which tokens stay: [num_kv_heads, num_tokens] bool with `kept` true per head; by default the best scores."""
        return best_tokens(scores, kept)

    def merge(self, layer: ObservedLayer, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the kept rows become when dropped tokens are merged into them; None ships them as they are.

        Args:
            chosen: As `select` returned it.

        Returns:
            Keys and values [sum of kept, head_dim], head after head, positions ascending.
        """
        return None

    def eviction(self, prompt: PromptShape, chosen: Sequence[torch.Tensor], retention: Fraction) -> Eviction | None:
        """What the decode worker drops or leaves unread while it generates; by default nothing.

        At retention 1 nothing may be dropped, whatever is returned.

        Args:
            chosen: Per layer, as `select` returned it.
            retention: What the budget means as a share of all tokens, exactly.
        """
        return None

    @classmethod
    def rewrites(cls) -> bool:
        """Whether kept rows may be written while an answer is drawn, or read by some of its steps only."""
        return cls.eviction is not Policy.eviction

    def accumulated(self, layer: ObservedLayer) -> torch.Tensor:
        """What the scores of `carries_scores` are at the prompt's end, [num_kv_heads, num_tokens] fp32."""
        return self.score(layer)

    def require(self, condition: bool, message: str) -> None:
        """Refuses a parameter.

        Raises:
            InvalidRequestError: The condition does not hold.
        """
        if not condition:
            raise InvalidRequestError(f"{self.name}: {message}", reason="POLICY_PARAMETER")


def parameters_of(policy: Policy | type[Policy]) -> tuple[Field[Any], ...]:
    """The fields that a request may set."""
    every = fields(policy)  # type: ignore[arg-type]  # a policy is a dataclass
    return tuple(field for field in every if field.metadata.get("parameter", True))
