"""Sequences whose layers have windows: which token every row is, and what a token may therefore look at."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from decode_worker.kv_pool.base import SequenceKV
from decode_worker.kv_pool.seen_rows import SeenRows
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest
from tests.unit.decode_worker.parcels import manifest_of
from tests.unit.decode_worker.pools import GROUP, SCALING, Pool, Rows

# Per layer and KV head, the tokens that are kept.
Tokens = list[list[int]]


def some_seen(layout: KVLayout, length: int, seed: int, *, every: bool = False) -> Tokens:
    """What may be kept of a prompt: in layers with a window only what the next token sees; at least one."""
    draw, kept = random.Random(seed), []
    for layer in range(layout.num_layers):
        window = layout.windows[layer] if layout.windows else 0
        tokens = range(max(0, length - window + 1) if window else 0, length)
        for _ in range(layout.num_kv_heads):
            count = len(tokens) if every else draw.randint(1, len(tokens))
            kept.append(sorted(draw.sample(tokens, count)))
    return kept


def bitmaps(layout: KVLayout, length: int, kept: Tokens) -> tuple[bytes, ...]:
    """As a manifest says it, bit by bit."""
    maps = []
    for layer in layout.windowed_layers:
        seen = min(layout.windows[layer] - 1, length)
        for tokens in kept[layer * layout.num_kv_heads : (layer + 1) * layout.num_kv_heads]:
            bits = sum(1 << token - (length - seen) for token in tokens)
            maps.append(bits.to_bytes(-(-seen // 8), "little"))
    return tuple(maps)


class SightedRows(Rows):
    """`Rows` that know their tokens."""

    def __init__(self, layout: KVLayout, length: int, kept: Tokens, seed: int) -> None:
        super().__init__(layout, [len(tokens) for tokens in kept], seed)
        self.length, self.kept = length, kept

    def manifest(self, **changes: Any) -> Manifest:
        seen = bitmaps(self.layout, self.length, self.kept)
        values = {"logical_length": self.length, "next_position": self.length, "seen_tokens": seen, **changes}
        return manifest_of(self.layout, self.num_kept, self.body, **values)

    def in_sight(self, layer: int, head: int) -> list[int]:
        """Rows that the last token sees, by definition."""
        index = layer * self.layout.num_kv_heads + head
        rows = len(self.pairs[index][0])
        appended = rows - len(self.kept[index])
        tokens = [*self.kept[index], *range(self.length, self.length + appended)]
        window = self.layout.windows[layer] if self.layout.windows else 0
        return [row for row, token in enumerate(tokens) if not window or token > tokens[-1] - window]

    def attend(self, layer: int, query: torch.Tensor) -> np.ndarray:
        """See `Rows.attend`."""
        out = []
        for head, row in enumerate(query[:, 0].double()):
            index = layer * self.layout.num_kv_heads + head // GROUP
            seen = self.in_sight(layer, head // GROUP)
            keys, values = (part[seen].double() for part in self.pairs[index])
            out.append((keys @ row * SCALING).softmax(dim=0) @ values)
        return torch.stack(out).numpy()


def install_sighted(pool: Pool, rows: SightedRows, growth: int) -> tuple[Any, SequenceKV]:
    """Into memory of exactly the size that is needed."""
    manifest = rows.manifest()
    manifest.check()
    allocation = pool.allocate(pool.sequence_bytes(rows.num_kept, growth))
    return allocation, pool.install(allocation, rows.num_kept, rows.body, growth, None, SeenRows.of(manifest))


def first_seen(rows: SightedRows, appended: int, layout: KVLayout) -> list[list[int]]:
    """Of every head the first row that the token after `appended` others sees, by definition."""
    firsts: list[list[int]] = []
    for layer in range(layout.num_layers):
        heads: Sequence[list[int]] = rows.kept[layer * layout.num_kv_heads : (layer + 1) * layout.num_kv_heads]
        window, token = layout.windows[layer], rows.length + appended
        tokens = [[*kept, *range(rows.length, token)] for kept in heads]
        firsts.append([sum(window > 0 and each <= token - window for each in head) for head in tokens])
    return firsts
