"""What the sequences of the running batch see in layers with a window, on the device: see `seen_rows.py`.

Advanced there like the lengths, so that a captured CUDA graph finds its batch as it is now.
"""

from __future__ import annotations

import torch

from decode_worker.kv_pool.base import SequenceKV
from shared.kv.layout import KVLayout


class SlotWindows:
    """Belongs to the step thread. The last slot is trash, which sees all that it has.

    Attributes:
        leaves: [windowed layers, slots + 1, num_kv_heads, longest window + 1] uint8, see `SeenRows`.
        followed: [slots + 1] int64, tokens that followed the prompt's next one when the next step's token comes.
    """

    def __init__(self, layout: KVLayout, *, slots: int, device: torch.device) -> None:
        self._layout = layout
        self._place_of = {layer: place for place, layer in enumerate(layout.windowed_layers)}
        shape = (len(self._place_of), slots + 1, layout.num_kv_heads)
        self.leaves = torch.zeros(*shape, max(layout.windows) + 1, dtype=torch.uint8, device=device)
        self.followed = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._first = torch.zeros(shape, dtype=torch.int32, device=device)

    def place(self, slot: int, kv: SequenceKV) -> None:
        """Takes over a sequence that comes into the batch."""
        assert kv.seen is not None, "without windows a sequence of this model would see too much"
        self.leaves[:, slot] = torch.from_numpy(kv.seen.leaves).to(self.leaves.device)
        self.followed[slot] = kv.seen.age + kv.appended
        # `advance` takes the last step
        before = kv.seen.first(kv.appended - 1, self._layout)[list(kv.seen.layers)]
        self._first[:, slot] = torch.from_numpy(before).to(self._first)

    def advance(self, slots: torch.Tensor) -> None:
        """Leaves out what the next token of each of `slots`, [batch] int64, no longer sees."""
        step = self.followed[slots].clamp(max=self.leaves.shape[3] - 1)
        # indices on both sides of a slice: the batch comes first
        leaving = self.leaves[:, slots, :, step].permute(1, 0, 2)
        self._first.index_add_(1, slots, leaving.int())
        self.followed.index_add_(0, slots, torch.ones_like(slots))

    def first(self, layer: int) -> torch.Tensor | None:
        """First row of a layer in sight, [slots + 1, num_kv_heads] int32; None where all are."""
        place = self._place_of.get(layer)
        return None if place is None else self._first[place]
