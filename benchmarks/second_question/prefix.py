"""What is retained of a prompt's images: their whole KV, before any question is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.statistics import Statistic
from prefill_worker.engine.engine import Prefilled
from prefill_worker.prompt import Prompt


@dataclass(frozen=True)
class Queries(Statistic[torch.Tensor]):
    """The layer's queries, [num_query_heads, num_tokens, head_dim]: some policies score by those of the image, too."""

    def measure(self, layer: LayerAttention) -> torch.Tensor:
        """See the class."""
        return layer.query


@dataclass(frozen=True, eq=False, kw_only=True)
class Prefix:
    """What is retained of a prompt up to its last visual token.

    Attributes:
        keys: Per layer [num_kv_heads, prefix tokens, head_dim], rotated.
        values: As `keys`.
        queries: Per layer [num_query_heads, prefix tokens, head_dim], rotated.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    queries: list[torch.Tensor]

    @classmethod
    def of(cls, prompt: Prompt, prefilled: Prefilled) -> Prefix:
        """The image part of a pass that measured `Queries`."""
        images = slice(prefix_tokens(prompt.shape))
        return cls(
            keys=[key[:, images].clone() for key in prefilled.keys],
            values=[value[:, images].clone() for value in prefilled.values],
            queries=[measured[Queries()][:, images].clone() for measured in prefilled.measured],
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix."""
        return self.keys[0].shape[1]

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @property
    def query_bytes(self) -> int:
        """Bytes of the queries."""
        return sum(query.nbytes for query in self.queries)

    def cache(self) -> DynamicCache:
        """A cache that holds the prefix; the prefix stays as it is."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(key[None], value[None], layer)
        return cache


def prefix_tokens(prompt: PromptShape) -> int:
    """Tokens up to the last visual one: in the bundled prompts nothing of the question comes before."""
    assert prompt.last_visual is not None, "a prompt without images has no prefix"
    return prompt.last_visual + 1
