"""What goes joins what stays, in the pool: each head's dropped row may be merged into its most similar one."""

from __future__ import annotations

import torch

from decode_worker.eviction.attention import RowMemory, SomeKV
from decode_worker.eviction.facts import Move
from decode_worker.eviction.ledger import RowLedger
from decode_worker.eviction.recall import joined, most_similar


def merge_dropped(memory: RowMemory[SomeKV], kv: SomeKV, ledger: RowLedger, move: Move) -> None:
    """Rewrites the rows that dropped ones join; called before the move, while the dropped rows are still there.

    Args:
        ledger: Which has counted the rows as dropped.
        move: Of whole layers: all heads of each.
    """
    for layer, dropped in zip(move.layers, move.target.split(ledger.lengths.shape[1]), strict=True):
        keys = memory.keys(kv, layer, int(ledger.lengths[layer].max()) + 1)
        nearest, cosine = most_similar(keys, dropped)
        joins = ledger.joins(layer, cosine)
        pairs = memory.rows(kv, layer, torch.stack((nearest, dropped), dim=1))
        key, value = (joined(rows, cosine, joins)[:, None] for rows in pairs)
        memory.write(kv, layer, nearest[:, None], key, value)
