"""What layers with a window have to do with a choice: of a prompt they use its last tokens alone.

The token that comes next sees the last `window` ones, itself included. In such a layer a policy chooses among the
prompt's last `window - 1` tokens, and what its budget has beyond them goes to layers that can use it. Nothing else of
the layer is ever shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from prefill_worker.compression.pipeline import Selection
from prefill_worker.compression.policy import Policy
from shared.errors import InvalidRequestError
from shared.kv.layout import KVLayout


def check_policy(policy: Policy, layout: KVLayout) -> None:
    """Refuses what makes no sense where layers see the prompt's end alone.

    Raises:
        InvalidRequestError: The model has windows, and the policy drops tokens during the pass, merges tokens that are
            out of sight, or evicts rows in another order than they came in.
    """
    if not layout.windows:
        return
    kind = type(policy)
    for method in (Policy.sparse_prefill, Policy.merge, Policy.eviction):
        if getattr(kind, method.__name__) is not method:
            stage = method.__name__.replace("_", " ")
            raise InvalidRequestError(
                f"{policy.name} cannot be used with this model: its {stage} knows no sliding-window layers",
                reason="POLICY_MODEL",
            )


def seen_parts(selections: Sequence[Selection], layout: KVLayout, keys: Sequence[torch.Tensor]) -> list[Selection]:
    """The choice without what the token that comes next does not see.

    Args:
        keys: Per layer [num_kv_heads, num_tokens, ..], all that can be shipped.
    """
    if not layout.windows:
        return list(selections)
    layers = zip(selections, layout.windows, keys, strict=True)
    return [_seen_part(selection, window, key) if window else selection for selection, window, key in layers]


def seen_bitmaps(selections: Sequence[Selection], layout: KVLayout, num_tokens: int) -> tuple[bytes, ...]:
    """The section of a manifest; see `Manifest.seen_tokens`.

    Args:
        selections: Seen parts.
        num_tokens: Of the prompt and of the answer so far.
    """
    bitmaps = []
    for layer in layout.windowed_layers:
        seen, chosen = min(layout.windows[layer] - 1, num_tokens), selections[layer].chosen
        bits = np.ones((layout.num_kv_heads, seen), dtype=bool) if chosen is None else chosen[:, -seen:].cpu().numpy()
        bitmaps += [row.tobytes() for row in np.packbits(bits, axis=1, bitorder="little")]
    return tuple(bitmaps)


def _seen_part(selection: Selection, window: int, key: torch.Tensor) -> Selection:
    heads, num_tokens = key.shape[:2]
    hidden = num_tokens - (window - 1)
    if hidden <= 0:
        return selection
    assert selection.merged is None, "a policy that merges is refused"
    if selection.chosen is None:
        chosen = torch.ones(heads, num_tokens, dtype=torch.bool, device=key.device)
    else:
        chosen = selection.chosen.clone()
    chosen[:, :hidden] = False
    return replace(selection, chosen=chosen)
