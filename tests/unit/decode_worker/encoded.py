"""A shipment whose body is encoded, and what the decode worker must make of it."""

from __future__ import annotations

from typing import Any

import torch

from decode_worker.engine import EagerEngine
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.worker import LoadedModel
from shared.kv.encoding import Encoding
from shared.kv.manifest import Manifest
from shared.model.kv_codec import decode, encode
from tests.unit.decode_worker.sequences import LAYOUT, Prefilled, advance, sequence
from tests.unit.decode_worker.shipment import MAX_NEW_TOKENS, Shipment


class EncodedShipment(Shipment):
    """Of the same prompt and kept tokens as a plain shipment; its tokens are those of the restored KV."""

    def __init__(self, prompt: Prefilled, loaded: LoadedModel, encoding: Encoding) -> None:
        self.encoding = encoding
        super().__init__(prompt, loaded)
        self.unencoded = super().tokens()

    def manifest(self, request_id: str = "r", attempt: int = 1, **changes: Any) -> Manifest:
        return super().manifest(request_id, attempt, **({"encoding": self.encoding} | changes))

    def tokens(self, steps: int = MAX_NEW_TOKENS - 1, **sampling: Any) -> list[int]:
        """Encodes the body, then computes without a worker, from what decoding gives back."""
        rows = torch.frombuffer(self.body, dtype=torch.float32).view(-1, LAYOUT.head_dim)
        coded = torch.empty(self.encoding.body_bytes(LAYOUT, self.num_kept), dtype=torch.uint8)
        encode(rows, LAYOUT, self.num_kept, self.encoding, self._channels(), coded)
        self.body, restored = bytearray(coded.numpy().tobytes()), torch.empty_like(rows)
        decode(coded, LAYOUT, self.num_kept, self.encoding, restored)
        pool = SlabPool(1 << 20, LAYOUT)
        allocation = pool.allocate(pool.sequence_bytes(self.num_kept, steps))
        kv = pool.install(allocation, self.num_kept, restored.flatten().numpy().view("uint8").data, steps)
        engine, each, made = EagerEngine(self._loaded.model, pool), sequence(self.prompt, kv, steps, **sampling), []
        for _ in range(steps):
            advance([each], engine.step([each]))
            made.append(each.last_token)
        return made

    def _channels(self) -> torch.Tensor | None:
        """The first ones in even layers, the last ones in odd ones."""
        sent = torch.arange(LAYOUT.head_dim) < self.encoding.key_channels
        layers = torch.stack([sent if layer % 2 == 0 else sent.flip(0) for layer in range(LAYOUT.num_layers)])
        whole = self.encoding.key_channels == LAYOUT.head_dim
        return None if whole else layers[:, None].expand(-1, LAYOUT.num_kv_heads, -1)
