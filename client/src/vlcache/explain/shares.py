"""From counts of KV heads to what a picture shows: shares of tokens, tokens of layers."""

from collections.abc import Sequence
from typing import NamedTuple

from vlcache._kept import ImageGrid, Kept


class LayerBudget(NamedTuple):
    """Tokens that a layer keeps, on average over its KV heads."""

    visual: float
    text: float

    @property
    def tokens(self) -> float:
        """Of both kinds."""
        return self.visual + self.text


def layer_budgets(kept: Kept) -> list[LayerBudget]:
    """What each layer keeps."""
    return [_budget(kept, layer) for layer in kept.layers]


def _budget(kept: Kept, layer: Sequence[int]) -> LayerBudget:
    visual = sum(sum(_of_grid(layer, grid)) for grid in kept.images) / kept.num_kv_heads
    return LayerBudget(visual=visual, text=sum(layer) / kept.num_kv_heads - visual)


def layer_shares(kept: Kept, layer: int, grid: ImageGrid) -> list[float]:
    """Per patch, row after row, the share of the layer's KV heads that kept it."""
    return [count / kept.num_kv_heads for count in _of_grid(kept.layers[layer], grid)]


def all_shares(kept: Kept, grid: ImageGrid) -> list[float]:
    """Per patch, row after row, the share of all layers' KV heads that kept it."""
    layers = [_of_grid(layer, grid) for layer in kept.layers]
    return [sum(counts) / (len(layers) * kept.num_kv_heads) for counts in zip(*layers, strict=True)]


def _of_grid(layer: Sequence[int], grid: ImageGrid) -> Sequence[int]:
    return layer[grid.tokens.start : grid.tokens.stop]
