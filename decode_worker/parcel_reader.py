"""Brings an encoded parcel body back into its plain form, which is all that the pool knows.

The wire carried fewer bytes; the pool holds as many as without.
"""

from __future__ import annotations

import numpy as np
import torch

from shared.kv.manifest import Manifest
from shared.model.kv_codec import decode
from shared.model.spec import TORCH_DTYPES


def plain_body(manifest: Manifest, body: memoryview, *, verify: bool) -> memoryview:
    """The body as `KVLayout.sections` describes it, in memory of its own; scores follow it unchanged.

    Args:
        manifest: Checked, with an encoding.
        body: As it arrived; may be read-only.
        verify: Whether it must match its digest.

    Raises:
        DataLossError: The digest does not match.
        InvalidRequestError: The body contradicts its manifest.
    """
    assert manifest.encoding is not None
    # a copy: what is decoded is what was verified, whatever becomes of the slot
    coded = np.frombuffer(body, dtype=np.uint8).copy()
    if verify:
        manifest.check_digest(coded.data)
    layout = manifest.layout
    plain_bytes = layout.body_bytes(manifest.num_kept)
    plain = np.empty(plain_bytes + manifest.score_bytes, dtype=np.uint8)
    plain[plain_bytes:] = coded[manifest.kv_bytes :]
    rows = torch.from_numpy(plain[:plain_bytes]).view(TORCH_DTYPES[layout.dtype]).view(-1, layout.head_dim)
    decode(torch.from_numpy(coded[: manifest.kv_bytes]), layout, manifest.num_kept, manifest.encoding, rows)
    return plain.data
