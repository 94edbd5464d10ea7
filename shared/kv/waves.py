"""How a parcel lies on its way when it leaves in waves, while its prefill goes on.

    rows of wave 0 | rows of wave 1 | ... | rows of the last wave | scores | wave of each row

Within a wave rows lie as in the body: layer after layer the K rows of every KV head, then the V rows, positions
ascending. So what travels is the body, its rows stably sorted by wave, and one byte per kept token, layer and KV head
says all that is needed to put them back: 1/512 of the KV at 128 dimensions of bfloat16. Whatever these bytes are, they
name each row exactly once; wrong ones make another body, which the digest tells.
"""

from __future__ import annotations

from shared.kv.eviction import SCORE_BYTES
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest

# Of rows that did not leave early; no other wave has so large a number.
LAST_WAVE = 255


def travelling_bytes(manifest: Manifest) -> int:
    """Bytes of a parcel that leaves in waves: its body, and the wave of each row."""
    return manifest.body_bytes + sum(manifest.num_kept)


def travelling_bound(kv_bytes: int, layout: KVLayout) -> int:
    """Most bytes that a parcel with so many bytes of K and V has on its way."""
    return kv_bytes + kv_bytes // (2 * layout.row_bytes) * (SCORE_BYTES + 1)
