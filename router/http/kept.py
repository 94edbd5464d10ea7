"""Which tokens of a prompt were kept, as JSON."""

from __future__ import annotations

import base64
from typing import Any

from vlcache.v1 import inference_pb2 as pb


def kept_json(compression: pb.Compression) -> dict[str, Any]:
    """What `explain` asks for.

    Each layer's counts are base64, a byte per token: a long prompt has millions, and writing them as numbers would hold
    the router's one thread.

    Args:
        compression: With `kept`.
    """
    kept = compression.kept
    return {
        "num_kv_heads": kept.num_kv_heads,
        "layers": [base64.b64encode(layer).decode() for layer in kept.layers],
        "attention": list(compression.layer_attention_mass),
        "images": [_grid(image) for image in kept.images],
    }


def _grid(image: pb.ImageGrid) -> dict[str, Any]:
    return {
        "first_token": image.first_token,
        "rows": image.rows,
        "columns": image.columns,
        "box": [image.left, image.top, image.right, image.bottom],
    }
