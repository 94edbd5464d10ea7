"""Which tokens were kept, for requests that want it explained: for the manifest and for the client."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from vlcache.v1 import inference_pb2 as public

from prefill_worker.compression.pipeline import Selection
from prefill_worker.prompt import Prompt
from shared.errors import InvalidRequestError
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest

# Manifest and report are control messages of 4 MiB at most; the rest is for what else they say.
MAX_EXPLAINED_BYTES = 3 << 20
# The report has one byte for the heads of a token.
MAX_EXPLAINED_HEADS = 255


def check_explainable(num_tokens: int, layout: KVLayout) -> None:
    """Refuses what would not fit the messages.

    Args:
        num_tokens: Of the prompt and of what is decoded ahead.

    Raises:
        InvalidRequestError: The prompt is too long, or the model has too many KV heads.
    """
    heads = layout.num_kv_heads
    if heads > MAX_EXPLAINED_HEADS:
        raise InvalidRequestError(f"explain: {heads} KV heads; at most {MAX_EXPLAINED_HEADS} are possible")
    most = MAX_EXPLAINED_BYTES // (layout.num_layers * max(1, -(-heads // 8)))
    if num_tokens > most:
        raise InvalidRequestError(f"explain: the prompt has {num_tokens} tokens; at most {most} are possible")


def token_bitmaps(selections: Sequence[Selection], num_kv_heads: int, num_tokens: int) -> tuple[bytes, ...]:
    """The section of a manifest.

    Args:
        num_tokens: Of the prompt and of the answer so far.
    """
    chosen = (_chosen(selection, num_kv_heads, num_tokens) for selection in selections)
    return tuple(row.tobytes() for heads in chosen for row in np.packbits(heads.numpy(), axis=1, bitorder="little"))


def kept_report(manifest: Manifest, prompt: Prompt) -> public.KeptTokens | None:
    """How many KV heads kept each of the prompt's tokens; None where the manifest does not say."""
    if not manifest.kept_tokens:
        return None
    bitmaps = np.frombuffer(b"".join(manifest.kept_tokens), np.uint8)
    layers = bitmaps.reshape(manifest.layout.num_layers, manifest.layout.num_kv_heads, -1)
    bits = np.unpackbits(layers, axis=2, count=prompt.shape.num_tokens, bitorder="little")
    return public.KeptTokens(
        num_kv_heads=manifest.layout.num_kv_heads,
        layers=[counts.tobytes() for counts in bits.sum(axis=1, dtype=np.uint8)],
        images=[grid.to_proto() for grid in prompt.grids],
    )


def _chosen(selection: Selection, num_kv_heads: int, num_tokens: int) -> torch.Tensor:
    """[num_kv_heads, num_tokens] bool, on the CPU."""
    if selection.chosen is None:
        return torch.ones(num_kv_heads, num_tokens, dtype=torch.bool)
    return selection.chosen.cpu()
