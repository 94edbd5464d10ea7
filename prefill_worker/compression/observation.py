"""Which attention rows are observed."""

from __future__ import annotations

from prefill_worker.compression.policy import PromptShape

# Rows observed when no text follows the last image, or there is no image.
FALLBACK_ROWS = 50


def post_vision_rows(prompt: PromptShape, max_rows: int) -> range:
    """Positions after the last visual token; the last `max_rows` of them when there are more (0 = no cap)."""
    end = prompt.num_tokens
    first = end if prompt.last_visual is None else prompt.last_visual + 1
    if first == end:
        first = max(0, end - FALLBACK_ROWS)
    if max_rows:
        first = max(first, end - max_rows)
    return range(first, end)
