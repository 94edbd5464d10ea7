"""A selection that begins while the pass goes on: layers lose what no outcome of the layers to come could keep.

After each layer the whole budget is shared out among the layers seen so far. Another layer only takes from these, and
what is chosen within a smaller budget lies within what is chosen within a larger one: so the layers end with the
tokens that they would have with all KV at hand until the end, and no more than the budget and one layer is ever held.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from prefill_worker.compression.pipeline import score_layer, token_budget
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.statistics import ObservedLayer
from shared.request.params import Budget


class Cascade:
    """One `monotone` policy over one pass.

    Args:
        prompt: The prompt that passes.
        budget: Below 1.
        num_layers: Layers that will come.

    Attributes:
        layers: Those that have come, scored and without their KV: what `select_tokens` takes in the end.
    """

    def __init__(self, policy: Policy, prompt: PromptShape, budget: Budget, num_layers: int) -> None:
        self._policy = policy.for_prompt(prompt)
        assert self._policy.monotone, "its budgets may yet grow"
        self._budget = token_budget(prompt, budget, num_layers)
        self._text = prompt.num_tokens - self._budget.num_tokens
        self.layers: list[ObservedLayer] = []

    @property
    def complete(self) -> bool:
        """Whether all layers have come."""
        return len(self.layers) == self._budget.num_layers

    def add(self, layer: ObservedLayer) -> None:
        """The next layer, with all its KV, of which nothing is kept here."""
        scores = score_layer(self._policy, layer, keep_text=self._text > 0)
        nothing = layer.key.new_empty((*layer.key.shape[:2], 0))
        self.layers.append(replace(layer, key=nothing, value=nothing, scores=scores))

    def bounds(self) -> list[int]:
        """Most tokens that each layer so far may end with, mean over its KV heads; another layer never raises them."""
        return [self._text + tokens for tokens in self._policy.upper_bounds(self.layers, self._budget)]

    def certain(self) -> list[int]:
        """Fewest tokens that each layer so far ends with, mean over its KV heads; another layer never lowers them."""
        return [self._text + tokens for tokens in self._policy.lower_bounds(self.layers, self._budget)]

    def best(self, index: int, bound: int) -> torch.Tensor:
        """[num_kv_heads, num_tokens] bool: the tokens of a layer that are within a bound.

        Of its upper bound all that may be kept, of its lower bound all that are kept for certain.
        """
        scores = self.layers[index].scores
        assert scores is not None
        return self._policy.select(scores, self._policy.share_heads(scores, bound))
