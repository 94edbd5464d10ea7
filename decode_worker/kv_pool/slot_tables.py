"""Block tables and lengths on the device, one slot per running sequence: what the kernels of a step read.

Slots stay where they are from step to step, so a captured CUDA graph always finds its batch by slot numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from decode_worker.kv_pool.base import SequenceKV
from decode_worker.kv_pool.slot_windows import SlotWindows
from shared.kv.layout import KVLayout


@dataclass(eq=False, kw_only=True)
class BlockKV(SequenceKV):
    """Where a sequence's blocks are.

    Attributes:
        blocks: [num_layers, num_kv_heads, most blocks of a row] int32; rows with fewer end in the trash block.
    """

    blocks: np.ndarray
    shared: BlockKV | None = None


class SlotTables:
    """Belongs to the step thread.

    The last slot is trash: it fills up batches, has one token in every row, and its rows lie in the trash block.

    Attributes:
        blocks: [num_layers, slots + 1, num_kv_heads, max_blocks] int32.
        lengths: [num_layers, slots + 1, num_kv_heads] int32, tokens present.
        trash: Number of the trash slot.
        windows: What layers with a window see; None where every layer sees everything.
    """

    def __init__(
        self, *, layout: KVLayout, slots: int, max_blocks: int, trash_block: int, device: torch.device
    ) -> None:
        shape = (layout.num_layers, slots + 1, layout.num_kv_heads)
        self.blocks = torch.full((*shape, max_blocks), trash_block, dtype=torch.int32, device=device)
        self.lengths = torch.ones(shape, dtype=torch.int32, device=device)
        self.trash = slots
        self.windows = SlotWindows(layout, slots=slots, device=device) if layout.windows else None
        self._slot_of: dict[SequenceKV, int] = {}
        self._free = list(range(slots - 1, -1, -1))

    def bind(self, batch: Sequence[SequenceKV]) -> list[int]:
        """The slots of a batch; who is no longer in it loses its slot, who is new gets one."""
        present = set(batch)
        for kv in [kv for kv in self._slot_of if kv not in present]:
            self._free.append(self._slot_of.pop(kv))
        return [self._slot_of[kv] if kv in self._slot_of else self._place(kv) for kv in batch]

    def advance(self, slots: torch.Tensor) -> None:
        """Makes room for one more token in each of `slots`, [batch] int64; the trash slot stays as it is."""
        layers, _, heads = self.lengths.shape
        self.lengths.index_add_(1, slots, self.lengths.new_ones(layers, len(slots), heads))
        self.lengths[:, self.trash].fill_(1)
        if self.windows:
            self.windows.advance(slots)

    def first_seen(self, layer: int) -> torch.Tensor | None:
        """First row of a layer in sight, [slots + 1, num_kv_heads] int32; None where all are."""
        return self.windows.first(layer) if self.windows else None

    def blocks_of(self, kv: SequenceKV) -> torch.Tensor:
        """The block table of a sequence of the batch, [num_layers, num_kv_heads, max_blocks] int32."""
        return self.blocks[:, self._slot_of[kv]]

    def measure(self, kv: SequenceKV) -> None:
        """Takes over the lengths of a sequence of the batch, which may have dropped rows."""
        self.lengths[:, self._slot_of[kv]] = torch.from_numpy(kv.lengths).to(self.lengths)

    def check_integrity(self) -> None:
        """Asserts that every slot is either free or a sequence's."""
        assert sorted([*self._free, *self._slot_of.values()]) == list(range(self.trash))

    def _place(self, kv: SequenceKV) -> int:
        assert isinstance(kv, BlockKV)
        slot = self._slot_of[kv] = self._free.pop()
        self.blocks[:, slot, :, : kv.blocks.shape[-1]] = torch.from_numpy(kv.blocks).to(self.blocks.device)
        self.lengths[:, slot] = torch.from_numpy(kv.lengths).to(self.lengths)
        if self.windows:
            self.windows.place(slot, kv)
        return slot
