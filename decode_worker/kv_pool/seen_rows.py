"""Which rows the next token sees in layers that have a window.

A query there sees the last `window` tokens, itself included. Rows lie in the order of their tokens, so what is seen of
a KV head is what follows its first row in sight, and that only moves on:

    tokens of the prompt      . . # . # # | # . #        # kept, | the window's begin for the next token
    rows of the parcel                      0   1        those before it are never sent
    two tokens later                      . # | # . # +  row 0 has left: the first row in sight is 1

Rows that have left stay stored; nothing reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest


@dataclass(frozen=True, eq=False, kw_only=True)
class SeenRows:
    """One sequence's windowed layers.

    Attributes:
        layers: Those that have a window, ascending.
        leaves: [layers, num_kv_heads, longest window + 1] uint8: whether a row leaves when so many tokens have
            followed the prompt's next one. From the last entry on one leaves with every token.
        left: As `leaves`, int32: how many have left by then.
        age: Tokens that had followed the prompt when the sequence came into its pool.
    """

    layers: tuple[int, ...]
    leaves: np.ndarray
    left: np.ndarray
    age: int = 0

    @classmethod
    def of(cls, manifest: Manifest) -> SeenRows | None:
        """The rows of a checked parcel, for its first answer; None where every layer sees everything."""
        layout, layers = manifest.layout, manifest.layout.windowed_layers
        if not layers:
            return None
        leaves = np.ones((len(layers), layout.num_kv_heads, max(layout.windows) + 1), dtype=np.uint8)
        leaves[..., 0] = 0
        for number, bitmap in enumerate(manifest.seen_tokens):
            layer, head = divmod(number, layout.num_kv_heads)
            window = layout.windows[layers[layer]]
            seen = min(window - 1, manifest.seen_length)
            bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), count=seen, bitorder="little")
            leaves[layer, head, 1 : window - seen] = 0
            leaves[layer, head, window - seen : window] = bits
        age = manifest.logical_length - manifest.seen_length
        return cls(layers=layers, leaves=leaves, left=leaves.cumsum(axis=2, dtype=np.int32), age=age)

    def first(self, appended: int, layout: KVLayout) -> np.ndarray:
        """Of each layer and KV head the first row that the next token sees, [num_layers, num_kv_heads] int64.

        Args:
            appended: Tokens that came since the sequence came into its pool.
        """
        followed, last = max(0, self.age + appended), self.left.shape[2] - 1
        first = np.zeros((layout.num_layers, layout.num_kv_heads), dtype=np.int64)
        first[list(self.layers)] = self.left[..., min(followed, last)] + max(0, followed - last)
        return first
