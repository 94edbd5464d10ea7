"""Parcels of a wanted size: the KV of a 7B vision-language model, with random content."""

from __future__ import annotations

import numpy as np

from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest, TransferId, body_digest
from shared.request.sampling import Sampling

# Qwen2-VL-7B: 57,344 bytes of KV per token
LAYOUT = KVLayout(num_layers=28, num_kv_heads=4, head_dim=128, dtype="bfloat16")
MODEL = "transfer-benchmark"
MAX_NEW_TOKENS = 2


def kept_tokens(nbytes: float) -> int:
    """Tokens whose KV has about `nbytes`."""
    return max(1, round(nbytes / LAYOUT.token_bytes))


def random_body(tokens: int) -> np.ndarray:
    """A parcel body in memory of its own, touched: uint8 [LAYOUT.full_bytes(tokens)]."""
    return np.random.default_rng(0).integers(0, 256, LAYOUT.full_bytes(tokens), dtype=np.uint8)


def describe(body: memoryview, epoch: str) -> Manifest:
    """The manifest of a body whose layers and heads all keep the same number of tokens."""
    tokens = len(body) // LAYOUT.token_bytes
    return Manifest(
        transfer=TransferId(request_id="", attempt=0, prefill_epoch=epoch),
        model=MODEL,
        compatibility=MODEL,
        layout=LAYOUT,
        num_kept=(tokens,) * (LAYOUT.num_layers * LAYOUT.num_kv_heads),
        logical_length=tokens,
        next_position=tokens,
        policy="",
        requested_retention=1.0,
        realised_retention=1.0,
        layer_attention_mass=(),
        body_bytes=len(body),
        digest=body_digest(body),
        generated=(0,),
        sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS),
    )
